# SPDX-License-Identifier: Apache-2.0
"""What a GPU allows: bytes to move against bytes moved, and the time that either limit leaves.

    python -m benchmarks.kernels.roofline [--gpu H200] [--layout 4|2|2] [--rows N ...]

A model, not a measurement. A kernel takes at least as long as its bytes take to come from memory,
as its instructions take to issue, and as its products take in the tensor cores; it is as fast as
the largest of these only if they overlap wholly. Bytes follow from shapes and launch (a test counts
them in the interpreter), instructions from the table of what was compiled (`triton-aot.json`):
each takes an issue slot, and shifts and logic of integers, which run at half the rate, two of the
slots of their own pipe. Also printed: the rows from which dequantizing first should pay.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.kernels.aot import RESULTS
from benchmarks.provenance import ROOT
from flexquant_kernels import layout_widths
from vllm_flexquant.format.layout import PlaneLayout

TRITON = "3.7.1"
GROUP = 64
HALF_RATE = ("LOP3", "SHF", "PRMT", "IADD3")
SHAPES = {
    "qkv 8B": (6144, 4096),
    "o 8B": (4096, 4096),
    "gate_up 8B": (28672, 4096),
    "down 8B": (4096, 14336),
    "lm_head 8B": (128256, 4096),
}
"""N x K."""


@dataclass(frozen=True)
class Gpu:
    """bandwidth in bytes/s, products in multiply-adds/s of bf16, slots: instructions of one
    thread issued in a second."""

    target: str
    bandwidth: float
    products: float
    slots: float


GPUS = {
    # bandwidth and products as a copy and cuBLAS reached them on one; the others by data sheets
    "H200": Gpu("sm_90", 4.3e12, 394e12, 132 * 128 * 1.98e9),
    "A100": Gpu("sm_80", 2.0e12, 156e12, 108 * 128 * 1.41e9),
    "L40S": Gpu("sm_89", 0.86e12, 181e12, 142 * 128 * 2.52e9),
    "B200": Gpu("sm_100", 7.7e12, 1125e12, 148 * 128 * 1.97e9),
    "RTX 5090": Gpu("sm_120", 1.79e12, 105e12, 170 * 128 * 2.41e9),
}


@dataclass(frozen=True)
class Traffic:
    """Bytes of one launch.

    must: that any kernel has to move. memory: that ours moves to and from memory if what programs
    share comes from a cache. loads, stores: that its programs ask for, from wherever they come.
    """

    must: int
    memory: int
    loads: int
    stores: int


def _weight_bytes(n: int, k: int, width: int, group_size: int) -> tuple[int, int]:
    """(any kernel's, ours): planes and scales of a weight at a width, without and with padding."""
    from flexquant_kernels.triton.layout import padded

    plain, ours = (
        rows * columns * width // 8 + rows * (columns // group_size) * 4
        for rows, columns in ((n, k), padded(n, k))
    )
    return plain, ours


def linear(
    n: int, k: int, rows: int, width: int, group_size: int, block: int, splits: int
) -> Traffic:
    """The fused kernel on rows x K of 16-bit numbers, without bias, launched as `Launch` says."""
    from flexquant_kernels.triton.layout import BLOCK_K, PAD_ROWS, padded

    n_pad = padded(n, k)[0]
    tiles, row_blocks = n_pad // PAD_ROWS, -(-rows // block)
    programs = tiles * row_blocks * splits
    plain, weight = _weight_bytes(n, k, width, group_size)
    x, out = rows * k * 2, rows * n * 2
    partial = splits * rows * n_pad * 4 if splits > 1 else 0
    once_more = n_pad * (BLOCK_K // group_size) * 4 * splits  # the last block's scales, twice
    flags = 4 * tiles * row_blocks if splits > 1 else 0
    return Traffic(
        must=plain + x + out,
        memory=weight + x + out + partial,
        loads=row_blocks * (weight + once_more) + tiles * x + partial + 8 * programs,
        stores=partial + out + flags,
    )


def dequantize(n: int, k: int, width: int, group_size: int) -> Traffic:
    """The kernel that writes the weight in 16 bits."""
    from flexquant_kernels.triton.layout import BLOCK_K, PAD_ROWS, padded

    n_pad, k_pad = padded(n, k)
    plain, weight = _weight_bytes(n, k, width, group_size)
    out = n * k * 2
    return Traffic(
        must=plain + out,
        memory=weight + out,
        loads=weight + 8 * (n_pad // PAD_ROWS) * (k_pad // BLOCK_K),
        stores=out,
    )


def entropy(rows: int, vocabulary: int, itemsize: int) -> Traffic:
    """Both launches."""
    from flexquant_kernels.triton.entropy import CHUNK

    chunks = max(1, -(-vocabulary // CHUNK))
    logits, partial, out = rows * vocabulary * itemsize, rows * chunks * 12, rows * 4
    return Traffic(logits + out, logits + 2 * partial + out, logits + partial, partial + out)


def slots_per_weight(loop: Mapping[str, Any]) -> float:
    """Issue slots that a loop of the table takes for a weight, its integer pipe counted too."""
    total = sum(loop["most"].values())
    share = loop["per_weight"] / max(total, 1)
    integer = sum(loop["most"].get(name, 0) for name in HALF_RATE)
    # `most` leaves out the rarest, which are counted in `per_weight`: the estimate is from above
    return max(float(loop["per_weight"]), 2 * integer * share)


class Compiled:
    """The rows of the table, for one version of Triton."""

    def __init__(self, version: str = TRITON) -> None:
        rows = json.loads((ROOT / RESULTS).read_text(encoding="utf-8"))["results"]
        self.rows = {(r["target"], r["variant"]): r for r in rows if r["triton"] == version}

    def linear(
        self, target: str, layout: str, group_size: int, block: int, width: int
    ) -> float | None:
        """Issue slots a weight of the linear kernel; None where that was not compiled."""
        row = self.rows.get((target, f"{layout} g{group_size} bf16, {block} rows"))
        return slots_per_weight(row["widths"][str(width)]) if row else None

    def dequantize(self, target: str, layout: str) -> float | None:
        """As `linear`, of the dequantizing kernel: the mean over its widths."""
        row = self.rows.get((target, f"dequantize {layout} g64 bf16"))
        if row is None:
            return None
        from flexquant_kernels.triton.dequantize import WARPS
        from flexquant_kernels.triton.layout import BLOCK_K, PAD_ROWS

        bodies = len(layout_widths(PlaneLayout.parse(layout).planes))
        return float(row["instructions"] / bodies * 32 * WARPS / (PAD_ROWS * BLOCK_K))


def allowed_slots(gpu: Gpu, width: int, group_size: int) -> float:
    """Issue slots for a weight in the time that its bits and its share of scales take to come."""
    bytes_per_weight = width / 8 + 4 / group_size
    return bytes_per_weight * gpu.slots / gpu.bandwidth


def seconds(gpu: Gpu, traffic: Traffic, weights: int, slots: float, products: float) -> dict:
    """What each limit leaves, in seconds: of memory, of issuing, of the tensor cores.

    Args:
        weights: taken from the planes, each as often as that happens. slots: for each.
        products: multiply-adds.
    """
    return {
        "memory": traffic.memory / gpu.bandwidth,
        "issue": weights * slots / gpu.slots,
        "products": products / gpu.products,
    }


def launched(gpu: Gpu, shape: tuple[int, int], rows: int, width: int) -> tuple[int, Traffic]:
    """(rows of x of a program, bytes) of the fused kernel, launched by the heuristic."""
    from flexquant_kernels.triton.tuning import heuristic

    launch = heuristic(rows, *shape, gpu.target, processors=132)
    return launch.block, linear(*shape, rows, width, GROUP, launch.block, launch.splits)


def fused_seconds(
    gpu: Gpu, compiled: Compiled, shape: tuple[int, int], rows: int, width: int, layout: str
) -> dict[str, float] | None:
    """Limits of the fused kernel; None where it was not compiled."""
    block, traffic = launched(gpu, shape, rows, width)
    slots = compiled.linear(gpu.target, layout, GROUP, block, width)
    if slots is None:
        return None
    weights = shape[0] * shape[1] * -(-rows // block)
    parts = 1 if width <= (4 if layout.startswith("4") else 2) else 2
    return seconds(gpu, traffic, weights, slots, weights * block * parts)


def dequantized_seconds(
    gpu: Gpu, compiled: Compiled, shape: tuple[int, int], rows: int, width: int, layout: str
) -> float | None:
    """Time of dequantizing, and of a matrix product in 16 bits after it."""
    n, k = shape
    slots = compiled.dequantize(gpu.target, layout)
    if slots is None:
        return None
    first = max(seconds(gpu, dequantize(n, k, width, GROUP), n * k, slots, 0).values())
    moved = (n * k + rows * (n + k)) * 2
    return first + max(moved / gpu.bandwidth, n * k * rows / gpu.products)


def crossover(
    gpu: Gpu, compiled: Compiled, shape: tuple[int, int], width: int, layout: str
) -> int | None:
    """The fewest rows, in steps of 32, for which dequantizing first takes less time."""
    for rows in range(32, 2049, 32):
        fused = fused_seconds(gpu, compiled, shape, rows, width, layout)
        plain = dequantized_seconds(gpu, compiled, shape, rows, width, layout)
        if fused is None or plain is None:
            return None
        if plain < max(fused.values()):
            return rows
    return None


def main(arguments: list[str] | None = None) -> None:
    """Print limits and crossover for each shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    parser.add_argument("--layout", default="4|2|2")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    chosen = parser.parse_args(arguments)
    gpu, compiled = GPUS[chosen.gpu], Compiled()
    widths = layout_widths(PlaneLayout.parse(chosen.layout).planes)
    table = Table(
        "shape", "rows", "bits", "must MB", "moves MB", "memory us", "issue us", "tensor us",
        "limit", "dequantize from", box=box.SIMPLE_HEAD,
        title=f"{chosen.layout} on {chosen.gpu}: a model, not measured",
    )  # fmt: skip
    for name, shape in SHAPES.items():
        for width in widths:
            start = crossover(gpu, compiled, shape, width, chosen.layout)
            for rows in chosen.rows:
                found = fused_seconds(gpu, compiled, shape, rows, width, chosen.layout)
                if found is None:
                    continue
                traffic = launched(gpu, shape, rows, width)[1]
                table.add_row(
                    f"{name} {shape[0]}x{shape[1]}", str(rows), str(width),
                    f"{traffic.must / 1e6:.1f}", f"{traffic.memory / 1e6:.1f}",
                    *(f"{found[limit] * 1e6:.1f}" for limit in ("memory", "issue", "products")),
                    max(found, key=lambda limit: found[limit]),
                    f"{start} rows" if start else "-",
                )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
