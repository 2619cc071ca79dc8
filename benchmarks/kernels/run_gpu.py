# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels on a GPU, beside others: the gate first, then times, then figures to reach.

    python -m benchmarks.kernels.run --device cuda [--quick] [--shapes NxK ...] [--rows N ...]
    python -m benchmarks.kernels.run --device cpu --interpret --quick
    ncu --set full python -m benchmarks.kernels.run --device cuda --profile 14336x4096

Needs torch, triton and numpy alone, and no network; where the packages are not installed, with
`PYTHONPATH=kernels`. If a kernel is wrong at any shape, width or number of rows, the run ends with
status 1 and writes nothing. A baseline (torch's bf16 and int4, gemlite, vLLM's Marlin) that is
wrong or cannot run is left out, and the results say why. Times are of CUDA graph replays whose
calls take turns on copies, so that weights come from memory (`gpu_timing.py`). Interpreted, all of
it runs on a small layer, and times mean nothing. Untested on GPUs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import gpu_baselines, gpu_libraries, gpu_timing
from benchmarks.kernels.command_line import layout_name
from benchmarks.kernels.gpu_baselines import Baseline, UnavailableError
from benchmarks.kernels.gpu_layers import (
    DEQUANTIZED_ERROR,
    ERROR,
    NestedLayer,
    activations,
    make_layer,
)
from benchmarks.kernels.gpu_plot import plot
from benchmarks.kernels.gpu_targets import judge
from benchmarks.kernels.tune import LAYOUTS, SHAPES, layout, shape
from benchmarks.provenance import ROOT, provenance, write_json
from flexquant_kernels import reference

ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024]
GATE_ROWS = [1, 3, 8, 17, 64, 70, 300]
QUICK_SHAPES = [(4096, 4096), (14336, 4096)]
INTERPRETED_SHAPE = (96, 256)
LOGITS = (64, 128256)
BASELINE_ERROR = 2e-2
BASELINE_ROWS = (1, 5, 70)
"""Rows of x that a baseline is checked at, before it is timed: it may have a kernel for each."""

