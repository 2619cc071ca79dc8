# SPDX-License-Identifier: Apache-2.0
"""Record a controller's steps, and decide them again from the file."""

import time

import numpy as np
import pytest
import torch

from tests.planner.test_budget_control import batch, controller
from vllm_flexquant.telemetry.replay import replay
from vllm_flexquant.telemetry.steps import SNAPSHOT_STEPS, Trace

pytestmark = pytest.mark.usefixtures("machinery")


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Steps take from 0.2 to 0.8 ms, whatever the machine does."""
    now, pick = [0.0], np.random.default_rng(7)

    def tick():
        now[0] += pick.uniform(0.0002, 0.0008)
        return now[0]

    monkeypatch.setattr(time, "perf_counter", tick)


def drive(made, steps, seed=0):
    """Requests that come, change class and go, at random."""
    pick = np.random.default_rng(seed)
    wishes = [
        None,
        {"flexquant_class": "fast"},
        {"flexquant_class": "exact"},
        {"flexquant_budget": 0.05},
        {"flexquant_budget": 0.02},
    ]
    for n in range(steps):
        ids = sorted(pick.choice(list("abcdef"), size=pick.integers(1, 5), replace=False))
        if pick.random() < 0.1:
            slot = ord(ids[0]) - ord("a")
            made.admit(slot, wishes[pick.integers(len(wishes))])
            made.sequences.forget([slot])
        prompt = [bool(pick.random() < 0.05) for _ in ids]
        made.before_forward(batch(ids, prompt=prompt)._replace(positions=[n % 60] * len(ids)))
        logs = 0.6 * pick.standard_normal(len(ids))
        made.probe(torch.tensor([[v, 0.0, 0.0, 0.0] for v in logs], dtype=torch.float32))
        heat = torch.tensor(0.5 + 4 * pick.random(len(ids)), dtype=torch.float32)
        made.after_logits(torch.linspace(0, 9, 40) / heat[:, None])


def recorded(steps=300, capacity=1000, **options):
    made = controller(trace_steps=capacity, **options)
    drive(made, steps)
    return made, Trace.load(made.steps_trace())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"signal": "both", "hysteresis": 0.1, "dwell": 2, "aggregate": "max"},
        {"signal": "entropy", "prefill": "policy"},
        {"policy": "entropy", "hysteresis": 0.05, "entropy_low": 2.0, "entropy_high": 3.5},
        {"policy": "progressive", "progressive_tokens": 20},
        {"policy": "load", "target_ms": 0.5},
        {"target_ms": 0.5},
    ],
)
def test_the_recorded_decisions_are_reproduced_exactly(options):
    _, trace = recorded(**options)
    found = replay(trace)
    assert found.same == len(trace.steps) == 300
    assert found.level.tolist() == [step.level for step in trace.steps]
    assert len(set(found.level.tolist())) > 1


def test_a_trace_is_bounded_and_begins_where_the_state_is_known():
    made, trace = recorded(steps=900, capacity=400)
    assert 300 <= len(trace.steps) <= 400
    assert replay(trace).same == len(trace.steps)
    small = len(made.steps_trace())
    drive(made, 900, seed=1)
    assert len(made.steps_trace()) < 1.2 * small
    _, long = recorded(steps=3 * SNAPSHOT_STEPS, capacity=2 * SNAPSHOT_STEPS)
    assert replay(long).same == len(long.steps)


def test_a_change_of_policy_begins_a_new_trace():
    made, _ = recorded()
    made.update({"budget": 0.08})
    drive(made, 50, seed=2)
    trace = Trace.load(made.steps_trace())
    assert len(trace.steps) == 50
    assert replay(trace).same == 50


def test_other_policies_on_the_same_trace():
    _, trace = recorded()
    strict, lax = (replay(trace, {"budget": b}).summary() for b in ("0.005", "0.12"))
    assert strict["booked_nats"] < replay(trace).booked_nats < lax["booked_nats"]
    assert strict["bytes_over_best"] > lax["bytes_over_best"]
    assert replay(trace, {"signal": "none"}).same < 300
    assert replay(trace, {"policy": "static", "level": 3}).summary()["mean_level"] == 3
    assert replay(trace, {"policy": "entropy"}).booked_nats is None


def test_what_a_trace_does_not_hold_is_said():
    _, trace = recorded(signal="none")
    assert replay(trace).same == 300
    with pytest.raises(ValueError, match="the trace has no scores of the probe"):
        replay(trace, {"signal": "probe"})
    with pytest.raises(ValueError, match="replay: unknown option 'bits'"):
        replay(trace, {"bits": 4})
    with pytest.raises(ValueError, match=r"here\.npz is no trace of flexquant"):
        Trace.load(b"PK nothing", "here.npz")
    trace.header["format"] = 9
    with pytest.raises(ValueError, match="has format 9 and this version reads 1"):
        Trace.load(trace.dump())


def test_nothing_is_recorded_unless_asked_for():
    with pytest.raises(ValueError, match="no steps are recorded; start the server with trace_step"):
        controller().steps_trace()
    made = controller(trace_steps=10)
    made.update({"width": 4})
    with pytest.raises(ValueError, match="policy manual decides nothing"):
        made.steps_trace()
