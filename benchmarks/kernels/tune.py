# SPDX-License-Identifier: Apache-2.0
"""Make the table of launches of a GPU's family, on that GPU.

    python -m benchmarks.kernels.tune [--quick] [--shapes NxK ...] [--layouts LAYOUT ...]

For each layout, shape and bucket of rows, every launch that fits is checked against the reference
and timed at every width, weights coming from memory; the one whose times are on average the least
above the best of each width is written, since one launch serves all widths. Then the rows from
which dequantizing first is faster at all bits. The table belongs to the package
(`flexquant_kernels/triton/tuned`); nothing is ever tuned inside an engine. Needs a GPU with torch
and Triton, and nothing else. Untested: no table has been made so far.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import command_line, gpu_timing
from benchmarks.kernels.command_line import layout_name
from benchmarks.kernels.gpu_layers import ERROR, GROUP_SIZE, NestedLayer, activations, make_layer
from benchmarks.provenance import provenance

SHAPES = {
    "Qwen2.5-0.5B": [(1152, 896), (896, 896), (9728, 896), (896, 4864), (151936, 896)],
    "Llama-3-8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)],
    "Llama-3-70B on 8 ranks": [(1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584)],
}
"""N x K of the linear layers, as vLLM fuses them."""

LAYOUTS = [(4, 2, 2), (2, 2, 4), (2, 1, 1, 2, 2)]
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
WARPS = (2, 4, 8)
STAGES = (1, 2, 3)
QUICK_WARPS = (2, 4)
QUICK_STAGES = (2,)
QUICK_ROWS = (1, 8, 16, 64)
THRESHOLD_ROWS = (64, 96, 128, 192, 256, 384, 512, 768, 1024)

Measure = Callable[[NestedLayer, int, Any], Mapping[int, float]]
"""Seconds at each width of a layer on so many rows, launched so; empty where that is wrong."""


def launches(rows: int, k: int, target: str, quick: bool = False) -> Iterator[Any]:
    """Every launch that is worth a try."""
    from flexquant_kernels.triton import tuning

    blocks = tuning.row_blocks(target)
    enough = next((b for b in blocks if b >= rows), blocks[-1])
    for block in (b for b in blocks if b <= enough):
        for splits in (s for s in SPLITS if s <= tuning.most_splits(rows, k)):
            for warps in QUICK_WARPS if quick else WARPS:
                for stages in QUICK_STAGES if quick else STAGES:
                    yield tuning.Launch(block, splits, warps, stages)


def best(times: Mapping[Any, Mapping[int, float]]) -> Any:
    """The launch whose times are on average the least above the best of each width, if any."""
    right = {launch: found for launch, found in times.items() if found}
    if not right:
        return None
    widths = next(iter(right.values())).keys()
    least = {width: min(found[width] for found in right.values()) for width in widths}
    return min(right, key=lambda launch: sum(right[launch][w] / least[w] for w in widths))


def threshold(times: Mapping[int, tuple[float, float]]) -> int:
    """Rows up to which the fused kernel is to run, from seconds (fused, dequantized) by rows.

    The most rows before the first at which it is slower.
    """
    rows = sorted(times)
    slower = next((i for i, count in enumerate(rows) if times[count][0] > times[count][1]), None)
    if slower is None:
        return rows[-1]
    return rows[slower - 1] if slower else max(1, rows[0] - 1)


def measured(layer: NestedLayer, rows: int, launch: Any) -> dict[int, float]:
    """`Measure` on the GPU of the layer; a launch that it cannot have counts as wrong."""
    from flexquant_kernels.triton import linear

    device = layer.scales.device
    x = activations(rows, layer.k, torch.bfloat16, device)
    found: dict[int, float] = {}
    for width in layer.widths:
        bits = torch.tensor([width], dtype=torch.int32, device=device)
        copies = layer.copies(gpu_timing.copies_for_cold_cache(layer.bytes_read(width), device))

        def call(weight: Any, bits: torch.Tensor = bits) -> Callable[[], object]:
            return lambda: linear(x, weight, bits, launch=launch)

        try:
            got = linear(x, layer.weight, bits, launch=launch)
        except RuntimeError as error:  # too many registers, or too much shared memory
            print(f"  {launch}: {error}", file=sys.stderr)
            return {}
        if not layer.error(got, x, width) <= ERROR[x.dtype]:
            print(f"  {launch} is wrong at {width} bit", file=sys.stderr)
            return {}
        found[width] = gpu_timing.seconds([call(weight) for weight in copies], device)
    return found


def entries(
    shapes: Sequence[tuple[int, int]],
    layouts: Sequence[tuple[int, ...]],
    target: str,
    make: Callable[[int, int, tuple[int, ...]], NestedLayer],
    measure: Measure,
    quick: bool = False,
) -> Iterator[dict[str, Any]]:
    """Entries of the table, one for each layout, shape and bucket of rows that K is split for."""
    from flexquant_kernels.triton import tuning

    for layout in layouts:
        for n, k in shapes:
            layer = make(n, k, layout)
            split = tuple(rows for rows in tuning.BUCKETS if rows <= tuning.MAX_SPLIT_ROWS)
            for rows in QUICK_ROWS if quick else split:
                tried = launches(rows, k, target, quick)
                times = {one: measure(layer, rows, one) for one in tried}
                chosen = best(times)
                if chosen is None:
                    raise RuntimeError(f"no launch is right for {n}x{k}, {rows} rows, {layout}")
                yield {
                    "layout": layout_name(layout), "n": n, "k": k, "rows": rows,
                    **asdict(chosen),
                    "us": {str(w): round(s * 1e6, 2) for w, s in times[chosen].items()},
                }  # fmt: skip


def threshold_times(
    shapes: Sequence[tuple[int, int]], device: torch.device
) -> dict[int, tuple[float, float]]:
    """Seconds of all shapes at all bits, (fused, dequantized first), by rows."""
    from flexquant_kernels.gpu import processors, target_of
    from flexquant_kernels.triton import linear, tuning
    from flexquant_kernels.triton.linear import dequantized_linear

    found: dict[int, tuple[float, float]] = {}
    width = torch.tensor([8], dtype=torch.int32, device=device)
    for rows in THRESHOLD_ROWS:
        fused = plain = 0.0
        for n, k in shapes:
            layer = make_layer(n, k, LAYOUTS[0], device)
            x = activations(rows, k, torch.bfloat16, device)
            launch = tuning.heuristic(rows, n, k, target_of(device), processors(device))

            def call_fused(
                x: torch.Tensor = x, layer: NestedLayer = layer, launch: Any = launch
            ) -> object:
                return linear(x, layer.weight, width, launch=launch)

            out = torch.empty(rows, n, dtype=x.dtype, device=device)

            def call_plain(
                x: torch.Tensor = x, layer: NestedLayer = layer, out: torch.Tensor = out
            ) -> None:
                dequantized_linear(x, layer.weight, width, None, out)

            fused += gpu_timing.seconds([call_fused], device)
            plain += gpu_timing.seconds([call_plain], device)
        found[rows] = (fused, plain)
    return found


def shape(text: str) -> tuple[int, int]:
    """`4096x4096` -> `(4096, 4096)`, K in whole groups."""
    return command_line.shape(text, GROUP_SIZE)


def layout(text: str) -> tuple[int, ...]:
    """`4|2|2` -> `(4, 2, 2)`, if it has a kernel."""
    known = {layout_name(one): one for one in LAYOUTS}
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r} has no kernel; use {', '.join(known)}")
    return known[text]


def main(arguments: list[str] | None = None) -> int:
    """Tune and write; 1 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="4|2|2, Llama-3-8B, fewer launches")
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="NxK")
    parser.add_argument("--layouts", type=layout, nargs="+", metavar="LAYOUT")
    parser.add_argument("--out", type=Path, help="default: the family's table in the package")
    chosen = parser.parse_args(arguments)
    every = [one for shapes in SHAPES.values() for one in shapes]
    shapes = chosen.shapes or (SHAPES["Llama-3-8B"] if chosen.quick else every)
    layouts = chosen.layouts or LAYOUTS[: 1 if chosen.quick else None]
    try:
        device = gpu_timing.find_gpu("tuning")
    except gpu_timing.NoGpuError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from flexquant_kernels.gpu import target_of
    from flexquant_kernels.triton import tuning

    target = target_of(device)
    made = []
    for entry in entries(
        shapes,
        layouts,
        target,
        lambda n, k, planes: make_layer(n, k, planes, device),
        measured,
        chosen.quick,
    ):
        made.append(entry)
        print(json.dumps(entry), flush=True)
    times = threshold_times(shapes, device)
    out = chosen.out or tuning.FOLDER / f"{target}.json"
    write_table(out, target, made, times, torch.cuda.get_device_name(device))
    print(f"written: {out}")
    return 0


def write_table(
    out: Path,
    target: str,
    made: Sequence[dict[str, Any]],
    times: Mapping[int, tuple[float, float]],
    device_name: str,
) -> None:
    """Write a table, and read it as an engine would."""
    from flexquant_kernels.triton import tuning

    whole = {
        "format": tuning.FORMAT,
        "target": target,
        "dequantize_above": threshold(times),
        "provenance": provenance() | {"gpu": device_name},
        "seconds_fused_and_dequantized": {str(rows): pair for rows, pair in times.items()},
        "entries": list(made),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    tuning.read_table(out)


if __name__ == "__main__":
    sys.exit(main())
