# SPDX-License-Identifier: Apache-2.0
"""What a compiled Triton kernel is made of: registers, spills, and its loops over the weights.

NVIDIA: a cubin, read with the cuobjdump and nvdisasm of the triton wheel. AMD: its assembly, where
loops are not counted, since their blocks do not lie together.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRODUCTS = re.compile(r"[HQ]G?MMA|UTC\w*MMA")
LOADS = re.compile(r"LDG(?:STS)?\b")
_LABEL = re.compile(r"\s*(\.L\w+):")
_SASS = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
_TARGET = re.compile(r"(\.L\w+)")


@dataclass(frozen=True)
class Usage:
    """Of one thread, but for `shared`, in bytes of one program.

    `spills` are loads and stores of spilled registers (NVIDIA) or such registers (AMD). LOCAL of
    cuobjdump says 0 even where registers spill: the stack tells.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    instructions: int


def loops(listing: str) -> list[list[str]]:
    """Opcodes of each loop that multiplies matrices, the loop with the fewest loaded bytes first.

    A loop is what lies between the target of a branch backwards and the branch; what it skips in
    one round counts too. A wider code reads more bytes, so the order is that of the widths.
    """
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := _SASS.match(line):
            code.append((found[1], found[2]))
    spans: dict[int, int] = {}
    for end, (opcode, arguments) in enumerate(code):
        if opcode.startswith("BRA") and (target := _TARGET.search(arguments)):
            start = labels.get(target[1], end)
            if start < end:
                spans[start] = max(end, spans.get(start, 0))
    bodies = [[opcode for opcode, _ in code[start : end + 1]] for start, end in spans.items()]
    multiplying = [body for body in bodies if any(map(PRODUCTS.match, body))]
    return sorted(multiplying, key=loaded_bytes)


def loaded_bytes(opcodes: list[str]) -> int:
    """Bytes of global memory that a thread loads, by the widths of the loads."""
    return sum(int(size) * count for size, count in loads(opcodes).items())


def loads(opcodes: list[str]) -> dict[str, int]:
    """Loads from global memory of 16, 8 and at most 4 bytes."""
    found = {"16": 0, "8": 0, "4": 0}
    for opcode in filter(LOADS.match, opcodes):
        wide = re.search(r"\.(128|64)\b", opcode)
        found[str(int(wide[1]) // 8) if wide else "4"] += 1
    return found


def nvidia(cubin: bytes, tools: Path, shared: int) -> tuple[Usage, list[list[str]]]:
    """Usage and loops of a cubin; `tools` holds cuobjdump and nvdisasm."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def output(*command: str) -> str:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return done.stdout

        usage = output(str(tools / "cuobjdump"), "--dump-resource-usage", file.name)
        listing = output(str(tools / "nvdisasm"), "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None
    spills = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s.*?\b(?:LDL|STL)\b", listing, re.MULTILINE))
    instructions = sum(1 for line in listing.splitlines() if _SASS.match(line))
    return Usage(int(found[1]), int(found[2]), spills, shared, instructions), loops(listing)


def amd(asm: str, shared: int) -> Usage:
    """Usage of an AMD kernel, from its assembly."""

    def value(name: str) -> int:
        found = re.search(rf"\.{name}:?\s+(\d+)", asm)
        assert found is not None, name
        return int(found[1])

    return Usage(
        value("vgpr_count"),
        value("private_segment_fixed_size"),
        value("vgpr_spill_count") + value("sgpr_spill_count"),
        shared,
        len(re.findall(r"^\t(?:v|s|ds|global|buffer|flat)_\w+", asm, re.MULTILINE)),
    )


def per_weight(opcodes: list[str], weights: int, threads: int) -> dict[str, Any]:
    """Instructions of a loop for each weight that it takes, and those that it has most of."""
    kinds: dict[str, int] = {}
    for opcode in opcodes:
        head = opcode.split(".")[0]
        kinds[head] = kinds.get(head, 0) + 1
    most = sorted(kinds.items(), key=lambda kind: -kind[1])[:8]
    return {
        "per_weight": round(len(opcodes) * threads / weights, 3),
        "loads": loads(opcodes),
        "most": dict(most),
    }
