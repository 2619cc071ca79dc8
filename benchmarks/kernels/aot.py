# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels for GPUs that are not here, and count what comes out.

    python -m benchmarks.kernels.aot [--check [--triton VERSION]] [--targets sm_90 ...] [--quick]

Prints registers, spills, shared memory and instructions: of the linear kernel, those of the loop
over K for each weight, at each width. Writes them to a table whose rows are kept by version of
Triton. With `--check` nothing is written: status 1 where a kernel does not compile, spills, takes
more shared memory than the GPUs of its family have, does not load planes of 4 bits 16 bytes at a
time, misses a figure to reach, or takes more instructions than in the table; with `--triton` also
where another version is imported, or the table lacks a row. Needs the triton wheel, which brings
the tools, and no GPU. How fast a kernel is, it cannot say. `tools/check_triton.py` runs the check
under several versions.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.kernels import machine_code
from benchmarks.kernels.aot_cases import Case, cases
from benchmarks.provenance import ROOT, provenance, write_json
from flexquant_kernels.gpu import triton_version

RESULTS = Path("benchmarks", "results", "triton-aot.json")
TARGETS = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"]
SHARED = {
    "sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64,
}  # fmt: skip
"""KiB of shared memory that a program can have, by the vendors' tables."""

REACH = {("sm_90", "4|2|2 g64 bf16, 8 rows"): {"4": 2.5, "8": 4.0}}
"""Instructions for each weight, at most, by width."""

TOLERANCE = 0.01
SMALL_TOLERANCE = 0.05
"""Share by which a loop, and a kernel without a loop over K, may exceed the table."""


def compiled(case: Case, target: str) -> tuple[Any, int]:
    """The kernel as Triton compiled it, and threads of a program."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, name in enumerate(case.kernel.arg_names):
        if name in case.constants or name in case.ones:
            signature[name] = "constexpr"
            constants[(i,)] = case.constants.get(name, 1)
            continue
        signature[name] = case.types[name]
        if name not in case.odd:  # as Triton finds the launcher's tensors and sizes
            attributes[(i,)] = [["tt.divisibility", 16]]
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    kernel = compile_kernel(
        ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=gpu,
        options={"num_warps": case.warps, **case.options},
    )
    return kernel, case.warps * (32 if nvidia else 64)


def examine(case: Case, target: str) -> dict[str, Any]:
    """One row of the table."""
    import triton

    started = time.perf_counter()
    kernel, threads = compiled(case, target)
    seconds = time.perf_counter() - started
    if "cubin" in kernel.asm:
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        usage, loops = machine_code.nvidia(kernel.asm["cubin"], tools, kernel.metadata.shared)
        if case.loops and len(loops) != len(case.loops):
            raise RuntimeError(f"{len(loops)} loops over K where {case.name} has {len(case.loops)}")
    else:
        usage, loops = machine_code.amd(kernel.asm["amdgcn"], kernel.metadata.shared), []
    return {
        "triton": triton.__version__,
        "target": target,
        "variant": case.name,
        **asdict(usage),
        "widths": {
            str(width): machine_code.per_weight(loop, case.weights, threads)
            for width, loop in zip(case.loops, loops, strict=False)
        },
        "wide_widths": list(case.wide),
        "compile_seconds": round(seconds, 1),
    }


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    """What identifies a row."""
    return row["triton"], row["target"], row["variant"]


def faults(row: dict[str, Any], before: dict[str, Any] | None) -> Iterator[str]:
    """What is wrong with a row, by itself and beside the one in the table."""
    if row["stack"] or row["spills"]:
        yield f"spills: {row['spills']} and {row['stack']} bytes of stack"
    limit = SHARED[row["target"]] << 10
    if row["shared"] > limit:
        yield f"{row['shared']} bytes of shared memory where {row['target']} has {limit}"
    reach = REACH.get((row["target"], row["variant"]), {})
    for width, now in row["widths"].items():
        if now["per_weight"] > reach.get(width, math.inf):
            yield f"{width} bit: {now['per_weight']} instructions a weight, to reach {reach[width]}"
        if int(width) in row["wide_widths"] and not now["loads"]["16"]:
            yield f"{width} bit: no loads of 16 bytes"
    if before is None:
        return
    for width, now in row["widths"].items():
        allowed = before["widths"][width]["per_weight"]
        if now["per_weight"] > allowed * (1 + TOLERANCE):
            yield f"{width} bit: {now['per_weight']} instructions a weight, the table has {allowed}"
    if not row["widths"] and row["instructions"] > before["instructions"] * (1 + SMALL_TOLERANCE):
        yield f"{row['instructions']} instructions, the table has {before['instructions']}"


def describe(row: dict[str, Any]) -> str:
    """One line for a row."""
    counts = "  ".join(f"{w} bit {loop['per_weight']:.2f}" for w, loop in row["widths"].items())
    return (
        f"{row['target']:7s} {row['variant']:32s} {row['registers']:3d} registers, "
        f"{row['stack']} stack, {row['spills']} spills, {row['shared']} shared, "
        f"{row['instructions']} instructions | {counts}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Compile, print, then check or write; 1 on any fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with the table, keep it")
    parser.add_argument("--triton", metavar="VERSION", help="that the check must be made with")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--quick", action="store_true", help="one variant of each kernel")
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
        if chosen.triton and (found := triton_version()) != chosen.triton:
            print(f"triton {found} would be imported, not {chosen.triton}")
            return 1
        for target in chosen.targets:
            for case in cases(target, chosen.quick):
                row = examine(case, target)
                rows.append(row)
                print(describe(row), flush=True)
                before = table.get(key(row)) if chosen.check else None
                if chosen.check and before is None:
                    wrong += chosen.triton is not None
                    print(f"  not in the table, which has no such row of Triton {row['triton']}")
                for fault in faults(row, before):
                    wrong += 1
                    print(f"  {fault}")
    if not chosen.check:
        if not chosen.quick:  # what is no longer compiled goes
            done = {(row["triton"], row["target"]) for row in rows}
            table = {k: row for k, row in table.items() if k[:2] not in done}
        table |= {key(row): row for row in rows}
        ordered = [table[k] for k in sorted(table)]
        write_json(chosen.out, ordered, provenance())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
