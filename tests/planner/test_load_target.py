# SPDX-License-Identifier: Apache-2.0
"""Load in a planner, with a clock that the test winds."""

import time

import pytest
from by_hand import batch, layered, start, telemetry

from vllm_flexquant.options import FlexQuantOptions

LAYERS = 6
FULL = 0.010
"""Seconds of a step at all bits, half of which follows the bytes."""


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def planner(**options):
    made = layered(FlexQuantOptions(**options), (8,) * LAYERS)
    made.start()
    return made


def load(made):
    return telemetry(made).now()["load"]


def step(made, clock, ids="a", prompt=None):
    """A step that takes as long as its widths say; returns them."""
    made.step(batch(ids, prompt, prompt)._replace(positions=[9] * len(ids)))
    widths = made.table.widths.tolist()
    clock[0] += FULL * len(ids) * (0.5 + 0.5 * sum(widths) / (8 * LAYERS))
    return widths


def test_policy_load_runs_at_all_bits_until_that_is_too_slow(clock):
    made = planner(policy="load", target_ms=17)
    assert {tuple(step(made, clock, "a")) for _ in range(30)} == {(8,) * LAYERS}
    busy = [step(made, clock, "ab") for _ in range(100)]
    assert all(min(widths) < 8 for widths in busy[3:])
    assert load(made)["kept"]
    assert step(made, clock, "a") == [8] * LAYERS
    made.change({"target_ms": 8})
    slower = [step(made, clock, "a") for _ in range(20)]
    assert sum(slower[-1]) < 8 * LAYERS
    made.change({"target_ms": 4})
    for _ in range(150):
        assert step(made, clock, "a") == [4] * LAYERS
    assert not load(made)["kept"]


def test_a_rest_of_the_engine_and_steps_with_prompts_are_no_steps_to_learn_from(clock):
    made = planner(policy="load", target_ms=11)
    for _ in range(10):
        step(made, clock, "a")
    clock[0] += 60  # nobody asks
    step(made, clock, "b", prompt=[True])
    clock[0] += 1  # a long prompt
    assert step(made, clock, "b") == [8] * LAYERS
    assert load(made)["met"] == 1.0


@pytest.mark.parametrize("prefill", ["full", "policy"])
def test_prompts_that_delay_others_lower_the_steps_after_them(clock, prefill):
    made = planner(policy="load", target_ms=11, prefill=prefill)
    for _ in range(10):
        assert step(made, clock, "a") == [8] * LAYERS
    step(made, clock, "ab", prompt=[False, True])
    clock[0] += 0.1  # the prompt is long
    after = step(made, clock, "ab")
    assert after == [4] * LAYERS
    assert load(made)["owed_ms"] > 90
    mixed = step(made, clock, "abc", prompt=[False, False, True])
    assert mixed == [8 if prefill == "full" else 4] * LAYERS
    for _ in range(60):
        last = step(made, clock, "a")
    assert last == [8] * LAYERS
    assert load(made)["owed_ms"] == 0


def test_a_prompt_after_which_the_engine_rests_delays_nobody(clock):
    made = planner(policy="load", target_ms=11)
    for _ in range(10):
        step(made, clock, "a")
    step(made, clock, "ab", prompt=[False, True])
    clock[0] += 60  # both are aborted, and nobody asks
    assert step(made, clock, "c") == [8] * LAYERS
    assert load(made)["owed_ms"] == 0


def test_a_target_lowers_other_policies_too(clock):
    made = planner(policy="entropy", target_ms=8)
    for _ in range(20):
        widths = step(made, clock, "a")
    assert sum(widths) < 8 * LAYERS
    made.change({"width": 8})
    assert step(made, clock, "a") == [8] * LAYERS  # a pin holds


def test_a_target_can_be_taken_away(clock):
    made = planner(policy="progressive", target_ms=8, progressive_full=100)
    for _ in range(20):
        widths = step(made, clock, "a")
    assert sum(widths) < 8 * LAYERS
    made.change({"target_ms": None})
    assert step(made, clock, "a") == [8] * LAYERS
    assert load(made) is None
    made.change({"policy": "load", "target_ms": 8})
    with pytest.raises(ValueError, match="policy load has no target"):
        made.change({"target_ms": None})


def test_a_floor_wins_over_the_target(clock):
    made = planner(policy="load", target_ms=5)
    start(made, 0, {"flexquant_min_bits": 6})
    for _ in range(20):
        assert min(step(made, clock, "a")) >= 6


def test_without_a_target_there_is_no_ceiling_and_no_policy_load(clock):
    made = planner()
    for _ in range(5):
        step(made, clock)
    assert load(made) is None
    assert made.ceiling() == len(made.model.ladder) - 1
    with pytest.raises(ValueError, match="policy load has no target; set target_ms"):
        made.change({"policy": "load"})


def test_where_low_widths_save_no_time_every_policy_goes_up_for_free(clock):
    made = planner(policy="progressive", progressive_tokens=40)

    def progress(ids, seconds):
        """Widths of the steps of sequences that go on and on."""
        found = []
        for n in range(1200):
            made.step(batch(ids)._replace(positions=[n] * len(ids)))
            found.append(sum(made.table.widths.tolist()))
            clock[0] += seconds(found[-1])
        return found

    by_bytes = lambda bits: 0.01 * bits  # noqa: E731
    assert progress("a", by_bytes)[-1] < 8 * LAYERS
    assert progress("abcd", lambda bits: 0.02)[-1] == 8 * LAYERS
    assert progress("a", by_bytes)[-1] < 8 * LAYERS
    assert [entry["pays"] for entry in telemetry(made).now()["cost_table"]] == [True, False]


def test_steps_at_widths_that_bounds_have_changed_are_no_steps_to_learn_from(clock):
    made = planner(policy="load", target_ms=4, max_bits=6)
    for _ in range(10):
        step(made, clock)
    assert telemetry(made).now()["cost_table"] == []
    made.change({"width": 4})
    for _ in range(10):
        step(made, clock)
    assert telemetry(made).now()["cost_table"] == []
