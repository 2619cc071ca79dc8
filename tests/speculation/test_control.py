# SPDX-License-Identifier: Apache-2.0
"""Between drafter and policy, on a planner of hand-made layers; engines are in tests/e2e."""

import pytest
import torch
from by_hand import LAYERS, batch, calibrated, planner, telemetry, widths

from vllm_flexquant.format.record import DraftLevelRecord, DraftsRecord
from vllm_flexquant.speculation.control import SelfSpeculation


def speculating(drafts=None, clocked=True, **options):
    made = planner(**{"policy": "static", "speculate": 4, "draft_gate": "fixed"} | options)
    return made, SelfSpeculation(made, made.options, drafts, clocked)


def step(made, speculation, ids="a", drafted=None, kept=None, rows=None):
    """One step that verifies; returns what may be drafted next."""
    made.step(batch(ids))
    found = list(ids)
    nothing = [0] * len(ids)
    return speculation.begin(
        found, drafted or nothing, kept or nothing, range(len(ids)) if rows is None else rows
    )


def level_record(steps, greedy):
    return DraftLevelRecord(
        steps=steps,
        kl_nats=0.1,
        mean_greedy=greedy,
        mean_sampled=greedy,
        share=(0.6, 0.3999, 0.0001),
        greedy=(greedy, greedy / 2, 0.0),
        sampled=(greedy, greedy / 2, 0.0),
    )


def test_drafts_run_at_their_level_and_leave_the_table_as_it_was():
    made, speculation = speculating(draft_width=4)
    assert step(made, speculation) == 4
    with speculation.drafting():
        assert widths(made) == [4] * LAYERS
    assert widths(made) == [8] * LAYERS


def test_what_was_kept_is_booked_by_entropy_and_position():
    made, speculation = speculating()
    step(made, speculation, "ab")
    assert speculation.stop([0, 1], [0.1, 3.0], [True, True]) == ([0, 1], [])
    assert speculation.stop([0], [0.2], [True]) == ([0], [])
    speculation.end(["a", "b"])
    table = speculation.control.greedy.table()
    step(made, speculation, "ab", drafted=[2, 1], kept=[2, 0])
    after = speculation.control.greedy.table()
    assert after[0] > table[0]
    assert after[12] < table[12]
    status = speculation.status()
    assert (status["drafted"], status["accepted"]) == ([2, 1], [1, 1])
    assert (status["steps"], status["tokens"]) == (1, 4)
    assert speculation.gauges()["accepted_length"] == 2.0


def test_drafts_after_one_that_was_rejected_tell_nothing():
    made, speculation = speculating()
    step(made, speculation)
    for _ in range(3):
        speculation.stop([0], [0.1], [True])
    speculation.end(["a"])
    before = speculation.control.greedy._seen[0]
    step(made, speculation, drafted=[3], kept=[1])
    # the first was kept, the second was not, the third was not looked at
    assert speculation.control.greedy._seen[0] - before == pytest.approx(2, abs=0.1)


def test_steps_that_vllm_did_not_ask_drafts_of_are_not_timed():
    made, speculation = speculating()
    step(made, speculation)
    speculation.end(["a"])
    made.step(batch("a"))  # near the longest length vLLM puts drafts of its own
    step(made, speculation, drafted=[4], kept=[0])
    assert speculation.status()["steps"] == 0
    assert not speculation.control.times


def test_nothing_is_drafted_where_steps_read_no_more_than_drafts():
    made, speculation = speculating(draft_width=6)
    assert step(made, speculation) == 4
    made.change({"policy": "entropy", "max_bits": 6, "prefill": "policy"})
    assert step(made, speculation) == 0


def test_rows_without_room_do_not_draft():
    made, speculation = speculating()
    assert step(made, speculation, "ab", rows=[]) == 0


def test_the_recommended_level_comes_from_calibration():
    top = len(planner().model.ladder) - 1
    drafts = DraftsRecord(bin_nats=0.25, levels=(level_record(1, 0.99), level_record(top, 0.98)))
    _, speculation = speculating(drafts)
    assert speculation.level == 0
    poor = DraftsRecord(bin_nats=0.25, levels=(level_record(5, 0.97), level_record(top, 0.2)))
    _, speculation = speculating(poor)
    assert speculation.level == top - 5
    # a bin with too few tokens is taken for the one before
    assert speculation.control.greedy.of(9.0) == pytest.approx(0.97 / 2)


