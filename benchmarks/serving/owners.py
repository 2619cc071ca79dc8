# SPDX-License-Identifier: Apache-2.0
"""Whose the time of an engine step is. Runs inside the engine's process, on eager engines.

Two measurements. A clock, put around functions of vLLM and of the plugin from outside, gives each
owner the wall time spent in its functions and not in those of another owner below them; it costs
little, and the owners add up to the step. `torch.profiler` then says which operators the time of an
owner goes to; it slows the step down, so its figures are for reading beside each other only.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import fmean, median
from time import perf_counter_ns
from typing import Any

STEP = "engine: rest"
OURS = "flexquant: "

OWNERS = {
    "linear": "linear layers, with what quantizes their inputs",
    "output layer": "the output layer",
    "attention": "attention",
    "KV cache": "writing keys and values",
    "norms": "RMS norms and residuals",
    "rope": "rotary embedding",
    "activation": "activation function",
    "embedding": "looking up tokens",
    "model: rest": "calls between layers",
    "sampling": "sampler and vLLM's own logits processors",
    "flexquant: batch facts": "hook before the forward pass: who is in the batch",
    "flexquant: decision": "policy and precision table",
    "flexquant: probe": "score of the rows, price, later levels",
    "flexquant: entropy": "entropy of the logits, its averages per sequence",
    "flexquant: accounts": "accounts of policy budget",
    "runner: rest": "inputs, attention metadata, bookkeeping of the model runner",
    "scheduler": "scheduler",
    STEP: "the rest of the engine: requests in, tokens out",
}
"""What each owner is; they add up to the step."""

MODULE_OWNERS = {
    "vllm.model_executor.layers.linear": "linear",
    "vllm.model_executor.layers.logits_processor": "output layer",
    "vllm.model_executor.layers.attention": "attention",
    "vllm.model_executor.layers.layernorm": "norms",
    "vllm.model_executor.layers.rotary_embedding": "rope",
    "vllm.model_executor.layers.activation": "activation",
    "vllm.model_executor.layers.vocab_parallel_embedding": "embedding",
}
"""Owner of a module of the model by the Python module of its class, packages included."""

TOP_OPERATORS = 25


def module_owner(python_module: str) -> str | None:
    """The owner of modules whose class is defined in `python_module`."""
    while python_module:
        if python_module in MODULE_OWNERS:
            return MODULE_OWNERS[python_module]
        python_module = python_module.rpartition(".")[0]
    return None


class Clock:
    """Time and calls of each owner, without what owners below it take.

    The outermost owner ends a step. While `annotate` is set, each call is also a range of
    `torch.profiler` with the owner's name.
    """

    def __init__(self, now: Callable[[], int] = perf_counter_ns) -> None:
        self.steps: list[dict[str, int]] = []
        """ns by owner, of each step."""
        self.calls: Counter[str] = Counter()
        self.annotate: Callable[[str], AbstractContextManager[Any]] | None = None
        self._now = now
        self._step: Counter[str] = Counter()
        self._inside: list[int] = []
        self._replaced: list[tuple[Any, str, bool, Any]] = []

    def timed(self, owner: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time counted for `owner`."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0)
            began = self._now()
            try:
                with self.annotate(owner) if self.annotate else nullcontext():
                    return function(*args, **kwargs)
            finally:
                spent = self._now() - began
                self._step[owner] += spent - self._inside.pop()
                self.calls[owner] += 1
                if self._inside:
                    self._inside[-1] += spent
                else:
                    self.steps.append(dict(self._step))
                    self._step.clear()

        return counted

    def put_around(self, holder: Any, name: str, owner: str) -> None:
        """Replace the attribute `name` of an instance by its timed form, until `remove`."""
        own = name in vars(holder)
        function = getattr(holder, name)
        self._replaced.append((holder, name, own, function))
        setattr(holder, name, self.timed(owner, function))

    def remove(self) -> None:
        """Put everything back."""
        while self._replaced:
            holder, name, own, function = self._replaced.pop()
            if own:
                setattr(holder, name, function)
            else:
                delattr(holder, name)


def install(clock: Clock, core: Any, llm_engine: Any, runner: Any) -> None:
    """Put `clock` around the parts of an engine (V1 runner)."""
    clock.put_around(llm_engine, "step", STEP)
    for name in ("schedule", "update_from_output"):
        clock.put_around(core.scheduler, name, "scheduler")
    for name in ("execute_model", "sample_tokens"):
        clock.put_around(runner, name, "runner: rest")
    clock.put_around(runner.sampler, "forward", "sampling")
    model = runner.get_model()
    clock.put_around(model, "forward", "model: rest")
    for module in model.modules():
        owner = module_owner(type(module).__module__)
        if owner is not None:
            clock.put_around(module, "forward", owner)
        if owner == "attention" and hasattr(module.impl, "do_kv_cache_update"):
            clock.put_around(module.impl, "do_kv_cache_update", "KV cache")
    planner = getattr(runner.vllm_config.quant_config, "planner", None)
    if planner is None:
        return
    clock.put_around(runner, "_model_forward", "flexquant: batch facts")
    clock.put_around(planner, "step", "flexquant: decision")
    clock.put_around(planner, "probe", "flexquant: probe")
    clock.put_around(planner.sequences, "read", "flexquant: entropy")
    clock.put_around(planner, "logits", "flexquant: accounts")


def middle_half(steps: Sequence[Mapping[str, int]]) -> list[Mapping[str, int]]:
    """The steps whose whole time is between the quartiles: no start, no interruption."""
    ordered = sorted(steps, key=lambda step: sum(step.values()))
    cut = len(ordered) // 4
    return ordered[cut : len(ordered) - cut]


def share_out(steps: Sequence[Mapping[str, int]]) -> dict[str, dict[str, float]]:
    """Mean microseconds and share of each owner over the middle half of `steps` (ns by owner)."""
    chosen = middle_half(steps)
    means = {
        owner: fmean(step.get(owner, 0) for step in chosen) / 1e3
        for owner in OWNERS
        if any(owner in step for step in chosen)
    }
    total = sum(means.values())
    return {owner: {"us": mean, "share": mean / total} for owner, mean in means.items()}


def operators(events: Iterable[Any], steps: int) -> list[dict[str, Any]]:
    """Operators that took most time, each under the owner whose range it ran in.

    Args:
        events: of `torch.profiler.profile.events()`; those named like an owner are its ranges.

    Returns:
        owner, operator, `us` of its own and `calls`, both per step; longest first.
    """
    time: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for event in events:
        owner, above = event.name, event
        operator = "(Python)" if event.name in OWNERS else event.name
        while above is not None and owner not in OWNERS:
            above = above.cpu_parent
            owner = above.name if above is not None else owner
        if owner not in OWNERS:
            continue  # outside of a step
        time[owner, operator] += event.self_cpu_time_total
        calls[owner, operator] += 1
    return [
        {
            "owner": owner,
            "operator": operator,
            "us": spent / steps,
            "calls": calls[owner, operator] / steps,
        }
        for (owner, operator), spent in time.most_common(TOP_OPERATORS)
    ]


def profile(
    engine: Any, prompts: Sequence[Sequence[int]], tokens: int, trace_tokens: int
) -> dict[str, Any]:
    """Where a decode step of `prompts` goes.

    Args:
        engine: `benchmarks.serving.engine.Engine`, eager.

    Returns:
        plain_us: median step before anything was put around anything. clocked_us: with the clock.
        owners: as `share_out`, with the calls per step. operators: as the function, from a trace of
        `trace_tokens` steps.
    """
    import torch
    from torch.profiler import ProfilerActivity, record_function

    if engine.spec.compiled:
        raise ValueError("compiled layers cannot be told apart; profile an eager engine")
    list(engine.steps(prompts, 4))
    plain = list(engine.steps(prompts, tokens))[1:]
    clock = Clock()
    install(clock, engine.core, engine.llm.llm_engine, engine.runner)
    try:
        list(engine.steps(prompts, 4))
        clock.steps.clear()
        clock.calls.clear()
        list(engine.steps(prompts, tokens))
        steps, calls = clock.steps[1:], Counter(clock.calls)
        clock.annotate = record_function
        traced = engine.steps(prompts, trace_tokens + 1)
        next(traced)  # the prompts
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as trace:
            list(traced)
    finally:
        clock.remove()
    owners = share_out(steps)
    for owner, entry in owners.items():
        entry["calls"] = calls[owner] / tokens
    return {
        "plain_us": 1e6 * median(plain),
        "clocked_us": sum(entry["us"] for entry in owners.values()),
        "owners": owners,
        "operators": operators(trace.events(), trace_tokens),
    }
