# SPDX-License-Identifier: Apache-2.0
"""Whose the time of a step is."""

from dataclasses import dataclass
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks.serving.owners import (
    OWNERS,
    STEP,
    Clock,
    middle_half,
    module_owner,
    operators,
    share_out,
)
from benchmarks.serving.profile_step import tables


class Time:
    """A clock that moves only when told."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("python_module", "owner"),
    [
        ("vllm.model_executor.layers.linear", "linear"),
        ("vllm.model_executor.layers.attention.attention", "attention"),
        ("vllm.model_executor.layers.rotary_embedding.base", "rope"),
        ("vllm.model_executor.layers.linearity", None),
        ("vllm.model_executor.models.llama", None),
        ("torch.nn.modules.linear", None),
    ],
)
def test_modules_belong_to_the_owner_of_their_package(python_module, owner):
    assert module_owner(python_module) == owner


def test_owners_of_vllms_modules_are_known():
    layers = pytest.importorskip("vllm.model_executor.layers.linear")
    logits = pytest.importorskip("vllm.model_executor.layers.logits_processor")
    norms = pytest.importorskip("vllm.model_executor.layers.layernorm")
    attention = pytest.importorskip("vllm.model_executor.layers.attention")
    found = [layers.QKVParallelLinear, logits.LogitsProcessor, norms.RMSNorm, attention.Attention]
    owners = [module_owner(c.__module__) for c in found]
    assert owners == ["linear", "output layer", "norms", "attention"]


def test_an_owner_has_its_time_without_that_of_owners_below():
    time = Time()
    clock = Clock(time)

    def linear():
        time.now += 7

    def attention():
        time.now += 1
        parts.linear()
        parts.linear()
        time.now += 2

    def step():
        time.now += 10
        parts.attention()
        parts.linear()

    parts = SimpleNamespace(linear=linear, attention=attention, step=step)
    clock.put_around(parts, "linear", "linear")
    clock.put_around(parts, "attention", "attention")
    clock.put_around(parts, "step", STEP)
    parts.step()
    parts.step()
    wanted = {"linear": 21, "attention": 3, STEP: 10}
    assert clock.steps == [wanted, wanted]
    assert sum(clock.steps[0].values()) == time.now / 2
    assert clock.calls == {"linear": 6, "attention": 2, STEP: 2}
    clock.remove()
    assert parts.linear is linear
    parts.step()
    assert len(clock.steps) == 2


def test_time_counts_when_a_function_fails():
    time = Time()
    clock = Clock(time)

    def fail():
        time.now += 5
        raise RuntimeError("as it should")

    with pytest.raises(RuntimeError, match="as it should"):
        clock.timed(STEP, fail)()
    assert clock.steps == [{STEP: 5}]


def test_modules_get_their_methods_back():
    layer = torch.nn.Linear(2, 2)
    clock = Clock()
    clock.put_around(layer, "forward", "linear")
    assert "forward" in vars(layer)
    layer(torch.zeros(1, 2))
    assert clock.calls["linear"] == 1
    clock.remove()
    assert "forward" not in vars(layer)
    layer(torch.zeros(1, 2))
    assert clock.calls["linear"] == 1


def test_shares_are_of_undisturbed_steps_and_add_up():
    steps = [{STEP: 3000, "linear": 1000}] * 6
    steps += [{STEP: 2000, "linear": 1000}, {STEP: 90_000, "linear": 1000}]
    assert len(middle_half(steps)) == 4
    shares = share_out(steps)
    assert shares == {
        "linear": {"us": 1.0, "share": 0.25},
        STEP: {"us": 3.0, "share": 0.75},
    }
    assert set(shares) <= set(OWNERS)


@dataclass
class Event:
    name: str
    self_cpu_time_total: float
    cpu_parent: "Event | None" = None


def test_operators_are_counted_under_the_nearest_owner():
    step = Event(STEP, 5.0)
    attention = Event("attention", 3.0, step)
    wrapper = Event("vllm::unified_attention", 2.0, attention)
    copy_inside = Event("aten::copy_", 1.0, wrapper)
    copy_outside = Event("aten::copy_", 4.0, step)
    stray = Event("aten::copy_", 100.0)
    events = [step, attention, wrapper, copy_inside, copy_outside, copy_outside, stray]
    found = {(o["owner"], o["operator"]): o for o in operators(events, steps=2)}
    assert {key: (o["us"], o["calls"]) for key, o in found.items()} == {
        (STEP, "(Python)"): (2.5, 0.5),
        (STEP, "aten::copy_"): (4.0, 1.0),
        ("attention", "(Python)"): (1.5, 0.5),
        ("attention", "vllm::unified_attention"): (1.0, 0.5),
        ("attention", "aten::copy_"): (0.5, 0.5),
    }


def test_real_trace_is_attributed():
    clock = Clock()
    clock.annotate = torch.profiler.record_function
    layer = torch.nn.Linear(8, 8)
    clock.put_around(layer, "forward", "linear")
    run = clock.timed(STEP, lambda: layer(torch.zeros(2, 8)) + 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        run()
    found = {(o["owner"], o["operator"]) for o in operators(trace.events(), 1)}
    assert {("linear", "aten::addmm"), (STEP, "aten::add")} <= found
    assert (STEP, "aten::addmm") not in found


def test_table_sums_up_what_is_ours():
    owners = {
        "linear": {"us": 60.0, "share": 0.6},
        "flexquant: decision": {"us": 30.0, "share": 0.3},
        "flexquant: batch facts": {"us": 10.0, "share": 0.1},
    }
    profile = {"plain_us": 95.0, "clocked_us": 100.0, "owners": owners, "operators": []}
    written = StringIO()
    for table in tables({"flexquant-4": {"1": profile}}):
        Console(width=120, file=written).print(table)
    lines = {line.split("  ")[0].strip(): line for line in written.getvalue().splitlines()}
    assert "40 40.0%" in lines["flexquant, not linear"]
    assert "100  100%" in lines["step"]
    assert "95" in lines["step without the clock"]


def test_what_is_timed_in_the_plugin_is_there():
    planners = pytest.importorskip("vllm_flexquant.planner.planner")
    sequences = pytest.importorskip("vllm_flexquant.planner.sequences")
    for name in ("step", "probe", "logits"):
        assert hasattr(planners.Planner, name)
    assert hasattr(sequences.SequenceEntropy, "read")