BASELINES: dict[str, Callable[[int, int, torch.device], Baseline]] = {
    "torch bf16": gpu_baselines.cublas,
    "torch int4 g128": gpu_baselines.torch_int4,
    "gemlite W4A16 g64": lambda n, k, device: gpu_libraries.gemlite(n, k, 4, device),
    "gemlite W8A16 g64": lambda n, k, device: gpu_libraries.gemlite(n, k, 8, device),
    "Marlin W4A16 g64": lambda n, k, device: gpu_libraries.marlin(n, k, 4, device),
    "Marlin W8A16 g64": lambda n, k, device: gpu_libraries.marlin(n, k, 8, device),
}
RESULTS = Path("benchmarks", "results", "kernels-gpu.json")
PART = Path("benchmarks", "out", "kernels-gpu.json")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line, defaults filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--interpret", action="store_true", help="on the CPU, a small layer")
    parser.add_argument("--quick", action="store_true", help="less of all")
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="NxK")
    parser.add_argument("--rows", type=int, nargs="+", metavar="N")
    parser.add_argument("--layouts", type=layout, nargs="+", metavar="LAYOUT")
    parser.add_argument("--profile", type=shape, metavar="NxK", help="each kernel once, no times")
    parser.add_argument("--out", type=Path, help=f"JSON (default: {RESULTS}, of a part {PART})")
    chosen = parser.parse_args(arguments)
    whole = not (chosen.quick or chosen.interpret or chosen.shapes or chosen.rows)
    every = list(dict.fromkeys(one for shapes in SHAPES.values() for one in shapes))
    shapes = [INTERPRETED_SHAPE] if chosen.interpret else QUICK_SHAPES if chosen.quick else every
    chosen.shapes = chosen.shapes or shapes
    chosen.rows = chosen.rows or ([1, 9] if chosen.interpret else ROWS)
    chosen.gate_rows = [1, 17, 300] if chosen.interpret else GATE_ROWS
    chosen.layouts = chosen.layouts or (LAYOUTS[:1] if chosen.quick else LAYOUTS)
    chosen.out = chosen.out or ROOT / (RESULTS if whole else PART)
    return chosen


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def gate(layer: NestedLayer, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Our kernel at each width against the reference, in both dtypes."""
    from flexquant_kernels.triton import linear
    from flexquant_kernels.triton.linear import choose_launch

    checks = []
    device = layer.scales.device
    for width in layer.widths:
        bits = torch.tensor([width], dtype=torch.int32, device=device)
        for count in rows:
            for dtype in (torch.bfloat16, torch.float16):
                x = activations(count, layer.k, dtype, device)
                error = layer.error(linear(x, layer.weight, bits), x, width)
                fused = choose_launch(count, layer.weight) is not None
                bound = (ERROR if fused else DEQUANTIZED_ERROR)[dtype]
                checks.append(
                    {
                        "layout": layout_name(layer.layout),
                        "shape": f"{layer.n}x{layer.k}",
                        "width": width,
                        "rows": count,
                        "dtype": str(dtype).removeprefix("torch."),
                        "error": error,
                        "passed": error <= bound,
                    }
                )
    return checks


def gate_entropy(device: torch.device, rows: int, vocabulary: int) -> dict[str, Any]:
    """The entropy kernel against the reference in fp32."""
    from flexquant_kernels.triton import entropy

    logits = activations(rows, vocabulary, torch.float32, device) * 3
    error = float((entropy(logits) - reference.entropy(logits)).abs().max())
    return {"kernel": "entropy", "rows": rows, "error": error, "passed": error <= 1e-4}


def time_layer(layer: NestedLayer, rows: int) -> dict[str, float]:
    """Seconds by width, of weights from memory; and `alternating` between lowest and highest."""
    from flexquant_kernels.triton import linear

    device = layer.scales.device
    x = activations(rows, layer.k, torch.bfloat16, device)
    table = torch.tensor(layer.widths, dtype=torch.int32, device=device)
    least = layer.bytes_read(layer.widths[0])
    weights = layer.copies(gpu_timing.copies_for_cold_cache(least, device))

    def call(weight: Any, entry: int) -> Callable[[], object]:
        return lambda: linear(x, weight, table[entry : entry + 1])

    found = {
        str(width): gpu_timing.seconds([call(one, i) for one in weights], device)
        for i, width in enumerate(layer.widths)
    }
    even = weights[: len(weights) // 2 * 2] or weights * 2
    both = [call(one, i % 2 * (len(layer.widths) - 1)) for i, one in enumerate(even)]
    return found | {"alternating": gpu_timing.seconds(both, device)}


def faults() -> tuple[type[Exception], ...]:
    """What other people's kernels raise for what they cannot do."""
    from triton.errors import TritonError

    return (
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        TritonError,
    )


def reason(error: Exception) -> str:
    """One line of an error."""
    return (str(error).splitlines() or [repr(error)])[0]


def find_baselines(n: int, k: int, device: torch.device) -> tuple[list[Baseline], dict[str, str]]:
    """Those of a shape that are right; why the others are not there, by name."""
    found, missing = [], {}
    for name, make in BASELINES.items():
        try:
            baseline = make(n, k, device)
            errors = [
                gpu_baselines.error_of(baseline, activations(rows, k, torch.bfloat16, device))
                for rows in BASELINE_ROWS
            ]
        except UnavailableError as error:
            missing[name] = str(error)
            continue
        except faults() as error:
            missing[name] = f"it failed: {reason(error)}"
            continue
        wrong = [
            f"wrong by {error:.3g} at {rows} rows"
            for rows, error in zip(BASELINE_ROWS, errors, strict=True)
            if not error <= BASELINE_ERROR
        ]
        if wrong:
            missing[name] = ", ".join(wrong)
        else:
            found.append(baseline)
    for name, why in missing.items():
        say(f"without {name} at {n}x{k}: {why}")
    return found, missing


def time_baseline(baseline: Baseline, k: int, rows: int, device: torch.device) -> float:
    """Seconds, of weights from memory."""
    x = activations(rows, k, torch.bfloat16, device)
    count = gpu_timing.copies_for_cold_cache(baseline.bytes_read, device)
    calls = [baseline.make() for _ in range(count)]

    def bound(call: gpu_baselines.Call) -> Callable[[], object]:
        return lambda: call(x)

    return gpu_timing.seconds([bound(call) for call in calls], device)


def time_baselines(
    baselines: Sequence[Baseline], k: int, rows: int, device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds by name; and why one could not be timed, as in a graph."""
    times, missing = {}, {}
    for one in baselines:
        try:
            times[one.name] = time_baseline(one, k, rows, device)
        except faults() as error:
            missing[one.name] = f"it failed: {reason(error)}"
            say(f"without {one.name} for {rows} rows: {missing[one.name]}")
    return times, missing


def time_step(device: torch.device, rows: int, vocabulary: int) -> float:
    """Seconds of entropy and decision together."""
    from flexquant_kernels.triton import Rules, decide, make_state, track_entropy

    layers, levels = 128, 256
    ladder = torch.full((levels, layers), 8, dtype=torch.int32, device=device)
    allowed = torch.tensor([[4] * 5 + [6, 6, 8, 8]] * layers, dtype=torch.int32, device=device)
    average = torch.zeros(rows + 1, device=device)
    seen = torch.zeros(rows + 1, dtype=torch.bool, device=device)
    table = torch.full((layers,), 8, dtype=torch.int32, device=device)
    state = make_state(ladder, allowed, average, seen, table, rows)
    state.adopt(Rules(False, 0.5, 2.5, 0.05, 1, "mean", 0.9, 2, 8, True))
    state.announce(range(rows), [False] * rows, [0] * rows)
    slots = torch.arange(rows, device=device)
    logits = activations(rows, vocabulary, torch.float32, device)

    def call() -> None:
        track_entropy(logits, slots, average, seen, 0.5)
        decide(state)

    return gpu_timing.seconds([call], device)


def profile(n: int, k: int, layouts: Sequence[tuple[int, ...]], device: torch.device) -> None:
    """Each kernel once at each width and at few and many rows, for a profiler."""
    from flexquant_kernels.triton import linear

    for one in layouts:
        layer = make_layer(n, k, one, device)
        for rows in (1, 16, 64, 1024):
            x = activations(rows, k, torch.bfloat16, device)
            for width in layer.widths:
                linear(x, layer.weight, torch.tensor([width], dtype=torch.int32, device=device))
    time_step(device, 2, 9000) if device.type == "cpu" else time_step(device, *LOGITS)


def time_shape(
    n: int, k: int, chosen: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Cells of a shape, one for each number of rows."""
    layers = {layout_name(one): make_layer(n, k, one, device) for one in chosen.layouts}
    baselines, missing = find_baselines(n, k, device)
    for rows in chosen.rows:
        say(f"times: {n}x{k}, {rows} rows")
        seconds, untimed = time_baselines(baselines, k, rows, device)
        yield {
            "shape": f"{n}x{k}",
            "n": n,
            "k": k,
            "rows": rows,
            "seconds": {name: time_layer(layer, rows) for name, layer in layers.items()},
            "bytes_read": {
                name: {str(width): layer.bytes_read(width) for width in layer.widths}
                for name, layer in layers.items()
            },
            "baselines": seconds,
            "unavailable": missing | untimed,
        }


def measure(chosen: argparse.Namespace, device: torch.device) -> dict[str, Any] | None:
    """All results, as they are written; None when the gate is red."""
    on_gpu = device.type == "cuda"
    rows, vocabulary = LOGITS if on_gpu else (3, 9000)
    checks = [gate_entropy(device, rows, vocabulary)]
    for n, k in chosen.shapes:
        for one in chosen.layouts:
            say(f"gate: {n}x{k}, {layout_name(one)}")
            checks += gate(make_layer(n, k, one, device), chosen.gate_rows)
    red = [check for check in checks if not check["passed"]]
    for check in red:
        say(f"RED {check}")
    if red:
        return None
    cells = [cell for n, k in chosen.shapes for cell in time_shape(n, k, chosen, device)]
    results = {
        "interpreted": not on_gpu,
        "copy_bytes_per_s": gpu_timing.copy_bandwidth(device, 1 << (30 if on_gpu else 20)),
        "entropy_and_decision_seconds": time_step(device, rows, vocabulary),
        "gate": checks,
        "cells": cells,
    }
    return results | {"targets": judge(results) if on_gpu else []}


def main(arguments: list[str]) -> int:
    """Measure, write and print; 1 when a kernel is wrong or there is no GPU."""
    chosen = parse(arguments)
    if chosen.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
        device = torch.device("cpu")
    else:
        try:
            device = gpu_timing.find_gpu("--device cuda")
        except gpu_timing.NoGpuError as error:
            say(f"error: {error}, or add --interpret")
            return 1
    if chosen.profile:
        n, k = chosen.profile
        profile(n, k, chosen.layouts, device)
        return 0
    facts = provenance()
    if device.type == "cuda":
        import triton

        name = torch.cuda.get_device_name(device)
        facts["gpu"] = {"name": name, "torch": torch.__version__, "triton": triton.__version__}
    results = measure(chosen, device)
    if results is None:
        say("the gate is red: no speed is reported, nothing is written")
        return 1
    write_json(chosen.out, results, facts)
    say(f"written: {chosen.out}")
    if results["interpreted"]:
        print(f"{len(results['gate'])} checks passed, interpreted: times mean nothing")
        return 0
    picture = chosen.out.with_suffix(".png")
    if plot(results["cells"], picture, f"linear [N, K], bf16, on {facts['gpu']['name']}"):
        say(f"written: {picture}")
    for cell in results["cells"]:
        times = {
            f"{one} at {width}": seconds
            for one, found in cell["seconds"].items()
            for width, seconds in found.items()
        } | cell["baselines"]
        text = "  ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in times.items())
        print(f"{cell['shape']:14s} {cell['rows']:5d} rows, us: {text}")
    for target in results["targets"]:
        print(f"{target['target']}: {target['text']}")
    return 0
