# SPDX-License-Identifier: Apache-2.0
"""Our linear kernels at each width beside torch, vLLM's CPU kernels and ARK.

    python -m benchmarks.kernels.run --device cpu [--quick] [--shapes NxK ...] [--rows N ...]

First the gate: every kernel that will be timed, at every shape and number of rows; if one is
wrong, the run ends with status 1 and writes nothing. Then the times, interleaved: in each cell
(shape, rows, threads, weights in cache or from memory) all kernels run in turn, round after round,
and a ratio is the median of the rounds' ratios. Activations are bf16 (fp32 for torch's fp32).
The plot shows one row; the table at the end says which of the figures to reach are met.

From memory: each call takes another copy of the weights. All kernels of a cell take turns, and a
copy comes back only after `--memory-mb` of other weights have been read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.kernels import report
from benchmarks.kernels.command_line import shape
from benchmarks.kernels.plot import plot_results
from benchmarks.kernels.targets import judge
from benchmarks.kernels.worker import GATE_RED, Plan, say, shape_name
from benchmarks.provenance import ROOT, provenance, write_json
from vllm_flexquant.format.layout import PlaneLayout

SHAPES = [(1536, 576), (4096, 4096), (14336, 4096), (49152, 576)]
"""N x K: two layers of small models, one of a 7B model, and the output layer of a small one."""

QUICK_SHAPES = SHAPES[:2]
ROWS = [1, 2, 4, 8, 16, 64, 256]
QUICK_ROWS = [1, 16]
MEMORY_ROWS = [1, 2, 4, 8, 16]
CROSSOVER_SHAPES = [(1536, 576), (4096, 4096)]
CROSSOVER_ROWS = list(range(1, 17))
LAYOUTS = ["4|2|2", "2|1|1|2|2", "2|2|4"]
BASELINES = ["torch", "vllm", "ark"]
COPIES_MB = 9216
RESULTS = Path("benchmarks", "results", "kernels-cpu.json")
PART = Path("benchmarks", "out", "kernels-cpu.json")
HEAP_KEPT = 1 << 32
LARGEST_HEAP_BLOCK = 32 << 20


class RunError(RuntimeError):
    """A run that cannot be completed; the message is for the user."""


def layout(text: str) -> str:
    """A layout, checked."""
    try:
        return str(PlaneLayout.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def available_mb() -> int:
    """Memory that processes can still take without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) >> 10
    raise RunError("/proc/meminfo does not say how much memory is available")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, defaults filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="about two minutes: less of all")
    parser.add_argument("--only", choices=["speed", "crossover"], help="one part, not both")
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="NxK")
    parser.add_argument("--rows", type=int, nargs="+", metavar="N", help="in cache")
    parser.add_argument(
        "--memory-rows", type=int, nargs="*", metavar="N", help="from memory; none: not measured"
    )
    parser.add_argument("--threads", type=int, nargs="+", metavar="N")
    parser.add_argument("--layouts", type=layout, nargs="+", metavar="LAYOUT")
    parser.add_argument("--baselines", choices=BASELINES, nargs="*", default=BASELINES)
    parser.add_argument("--group-size", type=int, choices=[32, 64, 128], default=64)
    parser.add_argument("--isa", help="instruction set that ours is to use, not the best there is")
    parser.add_argument("--rounds", type=int, help="of a cell, at most")
    parser.add_argument("--seconds", type=float, help="of a cell, about")
    parser.add_argument(
        "--memory-mb", type=int, default=1024, help="read between two uses of one copy"
    )
    parser.add_argument("--copies-mb", type=int, help="memory for copies of weights, at most")
    parser.add_argument(
        "--out", type=Path, help=f"JSON; the plot beside it (default: {RESULTS}, of a part {PART})"
    )
    parser.add_argument("--no-plot", action="store_true")
    chosen = parser.parse_args(arguments)
    quick = chosen.quick
    cpus = len(os.sched_getaffinity(0))
    defaults: dict[str, Any] = {
        "shapes": QUICK_SHAPES if quick else SHAPES,
        "rows": QUICK_ROWS if quick else ROWS,
        "memory_rows": QUICK_ROWS if quick else MEMORY_ROWS,
        "threads": [count for count in (1, 2) if count <= cpus],
        "layouts": LAYOUTS[:1] if quick else LAYOUTS,
        "rounds": 9 if quick else 25,
        "seconds": 1.0 if quick else 4.0,
        "copies_mb": min(COPIES_MB, available_mb() // 2),
        "out": ROOT / (PART if quick or chosen.only else RESULTS),
    }
    for name, value in defaults.items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    for name in ("rows", "memory_rows", "threads"):
        if any(count < 1 for count in getattr(chosen, name)):
            parser.error(f"--{name.replace('_', '-')}: give numbers from 1 up")
    if max(chosen.threads) > cpus:
        parser.error(f"--threads {max(chosen.threads)}: this process may use {cpus} CPUs")
    return chosen


def make_plan(chosen: argparse.Namespace, threads: int, gate: bool, out: Path) -> Plan:
    """What one worker does."""
    speed = chosen.only != "crossover"
    crossover: list[tuple[int, int]] = []
    if chosen.only == "crossover" or (chosen.only is None and not chosen.quick):
        crossover = [one for one in CROSSOVER_SHAPES if one in chosen.shapes]
    shapes = chosen.shapes if speed else crossover
    return Plan(
        gate=gate,
        shapes=shapes,
        rows=chosen.rows if speed else [],
        memory_rows=chosen.memory_rows if speed else [],
        crossover={shape_name(one): CROSSOVER_ROWS for one in crossover},
        layouts=chosen.layouts,
        baselines=chosen.baselines if speed else [],
        threads=threads,
        gate_threads=chosen.threads,
        group_size=chosen.group_size,
        isa=chosen.isa,
        rounds=chosen.rounds,
        seconds=chosen.seconds,
        reuse_mb=chosen.memory_mb,
        copies_mb=chosen.copies_mb,
        out=str(out),
    )


def worker_environment(threads: int) -> dict[str, str]:
    """Environment of a worker.

    Threads are bound to CPUs as vLLM (0.32) does it when they take all there are; fewer are left
    to the system, which knows on a shared machine which CPUs are idle.

    Outputs of up to 32 MB come from memory that the process already has, as with the allocator
    that vLLM recommends; else every large output would be page faults, and none of it the kernel.
    """
    chosen = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_MMAP_THRESHOLD_": str(LARGEST_HEAP_BLOCK),
        "MALLOC_TRIM_THRESHOLD_": str(HEAP_KEPT),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }
    cpus = sorted(os.sched_getaffinity(0))
    if threads == len(cpus):
        chosen["GOMP_CPU_AFFINITY"] = " ".join(map(str, cpus))
    return chosen


