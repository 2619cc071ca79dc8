# SPDX-License-Identifier: Apache-2.0
"""What the kernels are to reach, and whether the measured cells do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.kernels.contenders import flexquant_name
from benchmarks.kernels.timing import BEST, EIGHT_BIT, SHARE
from vllm_flexquant.format.layout import PlaneLayout

DEFAULT_LAYOUT = "4|2|2"
FULL_BITS = 8

CELL_KEYS = ("shape", "rows", "threads", "residence", "clean_turns")

PLACES = {"memory": "from memory", "cache": "in cache"}

Cell = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A figure to reach in each cell that it is about.

    against: keys of `faster_than` in a cell; each present one makes a case. value: of the ratio.
    """

    name: str
    bound: float
    at_most: bool
    widths: tuple[int, ...]
    against: tuple[str, ...]
    applies: Callable[[Cell], bool]
    value: Callable[[float], float] = lambda ratio: ratio

    def met(self, value: float) -> bool:
        """Whether one value reaches the bound."""
        return value <= self.bound if self.at_most else value >= self.bound


def _memory(*rows: int) -> Callable[[Cell], bool]:
    return lambda cell: cell["residence"] == "memory" and cell["rows"] in rows


def _decode(cell: Cell) -> bool:
    return bool(1 <= cell["rows"] <= 64)


def _prefill(cell: Cell) -> bool:
    return bool(cell["rows"] == 256)


W4A16 = ("vllm w4a16 g128", "vllm w4a16 g64")
W4A8 = ("vllm w4a8 g128", "vllm w4a8 g64")


def targets(widths: Sequence[int]) -> list[Target]:
    """The figures, for a layout with these widths."""
    low = tuple(width for width in widths if width == 4)
    full = (FULL_BITS,)
    return [
        Target(
            "time at 4 bit over time at 8 bit, 1 row, from memory",
            0.6, True, low, (EIGHT_BIT,), _memory(1), lambda ratio: 1 / ratio,
        ),
        Target(
            "share of plain-read bandwidth, 1 row, from memory",
            0.8, False, tuple(widths), (SHARE,), _memory(1),
        ),
        Target(
            "4 bit times faster than vLLM's bf16, 1 row, from memory",
            3.0, False, low, ("vllm bf16",), _memory(1),
        ),
        Target(
            "4 bit times faster than vLLM's bf16, 16 rows, from memory",
            5.0, False, low, ("vllm bf16",), _memory(16),
        ),
        Target(
            "4 bit times faster than vLLM's W4A16, 1 to 64 rows", 1.0, False, low, W4A16, _decode
        ),
        Target(
            "4 bit times faster than vLLM's W4A8, 1 to 64 rows", 1.0, False, low, W4A8, _decode
        ),
        Target(
            "8 bit times faster than vLLM's W8A8, 1 to 64 rows",
            1.0, False, full, ("vllm w8a8",), _decode,
        ),
        Target(
            "8 bit times faster than the best of vLLM, 256 rows",
            1.0, False, full, (BEST,), _prefill,
        ),
        Target(
            "4 bit times faster than the best of vLLM, 256 rows",
            1.0, False, low, (BEST,), _prefill,
        ),
    ]  # fmt: skip


def _cases(target: Target, layout: str, cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    for cell in filter(target.applies, cells):
        for width in target.widths:
            name = flexquant_name(layout, width)
            ratios = cell["faster_than"].get(name, {})
            for label in target.against:
                if label not in ratios:
                    continue
                value = target.value(ratios[label])
                yield {
                    **{key: cell[key] for key in CELL_KEYS},
                    "contender": name,
                    "against": label,
                    "value": round(value, 4),
                    "met": target.met(value),
                }


def place(case: dict[str, Any]) -> str:
    """Where a case was measured, in words."""
    threads = f"{case['threads']} thread{'s' * (case['threads'] > 1)}"
    rows = f"{case['rows']} row{'s' * (case['rows'] > 1)}"
    return f"{case['shape']}, {rows}, {threads}, {PLACES[case['residence']]}"


def _in_words(case: dict[str, Any]) -> str:
    return f"{case['value']:.3g}: {case['contender']}, {place(case)}, {case['against']}"


def judge(cells: Sequence[Cell], layouts: Sequence[str]) -> list[dict[str, Any]]:
    """Each target on each layout.

    Returns:
        Entries with the number of `cases` and of those that met it, the `worst` case, and a line
        for each `unmet` one; `met` is None where nothing was measured.
    """
    judged = []
    for layout in sorted(layouts, key=lambda text: text != DEFAULT_LAYOUT):
        for target in targets(PlaneLayout.parse(layout).widths):
            cases = list(_cases(target, layout, cells))
            choose = max if target.at_most else min
            judged.append(
                {
                    "target": target.name,
                    "layout": layout,
                    "bound": target.bound,
                    "bound_is": "at most" if target.at_most else "at least",
                    "met": all(case["met"] for case in cases) if cases else None,
                    "cases": len(cases),
                    "cases_met": sum(case["met"] for case in cases),
                    "worst": choose(cases, key=lambda case: case["value"], default=None),
                    "unmet": [_in_words(case) for case in cases if not case["met"]],
                }
            )
    return judged
