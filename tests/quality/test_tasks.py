# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from benchmarks.quality import humaneval, served, tasks
from benchmarks.quality.sequences import TokenSequence
from benchmarks.quality.statistics import mcnemar, mean_interval, percentile, wilson
from benchmarks.quality.task_data import Choice

QUESTIONS = [Choice("a b", (" yes", " no, never"), 0), Choice("c", (" x", " y"), 1)]


class Words:
    """A tokenizer whose tokens are words; a text begins with token 0."""

    def __call__(self, text, add_special_tokens=True):
        ids = [len(word) for word in text.split()]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}


def test_intervals_of_shares():
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 10)[0] == 0.0
    assert wilson(0, 0) == (0.0, 1.0)


def test_only_items_that_differ_tell():
    same = [True] * 50
    assert mcnemar(same, same) == 1.0
    gained = [False] * 6 + same
    assert mcnemar(gained, [True] * 56) == pytest.approx(2 / 2**6)
    assert mcnemar([True, False], [False, True]) == 1.0


def test_percentiles_and_means():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.75) == 1.75
    assert math.isnan(percentile([], 0.5))
    mean, low, high = mean_interval([1.0, 3.0])
    assert mean == 2.0
    assert high - mean == pytest.approx(1.96 * 1.0, abs=0.01)
    assert mean - low == pytest.approx(high - mean)


def test_answers_are_scored_in_decode_steps():
    sequences = tasks.sequences_of("t", QUESTIONS, Words())
    assert sequences[1] == TokenSequence("t-0-1", [0, 1], [1, 3, 5])
    assert [s.id for s in sequences] == ["t-0-0", "t-0-1", "t-1-0", "t-1-1"]


def test_the_likeliest_answer_is_chosen_by_sum_and_by_bytes():
    def records(nll):
        return {
            (f"t-{i}-{j}", position): {"nll": value}
            for (i, j), values in nll.items()
            for position, value in enumerate(values)
        }

    nll = {(0, 0): [99.0, 3.0], (0, 1): [0.0, 2.0, 2.0], (1, 0): [0.0, 1.0], (1, 1): [0.0, 0.5]}
    found = tasks.chosen("t", QUESTIONS, records(nll))
    assert found["accuracy"] == [True, True]  # the prompt's step does not count
    assert found["accuracy_by_bytes"] == [False, True]  # 3 / 3 bytes against 4 / 9


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 1,234 apples.", "1234"), ("it is 3.5. No, 4.", "4"), ("-7", "-7"), ("none", None)],
)
def test_the_last_number_counts(text, number):
    assert tasks.last_number(text) == number


def test_shares_are_compared_with_the_reference():
    right = {"t": {"fp32": {"accuracy": [True, True, False]}, "x": {"accuracy": [False] * 3}}}
    found = tasks.evaluate(right)["t"]
    assert "p" not in found["fp32"]["accuracy"]
    assert (found["x"]["accuracy"]["lost"], found["x"]["accuracy"]["gained"]) == (2, 0)
    assert found["x"]["accuracy"]["p"] == pytest.approx(0.5)
    assert found["fp32"]["accuracy"]["interval"] == wilson(2, 3)


def test_limits_are_chosen():
    assert set(tasks.read_options(["--quick"]).limits) == {"hellaswag"}
    assert tasks.read_options(["--tasks", "gsm8k", "--limit", "3"]).limits == {"gsm8k": 3}
    with pytest.raises(SystemExit):
        tasks.read_options(["--limit", "0"])


PROBLEM = {
    "prompt": "def twice(x):",
    "test": "def check(f):\n    assert f(2) == 4\n",
    "entry_point": "twice",
}


@pytest.mark.parametrize(
    ("completion", "passed"),
    [
        ("\n    return 2 * x", True),
        ("\n    return x", False),
        ("\n    return (", False),
        ("\n    raise SystemExit(3)", False),
        ("\n    open('x', 'w').write('a' * 5_000_000)\n    return 2 * x", False),
    ],
)
def test_programs_are_run_with_their_test(completion, passed):
    assert humaneval.passes(PROBLEM, completion) is passed


def test_a_program_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(humaneval, "SECONDS", 1)
    assert not humaneval.passes(PROBLEM, "\n    while True: pass")


def record(name, kl, nll, reference):
    entry = {"id": name, "kl": kl, "top1": True, "nll": nll, "nll_reference": reference}
    return entry | {"position": 1}


def test_perplexity_is_compared_by_sequence():
    sequences = [TokenSequence("a", [1], [2, 3]), TokenSequence("b", [1], [2, 3])]
    records = [record("a", 0.1, 1.2, 1.0), record("b", 0.3, 1.1, 1.0)]
    found = served.quality_of(records, sequences)
    assert found["kl"] == pytest.approx(0.2)
    assert found["perplexity"] == pytest.approx(math.exp(1.15))
    ratio, low, high = found["perplexity_ratio"]
    assert ratio == pytest.approx(math.exp(0.15))
    assert low < ratio < high
    with pytest.raises(ValueError, match="1 of 2 sequences"):
        served.quality_of(records[:1], sequences)


def test_policies_are_compared_with_levels():
    def entry(bits, kl):
        return {"texts": {"t": {"mean_bits": bits, "kl": kl}}}

    results = {
        "calibrated-4": entry(4.0, 0.1),
        "calibrated-8": entry(8.0, 0.001),
        "level-3": entry(6.0, 0.01),
        "budget-0.03": entry(5.0, 0.02),
        "w8a8": entry(8.0, 0.1),
    }
    served.compare_with_levels(results, ["t"])
    level = results["budget-0.03"]["texts"]["t"]["static_level"]
    assert level["kl_at_equal_bits"] == pytest.approx(math.sqrt(0.1 * 0.01))
    assert level["bits_saved_at_equal_kl"] == pytest.approx(2 * math.log(5) / math.log(10) - 1)
    assert "static_level" not in results["w8a8"]["texts"]["t"]