def test_a_change_of_level_forgets_what_was_measured_of_the_other():
    made, speculation = speculating()
    for _ in range(20):
        speculation.control.greedy.book(0.1, False)
    made.change({"draft_gate": "gain", "draft_entropy": 2.0})
    assert speculation.control.greedy.of(0.1) < 0.7
    made.change({"draft_width": 6})
    assert speculation.control.greedy.of(0.1) > 0.9
    assert speculation.level is None
    assert speculation.mean_bits == pytest.approx(6)
    made.change({"draft_level": 0})
    assert speculation.mean_bits == pytest.approx(4)


def test_null_goes_back_to_the_level_by_calibration():
    made, speculation = speculating(draft_width=6)
    made.change({"draft_width": None})
    assert made.options.draft_width is None
    assert speculation.level == 0


def test_another_gate_is_measured_by_itself():
    made, speculation = speculating()
    speculation.control.book_step(1, 0, 1, 0.03)
    speculation.control.book_step(1, 4, 2, 0.03, 0.09)
    made.change({"speculate": 0})
    made.change({"speculate": 4})
    assert speculation.control.times[0, False].drafted.count == 1
    made.change({"draft_gate": "gain"})
    times = speculation.control.times[0, False]
    assert (times.plain.count, times.drafted.count) == (1, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculate": 5}, "speculate is 5, but the engine was started with 4"),
        ({"width": 4}, "steps are pinned to 4.0 bits, and drafts would run at 4.0: pin a higher"),
        ({"draft_level": 99}, r"draft_level 99 is not on the ladder, which has levels 0 to 10"),
        ({"draft_width": 5}, r"draft_width 5 is not in layout 4\|2\|2; it has 4, 6, 8"),
        ({"draft_width": 4, "draft_level": 2}, "draft_level 2 and draft_width 4 are both set"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(changes, message):
    made, speculation = speculating()
    with pytest.raises(ValueError, match=message):
        made.change(changes)
    assert made.options.speculate == 4
    assert step(made, speculation) == 4


def test_an_engine_without_speculation_says_so():
    made = planner(policy="static")
    with pytest.raises(ValueError, match="speculate is 2, but the engine was started without"):
        made.change({"speculate": 2})


def test_auto_is_all_bits_beside_speculation():
    made, _ = speculating(policy="auto")
    assert made.options.policy == "static"
    assert widths(made) == [8] * LAYERS


@pytest.mark.usefixtures("machinery")
def test_the_probe_decides_nothing_while_drafts_run():
    made = calibrated(speculate=2, policy="budget")
    made.step(batch("a"))
    before, hard = widths(made), torch.tensor([[3.0, 0.0, 0.0, 0.0]])
    with made.drafting(made.state.rungs[0]):
        made.probe(hard)
        assert widths(made) == [4] * len(before)
    assert widths(made) == before
    assert made.state.scores[0] == 1.0
    made.probe(hard)
    assert widths(made) != before
    assert made.state.scores[0] == pytest.approx(20.1, rel=0.01)


def test_gauges_are_of_drafts_that_run_now_and_counters_only_grow():
    made, speculation = speculating()
    told = telemetry(made, speculation)
    step(made, speculation)
    speculation.stop([0], [0.1], [True])
    speculation.end(["a"])
    step(made, speculation, drafted=[1], kept=[1])
    before = told.now()
    assert before["gauges"]["draft_level"] == speculation.level
    assert before["gauges"]["accepted_length"] == 2.0
    assert before["counters"]["speculated_steps"] == 1
    assert before["speculation"]["steps"] == 1
    made.change({"draft_width": 6})
    after = told.now()
    assert "draft_level" not in after["gauges"]
    assert after["gauges"]["draft_mean_bits"] == pytest.approx(6)
    for name, value in before["counters"].items():
        assert after["counters"][name] >= value


def test_load_sees_the_time_per_token():
    made, speculation = speculating(policy="load", target_ms=50.0)
    for _ in range(3):
        step(made, speculation, drafted=[3], kept=[3])
        speculation.end(["a"])
    assert made.clock.load.times[0].steps == 2
    assert 0 < made.clock.load.times[0].seconds < 1
