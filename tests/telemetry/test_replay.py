# SPDX-License-Identifier: Apache-2.0
"""Record a planner's steps, and decide them again from the file."""

import io
import json
import time

import numpy as np
import pytest
import torch
from by_hand import batch, calibrated, planner, start, telemetry

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


def drive(made, steps, seed=0, often=0.05):
    """Requests that come, change class and go, at random; `often`, a sequence has prompt tokens."""
    pick = np.random.default_rng(seed)
    wishes = [
        None,
        {"flexquant_class": "fast"},
        {"flexquant_class": "exact"},
        {"flexquant_budget": 0.05},
        {"flexquant_budget": 0.02},
        {"flexquant_min_bits": 6},
    ]
    for n in range(steps):
        ids = sorted(pick.choice(list("abcdef"), size=pick.integers(1, 5), replace=False))
        if pick.random() < 0.1:
            slot = ord(ids[0]) - ord("a")
            made.ended(slot)
            start(made, slot, wishes[pick.integers(len(wishes))])
        prompt = [bool(pick.random() < often) for _ in ids]
        made.step(batch(ids, prompt=prompt)._replace(positions=[n % 60] * len(ids)))
        logs = 0.6 * pick.standard_normal(len(ids))
        made.probe(torch.tensor([[v, 0.0, 0.0, 0.0] for v in logs], dtype=torch.float32))
        heat = torch.tensor(0.5 + 4 * pick.random(len(ids)), dtype=torch.float32)
        logits = torch.linspace(0, 9, 40) / heat[:, None]
        if n % 10 == 3:  # drafts were verified beside
            slots = torch.tensor(made.batch.slots)
            made.logits(torch.cat([logits, logits]), torch.cat([slots, slots]), drafted=True)
        elif n % 10 != 7:  # else they were computed elsewhere
            made.logits(logits)


def recorded(steps=300, capacity=1000, often=0.05, **options):
    made = calibrated(trace_steps=capacity, **options)
    told = telemetry(made)
    drive(made, steps, often=often)
    return made, told, load(told)


def load(told):
    return Trace.load(told.recorder.trace().dump())


@pytest.mark.parametrize("often", [0.05, 0.7], ids=["decoding", "prompts"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"signal": "both", "hysteresis": 0.1, "dwell": 2, "aggregate": "max"},
        {"signal": "entropy", "prefill": "policy"},
        {"signal": "none", "aggregate": "quantile", "up_for_free": True},
        {"policy": "entropy", "hysteresis": 0.05, "entropy_low": 2.0, "entropy_high": 3.5},
        {"policy": "progressive", "progressive_tokens": 20},
        {"policy": "load", "target_ms": 0.5},
        {"target_ms": 0.5},
        {"target_ms": 0.5, "rank_first": "budget"},
        {"policy": "static", "level": 5},
        {"policy": "manual", "width": 6},
    ],
    ids=str,
)
def test_the_recorded_decisions_are_reproduced_exactly(options, often):
    made, _, trace = recorded(often=often, **options)
    found = replay(trace)
    assert found.same == len(trace.steps) == 300
    assert found.level.tolist() == [step.level for step in trace.steps]
    assert found.first.tolist() == [step.first for step in trace.steps]
    decoded = [len(step.average) > 0 for step in trace.steps]
    assert any(decoded)
    assert all(decoded) == (often < 0.1) or sum(decoded) > 290
    if not made.policy.pinned and often < 0.1:
        assert len(set(found.level.tolist())) > 1
    if made.policy.books:
        tokens = float(made.state.tokens.sum())
        assert found.booked_nats == pytest.approx(float(made.state.spent.sum()) / tokens)


@pytest.mark.parametrize("policy", ["budget", "entropy"])
def test_a_trace_is_bounded_and_begins_where_the_state_is_known(policy):
    made, told, trace = recorded(steps=900, capacity=400, policy=policy, entropy_low=2.0)
    assert 300 <= len(trace.steps) <= 400
    assert replay(trace).same == len(trace.steps)
    small = len(told.recorder.trace().dump())
    drive(made, 900, seed=1)
    assert len(told.recorder.trace().dump()) < 1.2 * small
    _, _, long = recorded(steps=3 * SNAPSHOT_STEPS, capacity=2 * SNAPSHOT_STEPS)
    assert replay(long).same == len(long.steps)


