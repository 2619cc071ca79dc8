# SPDX-License-Identifier: Apache-2.0
"""Plot of the GPU benchmark: time by rows of x, one panel for each shape, where matplotlib is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

LAYOUT = "4|2|2"
COLUMNS = 3


def lines(cells: list[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """(rows, us) by kernel, of the cells of one shape."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for cell in sorted(cells, key=lambda one: one["rows"]):
        ours = {
            f"{LAYOUT} at {width} bit": seconds
            for width, seconds in cell["seconds"].get(LAYOUT, {}).items()
            if width.isdigit()
        }
        for name, seconds in (ours | cell["baselines"]).items():
            rows, times = found.setdefault(name, ([], []))
            rows.append(cell["rows"])
            times.append(seconds * 1e6)
    return found


def plot(cells: list[Mapping[str, Any]], picture: Path, title: str) -> bool:
    """Write a PNG; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shapes = list(dict.fromkeys(cell["shape"] for cell in cells))
    columns = min(COLUMNS, len(shapes))
    panels = -(-len(shapes) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * panels), layout="constrained")
    figure.suptitle(title)
    for i, shape in enumerate(shapes):
        axes = figure.add_subplot(panels, columns, i + 1)
        for name, (rows, times) in lines([c for c in cells if c["shape"] == shape]).items():
            dashed = "-" if name.startswith(LAYOUT) else "--"
            axes.plot(rows, times, dashed, marker="o", markersize=3, label=name)
        axes.set(title=f"[N, K] = {shape}", xlabel="rows", ylabel="µs", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        if i == 0:
            axes.legend(fontsize=8)
    figure.savefig(picture, dpi=130)
    return True
