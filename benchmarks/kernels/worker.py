# SPDX-License-Identifier: Apache-2.0
"""The process that runs kernels: one for the gate, one for each number of threads.

`run.py` starts it with a plan, a JSON object, as its only argument. oneDNN, ARK and vLLM's kernels
decide about threads when they are loaded or prepare weights, so a process keeps its number.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import baselines, gate, timing
from benchmarks.kernels.contenders import (
    Contender,
    Nested,
    UnavailableError,
    by_name,
    make_activations,
    make_nested,
    make_weights,
    torch_contenders,
)
from benchmarks.kernels.plain_read import Read, fastest_read, read_contender
from flexquant_kernels.ops import load_native, native_status, select_isa
from vllm_flexquant.format.layout import PlaneLayout, choose_group_size

GATE_RED = 3
"""Exit status."""


@dataclass
class Plan:
    """What one process does. `shapes` are (N, K); `threads` those of this process."""

    gate: bool
    shapes: list[tuple[int, int]]
    rows: list[int]
    memory_rows: list[int]
    crossover: dict[str, list[int]]
    """Rows to time in cache, our kernels alone, by shape."""
    layouts: list[str]
    baselines: list[str]
    threads: int
    gate_threads: list[int]
    group_size: int
    isa: str | None
    """Instruction set to use; None: the best."""
    rounds: int
    seconds: float
    reuse_mb: int
    copies_mb: int
    out: str


@dataclass
class Line:
    """All contenders of one shape."""

    nested: list[Nested]
    others: list[Contender]
    unavailable: dict[str, str]

    @property
    def ours(self) -> list[Contender]:
        return [c for nested in self.nested for c in nested.contenders.values()]

    def everyone(self) -> list[Contender]:
        return list(by_name([*self.ours, *self.others]).values())


def shape_name(shape: tuple[int, int]) -> str:
    """`(1536, 576)` -> `1536x576`."""
    return f"{shape[0]}x{shape[1]}"


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def line_up(shape: tuple[int, int], plan: Plan) -> Line:
    """Quantize a weight of this shape and make every kernel that is asked for.

    Raises:
        UnavailableError: no group size fits, or ours has no native kernel here.
    """
    n, k = shape
    group = choose_group_size(k, plan.group_size)
    if group is None:
        raise UnavailableError(f"no group size divides k = {k}")
    weights = make_weights(n, k, group)
    nested = [make_nested(weights, PlaneLayout.parse(text)) for text in plan.layouts]
    widths = sorted({width for one in nested for width in one.contenders})
    others: list[Contender] = []
    unavailable: dict[str, str] = {}
    if "torch" in plan.baselines:
        others += torch_contenders(weights)
    found: list[Contender | tuple[str, str]] = []
    if "vllm" in plan.baselines:
        found += baselines.vllm_contenders(weights)
    if "ark" in plan.baselines:
        found += baselines.ark_contenders(weights, widths)
    for one in found:
        if isinstance(one, Contender):
            others.append(one)
        else:
            unavailable[one[0]] = one[1]
    return Line(nested, others, unavailable)


def check(
    line: Line, x: torch.Tensor, rows: Sequence[int], threads: Sequence[int], everything: bool
) -> list[dict[str, Any]]:
    """The gate on one shape.

    Args:
        threads: numbers of threads to run ours with; the others run with the process's.
        everything: compare all output features, not only some at either end.
    """
    features = gate.pick_features(len(line.nested[0].planes[0]), everything)
    checks = []
    for nested in line.nested:
        checks += gate.check_nested(nested, x, rows, features, threads)
    return checks + [gate.check_baseline(other, x, rows, features) for other in line.others]


def run_gate(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """Checks by shape, and the lines of what is red."""
    results: dict[str, Any] = {}
    red: list[str] = []
    for shape in plan.shapes:
        name = shape_name(shape)
        say(f"gate: {name}")
        line = line_up(shape, plan)
        rows = sorted({*plan.rows, *plan.memory_rows, *plan.crossover.get(name, [])})
        x = make_activations(max(rows), shape[1])
        checks = check(line, x, rows, plan.gate_threads, everything=True)
        red += [f"{name}: {text}" for text in gate.failures(checks)]
        results[name] = {
            "rows": rows,
            "rows_compared": gate.pick_rows(max(rows)).tolist(),
            "checks": checks,
            "dispatch": {str(one.layout): one.dispatch for one in line.nested},
            "unavailable": line.unavailable,
            "contenders": {c.name: c.facts() for c in line.everyone()},
        }
        del line
        gc.collect()
    return results, red


def _cell(
    shape: str, rows: int, threads: int, residence: str, timed: tuple[timing.Times, dict[str, Any]]
) -> dict[str, Any]:
    times, done = timed
    say(
        f"  {shape}, {rows} rows, {threads} threads, {residence}: {done['rounds']} rounds, "
        f"{done['clean_turns']:.0%} of turns clean"
    )
    return {
        "shape": shape,
        "rows": rows,
        "threads": threads,
        "residence": residence,
        "load_average": round(os.getloadavg()[0], 2),
        **done,
        "time_us": timing.summarise(times),
    }


def run_timing(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """Cells of every shape with this process's number of threads; what a quick gate finds red."""
    budget = timing.Budget(plan.rounds, plan.seconds, plan.reuse_mb << 20, plan.copies_mb << 20)
    cells: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    read: Read | None = None
    facts: dict[str, Any] = {}
    bandwidth = 10e9
    if plan.memory_rows:
        read, speeds = fastest_read(plan.threads)
        bandwidth = max(speeds.values())
        facts["plain_read_streams"] = {str(k): round(v / 1e9, 2) for k, v in speeds.items()}
    for shape in plan.shapes:
        name = shape_name(shape)
        line = line_up(shape, plan)
        crossover = plan.crossover.get(name, [])
        rows = sorted({*plan.rows, *plan.memory_rows, *crossover})
        x = make_activations(max(rows), shape[1])
        red = gate.failures(check(line, x, rows, [plan.threads], everything=False))
        if red:
            return {}, [f"{name}: {text}" for text in red]
        everyone = line.everyone()
        for count in crossover:
            timed = timing.time_in_cache(line.ours, x[:count], budget)
            curves.append(_cell(name, count, plan.threads, "cache", timed))
        for count in plan.rows:
            timed = timing.time_in_cache(everyone, x[:count], budget)
            compared = timing.compare(timed[0], everyone)
            cells.append(
                _cell(name, count, plan.threads, "cache", timed) | {"faster_than": compared}
            )
        if plan.memory_rows and read is not None:
            sizes = {c.bits: c.bytes_read for c in line.ours}
            reads = [read_contender(read, width, sizes[width]) for width in sorted(sizes)]
            for count in plan.memory_rows:
                timed = timing.time_from_memory([*everyone, *reads], x[:count], budget, bandwidth)
                if timed[1]["reuse_mb"] * 1e6 < budget.reuse_bytes:
                    say(f"  only {timed[1]['reuse_mb']} MB are read between uses (--copies-mb)")
                compared = timing.compare(timed[0], [*everyone, *reads])
                cells.append(
                    _cell(name, count, plan.threads, "memory", timed) | {"faster_than": compared}
                )
            del reads
        del line, everyone
        gc.collect()
    return {"cells": cells, "crossover": curves, **facts}, []