@pytest.mark.parametrize(
    "changes", [{"budget": 0.08}, {"policy": "entropy"}, {"dwell": 3}], ids=str
)
def test_a_change_of_policy_begins_a_new_trace(changes):
    made, told, _ = recorded()
    made.change(changes)
    drive(made, 50, seed=2)
    trace = load(told)
    assert len(trace.steps) == 50
    assert replay(trace).same == 50


def test_other_policies_on_the_same_trace():
    _, _, trace = recorded()
    strict, lax = (replay(trace, {"budget": b}).summary() for b in ("0.005", "0.12"))
    assert strict["booked_nats"] < replay(trace).booked_nats < lax["booked_nats"]
    assert strict["bytes_over_best"] > lax["bytes_over_best"]
    assert replay(trace, {"signal": "none"}).same < 300
    assert replay(trace, {"policy": "static", "level": 3}).summary()["mean_level"] == 3
    assert replay(trace, {"policy": "entropy"}).booked_nats is None


def test_without_calibration_there_is_a_trace_too():
    made = planner(trace_steps=20, entropy_low=2.0)
    told = telemetry(made)
    for heat in range(1, 15):
        made.step(batch("a"))
        made.logits(torch.linspace(0, 9, 40)[None] / heat)
    trace = load(told)
    found = replay(trace)
    assert found.same == 14
    assert len(set(found.level.tolist())) > 1
    with pytest.raises(ValueError, match="needs a calibrated checkpoint"):
        replay(trace, {"policy": "budget"})


def test_what_a_trace_does_not_hold_is_said():
    _, _, trace = recorded(signal="none")
    assert replay(trace).same == 300
    with pytest.raises(ValueError, match="the trace has no scores of the probe"):
        replay(trace, {"signal": "probe"})
    with pytest.raises(ValueError, match="replay: unknown option 'bits'"):
        replay(trace, {"bits": 4})
    with pytest.raises(ValueError, match=r"here\.npz is no trace of flexquant"):
        Trace.load(b"PK nothing", "here.npz")
    trace.header["format"] = 9
    with pytest.raises(ValueError, match="has format 9 and this version reads 2"):
        Trace.load(trace.dump())


def test_nothing_is_recorded_unless_asked_for():
    assert telemetry(calibrated()).recorder is None
    made, told, _ = recorded(steps=5)
    assert len(told.recorder.views(clear=True)) == 5
    assert told.recorder.views() == []
    drive(made, 3, seed=4)
    assert len(told.recorder.views()) == 3
    assert replay(load(told)).same == len(load(told).steps) == 8


def test_options_that_a_replay_does_not_go_by_are_refused():
    _, _, trace = recorded(steps=5)
    with pytest.raises(ValueError, match="min_bits stays as it was recorded"):
        replay(trace, {"min_bits": 6})


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_trace_is_refused_in_a_sentence(seed):
    """Parts taken away, of another kind or length, numbers out of range."""
    _, told, _ = recorded(steps=5)
    content, pick = told.recorder.trace().dump(), np.random.default_rng(seed)
    with np.load(io.BytesIO(content)) as file:
        arrays = {name: file[name] for name in file.files}
    name = sorted(arrays)[pick.integers(len(arrays))]
    header = json.loads(arrays["header"].tobytes())
    match seed % 6:
        case 0:
            del arrays[name]
        case 1:
            arrays[name] = arrays[name][:-1]
        case 2:
            arrays[name] = arrays[name].astype(np.complex64)
        case 3:
            name = ("accounts", "level", "first", "low", "high", "ceiling")[pick.integers(6)]
            arrays[name] = arrays[name] + 500
        case 4:
            del header[sorted(header)[pick.integers(len(header))]]
            arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        case 5:
            arrays["header"] = np.frombuffer(b"[7]", np.uint8)
    damaged = io.BytesIO()
    np.savez_compressed(damaged, **arrays)
    with pytest.raises(ValueError, match="is no trace of flexquant") as refused:
        Trace.load(damaged.getvalue())
    assert len(str(refused.value)) < 400
