# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels are to reach on an H200, and whether measured cells do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

DEFAULT_LAYOUT = "4|2|2"
LARGE = 4096 * 14336
Cell = Mapping[str, Any]


def _ours(cell: Cell, width: int) -> float | None:
    found = cell["seconds"].get(DEFAULT_LAYOUT, {}).get(str(width))
    return float(found) if found is not None else None


def _share(cell: Cell, width: int, bandwidth: float) -> float | None:
    """Of the memory limit that a width reaches."""
    seconds = _ours(cell, width)
    if seconds is None:
        return None
    return float(cell["bytes_read"][DEFAULT_LAYOUT][str(width)] / bandwidth / seconds)


def _against(cell: Cell, width: int, baseline: str) -> float | None:
    """How many times faster than a baseline."""
    seconds, other = _ours(cell, width), cell["baselines"].get(baseline)
    return other / seconds if seconds is not None and other is not None else None


def _ratio(cell: Cell) -> float | None:
    four, eight = _ours(cell, 4), _ours(cell, 8)
    return eight / four if four is not None and eight is not None else None


def _alternating(cell: Cell) -> float | None:
    """Mean time at the lowest and the highest width, over that of calls that alternate."""
    low, high = _ours(cell, 4), _ours(cell, 8)
    both = cell["seconds"].get(DEFAULT_LAYOUT, {}).get("alternating")
    return (low + high) / 2 / both if low and high and both else None


def judge(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each figure to reach, with its worst case.

    Returns:
        Entries with `target`, `bound`, `cases`, those `met`, the `worst` value and a `text`;
        `worst` is None where nothing was measured.
    """
    bandwidth = float(results["copy_bytes_per_s"])
    targets: list[tuple[str, float, Callable[[Cell], float | None], Callable[[Cell], bool]]] = [
        (
            "8 bit, 1 row, large: share of the memory limit",
            0.85, lambda c: _share(c, 8, bandwidth), lambda c: c["rows"] == 1 and _large(c),
        ),
        (
            "4 bit, 1 row, large: share of the memory limit",
            0.75, lambda c: _share(c, 4, bandwidth), lambda c: c["rows"] == 1 and _large(c),
        ),
        (
            "4 bit times faster than 8 bit, 1 row, large",
            1.7, _ratio, lambda c: c["rows"] == 1 and _large(c),
        ),
        (
            "4 bit times faster than torch's int4, 1 to 16 rows",
            0.9, lambda c: _against(c, 4, "torch int4 g128"), lambda c: c["rows"] <= 16,
        ),
        (
            "one width times faster than alternating widths, 1 row, large",
            0.98, _alternating, lambda c: c["rows"] == 1 and _large(c),
        ),
        (
            "8 bit times faster than bf16, 256 rows and more",
            0.95, lambda c: _against(c, 8, "torch bf16"), lambda c: c["rows"] >= 256,
        ),
    ]  # fmt: skip
    judged = [_judged(name, bound, _values(results, v, a)) for name, bound, v, a in targets]
    step = 15e-6 / float(results["entropy_and_decision_seconds"])
    return [*judged, _judged("entropy and decision: 15 us over their time", 1.0, iter([step]))]


def _large(cell: Cell) -> bool:
    return bool(cell["n"] * cell["k"] >= LARGE)


def _values(
    results: Mapping[str, Any],
    value: Callable[[Cell], float | None],
    applies: Callable[[Cell], bool],
) -> Iterator[float]:
    for cell in filter(applies, results["cells"]):
        if (found := value(cell)) is not None:
            yield found


def _judged(name: str, bound: float, values: Iterator[float]) -> dict[str, Any]:
    found = list(values)
    met = sum(value >= bound for value in found)
    worst = min(found, default=None)
    if worst is None:
        text = "not measured"
    else:
        text = f"at least {bound}, met in {met} of {len(found)}, worst {worst:.3g}"
    return {
        "target": name, "bound": bound, "cases": len(found), "met": met, "worst": worst,
        "text": text,
    }  # fmt: skip
