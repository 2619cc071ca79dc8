# SPDX-License-Identifier: Apache-2.0
"""What the benchmark of self-speculation makes of what it counted, without an engine."""

from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from benchmarks.serving import speculation_parts as parts
from benchmarks.serving.drafts import add_up, between, evenly, read_counts, shares
from benchmarks.serving.equality import (
    Answer,
    apart,
    batches,
    compare,
    first_difference,
    is_noise,
    measure_equality,
    measure_sampled,
)
from benchmarks.serving.kinds import FILES, Prompt, in_turn, make_prompts, of_round
from benchmarks.serving.speculating import Run, with_drafts
from benchmarks.serving.speculation import read_options, show
from benchmarks.serving.speculation_plot import positions, write_pictures
from vllm_flexquant.speculation.control import DraftCounts
from vllm_flexquant.speculation.gate import expected_speedup


class Words:
    """A tokenizer: a token for each word."""

    chat_template = None

    def __call__(self, text, **_):
        return {"input_ids": [len(word) for word in text.split()]}


def counts(drafted, kept, steps=10, plain=0):
    return {
        "drafted": drafted,
        "kept": kept,
        "verified": drafted[0] if drafted else 0,
        "steps": steps,
        "plain_steps": plain,
        "tokens": steps + plain + sum(kept),
        "draft_seconds": 0.5,
        "verify_seconds": 1.0,
    }


def run(rate, found, cost=None):
    return Run(seconds=10.0, tokens=10 * rate, counts=found, cost=cost)


PROMPTS = [Prompt(f"chat {i}", "chat", [i]) for i in range(20)]
SURE = {7: -0.1, 8: -3.0}
CLOSE = {7: -0.70, 8: -0.72}


# ---- counters


def test_counts_are_read_and_taken_from_each_other():
    speculation = SimpleNamespace(counts=DraftCounts())
    before = read_counts(speculation)
    speculation.counts.drafted.update([0, 0, 1])
    speculation.counts.kept.update([0])
    speculation.counts.verified += 2
    found = between(before, read_counts(speculation))
    assert (found["drafted"], found["kept"], found["verified"]) == ([2, 1], [1, 0], 2)
    again = between(read_counts(speculation), read_counts(speculation))
    assert (again["drafted"], again["kept"]) == ([], [])
    shorter = read_counts(speculation)
    speculation.counts.drafted.update([0])
    assert between(shorter, read_counts(speculation))["drafted"] == [1]


def test_sums_of_runs_reach_as_far_as_the_longest_draft():
    found = add_up([counts([4], [3]), counts([5, 2], [1, 1])])
    assert (found["drafted"], found["kept"], found["steps"]) == ([9, 2], [4, 1], 20)
    assert add_up([])["drafted"] == []


def test_shares_by_position():
    found = shares(counts([10, 10, 10], [8, 6, 3], steps=10, plain=30))
    assert found["by_position"] == [0.8, 0.6, 0.3]
    # 10 first drafts, 8 and 6 whose draft before was kept
    assert found["chance"] == pytest.approx(17 / 24)
    assert found["accepted_length"] == pytest.approx(2.7)
    assert found["drafting"] == pytest.approx(0.25)


def test_shares_of_nothing_are_none():
    assert shares(counts([], [], steps=0)) == {
        "by_position": [],
        "chance": None,
        "accepted_length": None,
        "drafting": None,
    }


def test_levels_are_evenly_spaced_in_bits():
    bits = [4.0, 4.1, 4.9, 5.1, 6.0, 8.0]
    assert evenly(bits, 3, 6.0) == [0, 2, 4]
    assert evenly(bits, 1, 6.0) == [0]
    assert evenly([4.0, 8.0], 3, 6.0) == [0]


# ---- equality


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([], [], None)],
)
def test_where_answers_part(one, other, place):
    assert first_difference(one, other) == place


