# SPDX-License-Identifier: Apache-2.0
"""How a linear layer is launched: a table for the GPU's family, a heuristic where it has no entry.

A table is ``tuned/<target>.json`` beside this file, measured by ``benchmarks/kernels/tune.py`` on a
GPU and never inside an engine:

    {"format": 1, "target": "sm_90", "dequantize_above": 256, "provenance": {...},
     "entries": [{"layout": "4|2|2", "n": 4096, "k": 4096, "rows": 8,
                  "block": 8, "splits": 4, "warps": 2, "stages": 2}, ...]}

An entry serves up to ``rows`` rows of x, one of ``BUCKETS``, and more than the next smaller entry
of its shape. It does not depend on the width. No table has been measured so far.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .layout import BLOCK_K, COUNTERS, PAD_ROWS

FORMAT = 1
FOLDER = Path(__file__).parent / "tuned"
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Rows of x, at most, that share a launch."""

WARPS = {8: 2, 16: 4, 32: 4}
"""Of a program that takes so many rows of x."""

STAGES = 2
MAX_SPLIT_ROWS = 8 * COUNTERS
DEQUANTIZE_ABOVE = {
    "sm_80": 160, "sm_89": 640, "sm_90": 256, "sm_100": 64, "sm_103": 64, "sm_120": 160,
    "sm_121": 160,
}  # fmt: skip
"""Rows from which on the weight is better unpacked once, for a matrix product in its dtype, where
no table says so. By the roofline model at 8 bits (``benchmarks/kernels/roofline.py``), not
measured; 256 elsewhere."""

WIDE_GROUP_REGISTERS = 208
"""Of a thread on NVIDIA's GPUs, for 8 rows and groups of 128: left alone, ptxas stays below what
Triton 3.6 needs on sm_80, and spills."""

_PROGRAMS_PER_PROCESSOR = 4


class TableError(ValueError):
    """A table that cannot be used; the message says what is wrong with it."""


@dataclass(frozen=True)
class Launch:
    """block: rows of x of a program. splits: parts of K. warps and stages: of a program."""

    block: int
    splits: int
    warps: int
    stages: int


Key = tuple[tuple[int, ...], int, int, int]
"""Layout, n, k, one of ``BUCKETS``."""


@dataclass(frozen=True)
class Table:
    """dequantize_above: rows."""

    launches: dict[Key, Launch]
    dequantize_above: int


def bucket(rows: int) -> int:
    """The least of ``BUCKETS`` that holds so many rows, else the last."""
    return next((b for b in BUCKETS if rows <= b), BUCKETS[-1])


def row_blocks(target: str) -> tuple[int, ...]:
    """Rows that a program may take on sm_90, gfx942, ...; further rows take further programs.

    By what was compiled: with 64 rows, or on sm_120 with 32, the kernel spills registers; on sm_89
    with 32 under Triton 3.6. On sm_100 four warps bring in its other tensor cores, which unpacked
    weights do not reach from registers. AMD's matrix products take 16 rows at least.
    """
    if target.startswith("gfx"):
        return (16, 32)
    fewer = {"sm_89": (8, 16), "sm_100": (8,), "sm_103": (8,), "sm_120": (8, 16), "sm_121": (8, 16)}
    return fewer.get(target, tuple(WARPS))


def row_block(rows: int, target: str) -> int:
    """Rows of x in a program's tile, by the heuristic."""
    blocks = row_blocks(target)
    return next((b for b in blocks if rows <= b), blocks[-1])


def most_splits(rows: int, k: int) -> int:
    """Parts that K can have."""
    return -(-k // BLOCK_K) if rows <= MAX_SPLIT_ROWS else 1


def heuristic(rows: int, n: int, k: int, target: str, processors: int) -> Launch:
    """As many parts of K as give every processor a few programs."""
    block = row_block(rows, target)
    tiles = -(-n // PAD_ROWS) * -(-rows // block)
    splits = min(most_splits(rows, k), _PROGRAMS_PER_PROCESSOR * processors // tiles)
    return Launch(block, max(1, splits), WARPS[block], STAGES)


def _entry(entry: dict[str, object], target: str) -> tuple[Key, Launch]:
    """(key, launch) of an entry.

    Raises:
        TableError: a field is missing or out of range.
    """
    try:
        layout = tuple(int(part) for part in str(entry["layout"]).split("|"))
        n, k, rows, block, splits, warps, stages = (
            int(str(entry[name]))
            for name in ("n", "k", "rows", "block", "splits", "warps", "stages")
        )
    except (KeyError, ValueError) as error:
        raise TableError(f"entry {entry} cannot be read ({error}): tune again") from error
    if (
        rows not in BUCKETS
        or block not in row_blocks(target)
        or not 1 <= splits <= most_splits(rows, k)
        or warps not in (1, 2, 4, 8)
        or not 1 <= stages <= 4
    ):
        raise TableError(f"entry {entry} is out of range on {target}: tune again")
    return (layout, n, k, rows), Launch(block, splits, warps, stages)


def read_table(path: Path) -> Table:
    """A table of launches.

    Raises:
        TableError: it is not JSON, has another format, or an entry that cannot be launched.
    """
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        if whole["format"] != FORMAT:
            raise TableError(
                f"{path.name} has format {whole['format']}, this version reads {FORMAT}: tune again"
            )
        known = dict(_entry(entry, str(whole["target"])) for entry in whole["entries"])
        above = int(whole["dequantize_above"])
    except TableError as error:
        raise TableError(f"{path.name}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise TableError(f"{path.name} is no table of launches ({error!r}): tune again") from error
    if above < 1:
        raise TableError(f"{path.name}: dequantize_above is {above}, not a number of rows")
    launches: dict[Key, Launch] = {}
    for layout, n, k, rows in sorted(known, key=lambda key: -key[3]):  # smaller ones replace
        for fewer in (b for b in BUCKETS if b <= rows):
            launches[layout, n, k, fewer] = known[layout, n, k, rows]
    return Table(launches, above)


@cache
def table_of(target: str, folder: Path = FOLDER) -> Table:
    """The table of a GPU's family; one without entries where none was measured."""
    path = folder / f"{target}.json"
    return read_table(path) if path.exists() else Table({}, DEQUANTIZE_ABOVE.get(target, 256))


def compiler_options(block: int, group_size: int, target: str) -> dict[str, int]:
    """Options of the linear kernel beside warps and stages."""
    wide = block == 8 and group_size == 128 and target.startswith("sm_")
    return {"maxnreg": WIDE_GROUP_REGISTERS} if wide else {}


def choose(
    table: Table, layout: tuple[int, ...], rows: int, n: int, k: int, target: str, processors: int
) -> Launch | None:
    """The launch for rows of x; None where the weight is to be dequantized first."""
    if rows > table.dequantize_above:
        return None
    found = table.launches.get((layout, n, k, bucket(rows))) if rows <= BUCKETS[-1] else None
    return found or heuristic(rows, n, k, target, processors)
