# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from vllm_flexquant.speculation.gate import (
    Acceptance,
    Row,
    Speculation,
    best_draft,
    expected_best,
    expected_speedup,
)

STEP = 0.030


def learned(draft, row=0.0005, kept=0.9, sequences=1, cycles=200, **options):
    """A speculation that has seen steps, drafts and rows that take so many seconds."""
    made = Speculation(4, **options)
    for _ in range(60):
        made.greedy.book(0.3, True)
    for i in range(cycles):
        length = made.length(sequences)
        step = STEP + row * length * sequences
        tokens = sum(kept**j for j in range(length + 1)) * sequences
        for _ in range(length):
            made.book_draft(sequences, draft)
        made.book_step(sequences, length * sequences, tokens, step, length * draft)
        made.greedy.book(0.3, i % 10 != 0)
    return made


def used(made, sequences=1, steps=820):
    return sum(made.length(sequences) > 0 for _ in range(steps)) / steps


@pytest.mark.parametrize(("kept", "length"), [(0.5, 1), (0.8, 4), (1.0, 3)])
def test_expectation_is_that_of_drafts_one_by_one(kept, length):
    draft, row = 0.5, 0.02
    expected = 1.0 + sum(kept ** (i + 1) for i in range(length))
    assert expected_speedup(kept, length, draft, row) == pytest.approx(
        expected / (1 + length * 0.52)
    )
    assert expected_speedup(kept, 0, draft, row) == 1.0


def test_the_best_length_grows_with_what_is_kept_and_is_none_where_nothing_pays():
    lengths = [expected_best(kept, 0.4, 0.02, 8)[0] for kept in (0.3, 0.6, 0.8, 0.95)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert lengths[-1] > lengths[1] > 0
    assert expected_best(0.99, 1.0, 0.1, 8) == (0, 1.0)


def test_the_recommended_level_weighs_what_is_kept_against_what_it_costs():
    cost = [0.5, 0.6, 0.9]
    assert best_draft([(0, 0.75), (1, 0.9), (2, 0.97)], cost, 4).level == 1
    assert best_draft([(0, 0.95), (1, 0.96), (2, 0.97)], cost, 4).level == 0
    nothing_pays = best_draft([(0, 0.1), (2, 0.2)], cost, 4)
    assert nothing_pays.length == 0
    assert nothing_pays.speedup < 1


def test_it_is_on_where_it_was_measured_to_be_faster_and_off_where_not():
    fast, slow = learned(0.015), learned(0.035)
    assert fast.speedup(1) > 1.1
    assert used(fast) > 0.95
    assert slow.speedup(1) < 0.9
    # it looks again now and then, the sooner the less that loses
    assert 0 < used(slow) <= 0.02
    near = learned(0.024)
    assert 0.9 < near.speedup(1) < 1.03
    assert 0.02 < used(near) < 0.2


def test_each_number_of_sequences_is_judged_by_itself():
    made = learned(0.015)
    assert used(made, 16, steps=4) == 0  # plain steps are measured first
    for _ in range(20):
        length = made.length(16)
        made.book_step(16, 16 * length, 16 * (1 + length), 0.1 * (1 + 2 * length), 0.05 * length)
    assert used(made, 16) < 0.05
    assert used(made, 1) > 0.95
    assert [row["sequences"] for row in made.cost_table()] == [1, 16]


def test_it_changes_its_mind_when_times_change():
    made = learned(0.035)
    for _ in range(2000):
        length = made.length(1)
        made.book_step(1, length, 1 + 0.9 * length, STEP, 0.005 * length)
    assert used(made) > 0.9


def test_drafting_stops_where_the_next_draft_gains_less_than_it_takes():
    made = learned(0.015)
    assert made.goes_on([0.95], 1) == [True]
    assert made.goes_on([0.1], 1) == [False]
    # a row more is cheap, a forward pass for few of the batch is not
    assert made.goes_on([0.95, 0.01], 1) == [True, False]
    assert made.keeps(0.9, 0.1, 1)
    assert not made.keeps(0.005, 0.1, 1)


def test_the_entropy_gate_stops_at_its_threshold_and_the_fixed_one_never():
    entropy, fixed = Speculation(4, "entropy", threshold=1.0), Speculation(4, "fixed")
    assert entropy.keeps(0.0, 1.0, 1)
    assert not entropy.keeps(1.0, 1.01, 1)
    assert fixed.keeps(0.0, 9.0, 1)
    assert fixed.goes_on([0.0], 1) == [True]
    assert {fixed.length(16) for _ in range(10)} == {4}
    assert fixed.length(0) == 0


def test_acceptance_begins_as_calibrated_and_becomes_what_is_seen():
    made = Acceptance([0.9, 0.5], bin_nats=1.0, mean=0.8)
    assert made.of(0.5) == pytest.approx(0.9)
    assert made.of(7.0) == pytest.approx(0.5)
    assert made.mean == pytest.approx(0.8)
    for _ in range(2000):
        made.book(0.5, False)
    assert made.of(0.5) < 0.05
    assert made.of(7.0) == pytest.approx(0.5)
    assert made.mean < 0.05


def test_logits_that_are_no_numbers_are_as_unsure_as_can_be():
    made = Acceptance([0.9, 0.5, 0.1])
    assert made.of(math.nan) == made.of(math.inf) == pytest.approx(0.1)
    made.book(math.nan, True)
    assert made.of(math.nan) > 0.1


def test_ranks_without_a_clock_decide_by_cost_alone_and_the_same():
    ranks = [Speculation(4, draft_cost=0.4, clocked=False) for _ in range(2)]
    for rank, made in enumerate(ranks):
        made.book_draft(1, 0.01 * (1 + rank))
        made.book_step(1, 0, 1, 0.02 * (1 + rank))
        for _ in range(100):
            made.greedy.book(0.2, True)
    assert ranks[0].length(1) == ranks[1].length(1) > 0
    assert ranks[0].goes_on([0.9], 1) == ranks[1].goes_on([0.9], 1)
    assert ranks[0].length(64) == 0
    assert not ranks[0].times or not any(t.plain.count for t in ranks[0].times.values())


def test_batches_that_sample_are_judged_by_themselves():
    made = learned(0.015)
    made.sampling = True
    assert made.speedup(1) is None
    assert made.length(1) == 0
    for _ in range(40):
        length = made.length(1)
        made.book_step(1, length, 1 + length, STEP * (1 + length), 0.01 * length)
    assert used(made) < 0.05
    made.sampling = False
    assert used(made) > 0.95


def test_a_row_more_is_told_from_what_verifying_takes_anyway():
    made = Row()
    assert made.slope(0.5) == 0.5
    for i in range(200):
        made.add(1 + i % 4, 0.040 + 0.001 * (1 + i % 4))
    assert made.slope(0.01) == pytest.approx(0.001, abs=0.001)
    flat = Row()
    for _ in range(200):
        flat.add(2, 0.040)
    assert flat.slope(0.001) == pytest.approx(0.001)


def test_one_step_that_was_disturbed_changes_little():
    made = learned(0.015)
    before = made.speedup(1)
    made.book_step(1, 4, 4, 3.0, 0.06)
    assert made.speedup(1) > 0.85 * before