@pytest.mark.parametrize(
    ("best", "token", "noise"),
    [
        (CLOSE, 8, True),
        (SURE, 8, False),  # second best, but far behind
        (CLOSE, 9, False),  # not one of the two
        ({7: -0.70, 8: -0.72, 9: -0.73}, 9, False),
    ],
)
def test_noise_is_the_second_best_of_two_that_are_as_likely(best, token, noise):
    assert is_noise(best, token) is noise


def test_differences_are_named():
    plain = [Answer([7, 7], [SURE, CLOSE]), Answer([7, 7], [SURE, SURE]), Answer([7], [SURE])]
    drafted = [Answer([7, 8], []), Answer([7, 8], []), Answer([7, 7], [])]
    first, second, third = compare(PROMPTS[:3], plain, drafted)
    assert first == {
        "prompt": "chat 0",
        "position": 1,
        "nats": pytest.approx(0.02),
        "noise": True,
    }
    assert (second["noise"], second["nats"]) == (False, pytest.approx(2.9))
    assert (third["noise"], third["nats"], third["position"]) == (False, None, 1)


def test_batches_hold_every_prompt_once_and_no_more_than_asked():
    found = list(batches(PROMPTS, 4))
    assert [prompt for batch in found for prompt in batch] == PROMPTS
    assert [len(batch) for batch in found] == [4, 4, 3, 1, 4, 4]


def test_a_difference_beyond_noise_ends_the_run_with_the_prompts_name():
    def answer(batch, *, drafts, temperature):
        token = 8 if drafts and batch[0].name == "chat 4" else 7
        return [Answer([token], [SURE]) for _ in batch]

    with pytest.raises(SystemExit, match=r"chat 4 at token 0 \(best two 2\.900 nats apart\)"):
        measure_equality(PROMPTS, 4, answer, lambda _: None)


def test_differences_within_noise_are_counted():
    def answer(batch, *, drafts, temperature):
        return [Answer([8 if drafts else 7], [CLOSE]) for _ in batch[:1]] + [
            Answer([7], [CLOSE]) for _ in batch[1:]
        ]

    found = measure_equality(PROMPTS, 16, answer, lambda _: None)
    assert (found["prompts"], found["equal"], found["within_noise"]) == (20, 18, 2)
    assert found["otherwise"] == 0


def test_sampled_answers_that_are_too_unlikely_end_the_run():
    def answer(batch, *, drafts, temperature):
        far = 8.0 if drafts else 0.0
        return [Answer([7], [{7: -2.0 - far - 0.1 * (p.ids[0] % 3)}]) for p in batch]

    assert apart([1.0, 2.0], [1.0, 2.0])["standard_errors_apart"] == 0
    with pytest.raises(SystemExit, match=r"2\.09 nats per token without drafts, 10\.10"):
        measure_sampled(PROMPTS, 8, 0.7, answer, lambda _: None)


# ---- prompts


def test_prompts_of_each_kind_are_all_different():
    found = make_prompts(FILES, Words(), 60, 16)
    assert list(found) == ["prose", "code", "chat"]
    for kind, prompts in found.items():
        assert len(prompts) == 60
        assert len({p.name for p in prompts}) == 60
        assert all(p.kind == kind and p.ids for p in prompts)
    assert found["chat"][0].ids != found["chat"][40].ids  # the same question, further on
    assert [p.kind for p in in_turn(found, 4)] == ["prose", "code", "chat", "prose"]


def test_a_text_that_is_too_short_is_named():
    with pytest.raises(ValueError, match=r"text\.txt has \d+ tokens, too few for 500 prompts"):
        make_prompts({"prose": FILES["prose"]}, Words(), 500, 32)


def test_rounds_have_prompts_of_their_own():
    assert of_round(PROMPTS, 0, 2) == [[0], [1]]
    assert of_round(PROMPTS, 1, 2) == [[2], [3]]
    assert of_round(PROMPTS, 10, 2) == [[0], [1]]