def run_worker(plan: Plan) -> dict[str, Any] | None:
    """Results of one worker process; None when its gate is red."""
    command = [sys.executable, "-m", "benchmarks.kernels.worker", json.dumps(asdict(plan))]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=worker_environment(plan.threads),
        stdout=2,  # standard output is for the tables
        check=False,
    )
    if done.returncode == GATE_RED:
        return None
    if done.returncode:
        raise RunError(f"a worker ended with status {done.returncode}; its last lines are above")
    results: dict[str, Any] = json.loads(Path(plan.out).read_text(encoding="utf-8"))
    return results


def measure(chosen: argparse.Namespace) -> dict[str, Any] | None:
    """All results, as they are written; None when a gate is red."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        gates = run_worker(make_plan(chosen, max(chosen.threads), True, out))
        if gates is None:
            return None
        native = gates.pop("native")
        cells: list[dict[str, Any]] = []
        curves: list[dict[str, Any]] = []
        streams: dict[str, Any] = {}
        for threads in chosen.threads:
            say(f"times with {threads} thread{'s' * (threads > 1)}")
            found = run_worker(make_plan(chosen, threads, False, out))
            if found is None:
                return None
            cells += found["cells"]
            curves += found["crossover"]
            streams[str(threads)] = found.get("plain_read_streams")
    try:
        ark = version("auto-round-lib")
    except PackageNotFoundError:
        ark = None
    return {
        "device": chosen.device,
        "native": native,
        "activations": "bf16",
        "auto-round-lib": ark,
        "settings": {
            "layouts": chosen.layouts,
            "group_size": chosen.group_size,
            "rounds": chosen.rounds,
            "seconds_per_cell": chosen.seconds,
            "memory_mb": chosen.memory_mb,
            "copies_mb": chosen.copies_mb,
        },
        "plain_read_gb_per_s_by_streams": streams,
        "gate": gates,
        "targets": judge(cells, chosen.layouts),
        "cells": cells,
        "crossover": curves,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, plot and print; 1 when a kernel is wrong."""
    chosen = parse(arguments)
    facts = provenance()
    try:
        results = measure(chosen)
    except RunError as error:
        say(f"error: {error}")
        return 1
    if results is None:
        say("the gate is red: no speed is reported, nothing is written")
        return 1
    write_json(chosen.out, results, facts)
    say(f"written: {chosen.out}")
    if not chosen.no_plot:
        picture = chosen.out.with_suffix(".png")
        title = f"linear [N, K] on {facts['machine']['cpu']}, {results['native']['isa']}"
        if plot_results(results["cells"], chosen.layouts, picture, title):
            say(f"written: {picture}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(report.error_table(results["gate"]))
    for table in report.speed_tables(results["cells"]):
        console.print(table)
    if results["crossover"]:
        console.print(report.crossover_table(results["crossover"], chosen.layouts))
    if results["cells"]:
        console.print(report.target_table(results["targets"]))
    if warning := report.caution([*results["cells"], *results["crossover"]]):
        say(warning)
    return 0