def choose_isa(isa: str) -> None:
    """Let our kernels use this instruction set.

    Raises:
        UnavailableError: it is unknown, or not offered here.
    """
    try:
        select_isa(isa)
    except (ValueError, RuntimeError) as error:
        raise UnavailableError(str(error)) from error


def main() -> int:
    """Run the plan; 0, or 1 or `GATE_RED` after the reason."""
    fields = json.loads(sys.argv[1])
    plan = Plan(**fields | {"shapes": [tuple(shape) for shape in fields["shapes"]]})
    torch.set_num_threads(plan.threads)
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # vLLM's int8 kernels use tiles without asking Linux for them
    load_native()
    try:
        if plan.isa is not None:
            choose_isa(plan.isa)
        results, red = run_gate(plan) if plan.gate else run_timing(plan)
    except UnavailableError as error:
        results, red = {}, [str(error)]
    except timing.BudgetError as error:
        say(f"error: {error}")
        return 1
    if torch.get_num_threads() != plan.threads:
        red.append(f"{plan.threads} threads were set, but torch now has {torch.get_num_threads()}")
    for text in red:
        say(f"RED {text}")
    if red:
        return GATE_RED
    status = native_status()
    native = {"isa": status.isa, "reason": status.reason}
    Path(plan.out).write_text(json.dumps(results | {"native": native}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