# ---- tables and pictures


def test_acceptance_beside_what_the_model_expects():
    cost = {"step_seconds": 0.02, "draft_seconds": 0.01, "row_seconds": 0.001}
    found = parts.accepted([(run(30, {}), run(36, counts([10, 10], [8, 6]), cost))] * 2, most=2)
    assert found["speed_over_plain"]["median"] == pytest.approx(1.2)
    assert (found["drafted"], found["kept"]) == ([20, 20], [16, 12])
    assert found["draft_over_step"] == pytest.approx(0.5)
    assert found["expected_speedup"] == pytest.approx(expected_speedup(14 / 18, 2, 0.5, 0.05))


def test_without_measured_times_nothing_is_expected():
    found = parts.accepted([(run(30, {}), run(36, counts([10], [8])))], most=1)
    assert (found["expected_speedup"], found["row_over_step"]) == (None, None)


def test_gates_go_up_to_the_longest_draft():
    assert [n for n in parts.gates_of(2) if n.startswith("fixed")] == ["fixed 1", "fixed 2"]
    gates = parts.gates_of(6)
    assert [gates[n]["speculate"] for n in gates if n.startswith("fixed")] == [1, 2, 3, 6]
    assert gates["gain"] == {"speculate": 6, "draft_gate": "gain"}


def test_steps_get_their_drafts_from_the_trace():
    steps = [{"tokens": 1, "drafted": False}, {"tokens": 3, "drafted": True}]
    found = with_drafts(steps, [{"request": "r1-x", "nats": [0.1, 0.2], "kept": 2}])
    assert found == [
        {"tokens": 1, "nats": [], "kept": 0},
        {"tokens": 3, "nats": [0.1, 0.2], "kept": 2},
    ]
    assert positions(found) == [1, 2]
    with pytest.raises(ValueError, match="lacks 1 steps"):
        with_drafts(steps, [])


def test_lists_of_numbers_come_with_commas_or_spaces():
    arguments = ["--model", "m", "--batches", "4,1", "16", "--levels", "3,0"]
    options = read_options(arguments)
    assert (options.batches, options.levels, options.widths) == ([1, 4, 16], [0, 3], None)
    with pytest.raises(SystemExit):
        read_options(["--model", "m", "--batches", "0"])


def results():
    names = ("fixed 1", "entropy 1.0", "gain")
    speed = {"median": 1.1, "quartiles": [1.0, 1.2], "rounds": [1.0, 1.1, 1.2]}
    shared = shares(counts([10], [8]))
    acceptance = {"draft": "level 0", "mean_bits": 4.0, "kind": "chat", "temperature": 0.0}
    return {
        "equality": {"prompts": 6, "equal": 5, "within_noise": 1, "otherwise": 0},
        "acceptance": [acceptance | shared | {"speed_over_plain": speed, "expected_speedup": None}],
        "gate_options": {name: {} for name in names},
        "gates": [
            {
                "requests": requests,
                "kind": "mixed",
                "temperature": 0.0,
                "gates": {name: {"speed_over_plain": speed} | shared for name in names},
            }
            for requests in (1, 4)
        ],
        "load": [{"requests": 4, "speed_over_plain": speed} | shared],
    }


def test_tables_say_what_was_found():
    console = Console(file=StringIO(), width=160)
    show(results(), console)
    words = console.file.getvalue()
    assert "5 of 6 greedy answers are the same, 1 differ within noise" in words
    assert "load, 4 at a time: 100% of steps drafted, speed over plain 1.10" in words
    assert "level 0" in words


def test_pictures_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    steps = [
        {"tokens": 3, "nats": [0.1, 0.4, 2.0], "kept": 2},
        {"tokens": 1, "nats": [], "kept": 0},
    ]
    names = write_pictures(results(), {"gain": steps, "none": steps[1:]}, tmp_path)
    assert names == ["speculation-answer.png", "speculation-gates.png"]
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
