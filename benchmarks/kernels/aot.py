# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels for GPUs that are not here, and count what comes out.

    python -m benchmarks.kernels.aot [--check] [--targets sm_90 ...] [--quick]

Prints registers, spills, shared memory and the instructions of the loop over K for each weight, at
each width, and writes them to a table; its rows are kept by version of Triton. With `--check`
nothing is written: status 1 where a kernel does not compile, spills, or takes more instructions for
a weight than in the table. Needs the triton wheel, which brings the tools, and no GPU. How fast a
kernel is, it cannot say.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.kernels import machine_code
from benchmarks.provenance import ROOT, provenance, write_json

RESULTS = Path("benchmarks", "results", "triton-aot.json")
TARGETS = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"]
TOLERANCE = 0.01
BLOCK_K = 256


@dataclass(frozen=True)
class Variant:
    """One compilation, as the launcher makes it for so many rows of x."""

    rows: int = 8
    layout: tuple[int, ...] = (4, 2, 2)
    group_size: int = 64
    dtype: str = "bf16"
    shared: bool = False
    bias: bool = False
    even_k: bool = True

    @property
    def name(self) -> str:
        """As in `4|2|2 g64 bf16, 8 rows`."""
        extras = "".join(f", {x}" for x in ("shared", "bias") if getattr(self, x))
        extras += "" if self.even_k else ", odd k"
        layout = "|".join(map(str, self.layout))
        return f"{layout} g{self.group_size} {self.dtype}, {self.rows} rows{extras}"


QUICK = [Variant()]
VARIANTS = [
    *QUICK,
    Variant(group_size=128),
    Variant(group_size=32),
    Variant(dtype="fp16"),
    Variant(shared=True, bias=True, even_k=False),
    Variant(layout=(2, 2, 4)),
    Variant(layout=(2, 1, 1, 2, 2)),
    Variant(rows=16),
    Variant(rows=32),
    Variant(rows=32, layout=(2, 1, 1, 2, 2)),
]


def variants(target: str, quick: bool) -> list[Variant]:
    """What is compiled for a target: with the rows that the launcher gives a program there."""
    from flexquant_kernels.triton.tuning import row_block

    fitted = (replace(v, rows=row_block(v.rows, target)) for v in (QUICK if quick else VARIANTS))
    return list(dict.fromkeys(fitted))


def compiled(variant: Variant, target: str) -> tuple[Any, int, int]:
    """The kernel as Triton compiled it, threads of a program, weights of one round of its loop."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flexquant_kernels.triton.kernel import linear_kernel
    from flexquant_kernels.triton.linear import BN
    from flexquant_kernels.triton.tuning import STAGES, WARPS

    constants = {
        "LAYOUT": int("".join(map(str, variant.layout))),
        "SHARED": variant.shared,
        "HAS_BIAS": variant.bias,
        "SPLIT": True,
        "G": variant.group_size,
        "EVEN_K": variant.even_k,
        "BM": variant.rows,
        "BN": BN,
        "UPCAST": False,
    }
    types = dict.fromkeys(("p0", "p1", "p2", "p3", "p4", "scales_ptr", "width_ptr"), "*i32")
    types |= {"counters_ptr": "*i32", "zero_ptr": "*i32", "partial_ptr": "*fp32"}
    types |= dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), f"*{variant.dtype}")
    # What the launcher's tensors have, and Triton finds: K is a multiple of 32, N_pad of 64.
    unaligned = {"M", "N", "blocks", "top", "zero_ptr", "width_ptr", "bias_ptr"}
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, name in enumerate(linear_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[(i,)] = constants[name]
            continue
        signature[name] = types.get(name, "i32")
        if name not in unaligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    warps = WARPS[variant.rows]
    kernel = compile_kernel(
        ASTSource(fn=linear_kernel, signature=signature, constexprs=constexprs, attrs=attributes),
        target=gpu,
        options={"num_warps": warps, "num_stages": STAGES},
    )
    return kernel, warps * (32 if nvidia else 64), BN * BLOCK_K


def examine(variant: Variant, target: str) -> dict[str, Any]:
    """One row of the table."""
    import triton

    from flexquant_kernels import layout_widths

    started = time.perf_counter()
    kernel, threads, weights = compiled(variant, target)
    seconds = time.perf_counter() - started
    if "cubin" in kernel.asm:
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        usage, loops = machine_code.nvidia(kernel.asm["cubin"], tools, kernel.metadata.shared)
    else:
        usage, loops = machine_code.amd(kernel.asm["amdgcn"], kernel.metadata.shared), []
    widths = layout_widths(variant.layout)
    if loops and len(loops) != len(widths):
        raise RuntimeError(f"{len(loops)} loops over K where {variant.name} has {len(widths)}")
    return {
        "triton": triton.__version__,
        "target": target,
        "variant": variant.name,
        **asdict(usage),
        "widths": {
            str(width): machine_code.per_weight(loop, weights, threads)
            for width, loop in zip(widths, loops, strict=False)
        },
        "compile_seconds": round(seconds, 1),
    }


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    """What identifies a row."""
    return row["triton"], row["target"], row["variant"]


def faults(row: dict[str, Any], before: dict[str, Any] | None) -> Iterator[str]:
    """What is wrong with a row, by itself and beside the one in the table."""
    if row["stack"] or row["spills"]:
        yield f"spills: {row['spills']} and {row['stack']} bytes of stack"
    for width, now in row["widths"].items() if before else ():
        assert before is not None
        allowed = before["widths"][width]["per_weight"]
        if now["per_weight"] > allowed * (1 + TOLERANCE):
            yield f"{width} bit: {now['per_weight']} instructions a weight, the table has {allowed}"


def describe(row: dict[str, Any]) -> str:
    """One line for a row."""
    counts = "  ".join(f"{w} bit {loop['per_weight']:.2f}" for w, loop in row["widths"].items())
    return (
        f"{row['target']:7s} {row['variant']:32s} {row['registers']:3d} registers, "
        f"{row['stack']} stack, {row['spills']} spills, {row['shared']} shared | {counts}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Compile, print, then check or write; 1 on any fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with the table, keep it")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--quick", action="store_true", help="one variant: 4|2|2, 8 rows")
    parser.add_argument("--out", type=Path, default=ROOT / RESULTS)
    chosen = parser.parse_args(arguments)
    table: dict[tuple[str, str, str], dict[str, Any]] = {}
    if chosen.out.exists():
        table = {key(row): row for row in json.loads(chosen.out.read_text())["results"]}

    # Read by triton when it is imported: compile afresh, and for a GPU.
    os.environ.pop("TRITON_INTERPRET", None)
    wrong = 0
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for target in chosen.targets:
            for variant in variants(target, chosen.quick):
                row = examine(variant, target)
                rows.append(row)
                print(describe(row), flush=True)
                before = table.get(key(row)) if chosen.check else None
                if chosen.check and before is None:
                    print(f"  not in the table, which has no such row of Triton {row['triton']}")
                for fault in faults(row, before):
                    wrong += 1
                    print(f"  {fault}")
    if not chosen.check:
        table |= {key(row): row for row in rows}
        ordered = [table[k] for k in sorted(table)]
        write_json(chosen.out, ordered, provenance())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
