# SPDX-License-Identifier: Apache-2.0
"""A picture of the cells at one row: time against bits, and the share of plain-read bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels.contenders import ALL_WIDTHS, flexquant_name
from benchmarks.kernels.plain_read import read_name
from benchmarks.kernels.targets import PLACES
from benchmarks.kernels.timing import SHARE
from vllm_flexquant.format.layout import PlaneLayout

LAYOUT_STYLES = {
    "4|2|2": ("#2f5d8a", "o"),
    "2|1|1|2|2": ("#c8553d", "s"),
    "2|2|4": ("#6fae75", "^"),
}
BASELINE_STYLES = {
    "torch bf16": ("#999999", ":"),
    "vllm bf16": ("#333333", "-"),
    "vllm w4a16 g64": ("#b48ead", ":"),
    "vllm w4a8 g64": ("#8e44ad", "-"),
    "vllm w8a8": ("#d4a017", "-"),
    "vllm w8a8 onednn": ("#d4a017", ":"),
}
ARK_COLOUR = "#4fb3bf"
SHARE_BOUND = 0.8
BITS = ALL_WIDTHS.widths


def plot_results(
    cells: Sequence[dict[str, Any]], layouts: Sequence[str], path: Path, title: str
) -> bool:
    """Write a PNG of the cells with one row and the most threads.

    Returns:
        False, and nothing is written, when no cell has one row.
    """
    single = [cell for cell in cells if cell["rows"] == 1]
    if not single:
        return False
    threads = max(cell["threads"] for cell in single)
    chosen = {
        (cell["residence"], cell["shape"]): cell for cell in single if cell["threads"] == threads
    }
    shapes = list(dict.fromkeys(shape for _, shape in chosen))
    places = [p for p in ("memory", "cache") if any(place == p for place, _ in chosen)]
    with_share = "memory" in places
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(places) + with_share
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(
            count,
            len(shapes),
            figsize=(3.6 * len(shapes) + 0.6, 2.9 * count + 1.2),
            squeeze=False,
            layout="constrained",
        )
        figure.suptitle(f"{title}\n1 row, {threads} thread{'s' * (threads > 1)}", fontsize=12)
        for column, shape in enumerate(shapes):
            for row, place in enumerate(places):
                axis = axes[row][column]
                if cell := chosen.get((place, shape)):
                    _draw_times(axis, cell, layouts)
                axis.set_title(f"{shape}, {PLACES[place]}", fontsize=10)
            if with_share:
                axis = axes[-1][column]
                if cell := chosen.get(("memory", shape)):
                    _draw_shares(axis, cell, layouts)
                axis.set_title(f"{shape}, share of plain read", fontsize=10)
            axes[-1][column].set_xlabel("bits per weight")
        for row in range(len(places)):
            axes[row][0].set_ylabel("µs per call")
        if with_share:
            axes[-1][0].set_ylabel("share of the bandwidth\nof a plain read")
        handles: dict[str, Any] = {}
        for axis in figure.axes:
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=min(len(handles), 2 + len(shapes)),
            frameon=False,
            fontsize=9,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, facecolor="white")
        pyplot.close(figure)
    return True


def _draw_times(axis: Any, cell: dict[str, Any], layouts: Sequence[str]) -> None:
    times = cell["time_us"]
    for layout in layouts:
        widths = [w for w in PlaneLayout.parse(layout).widths if flexquant_name(layout, w) in times]
        found = [times[flexquant_name(layout, width)] for width in widths]
        colour, marker = LAYOUT_STYLES.get(layout, ("#000000", "x"))
        medians = [one["median"] for one in found]
        below = [one["median"] - one["p25"] for one in found]
        above = [one["p75"] - one["median"] for one in found]
        axis.errorbar(
            widths, medians, yerr=(below, above), color=colour, marker=marker, linewidth=1.8,
            capsize=2, label=f"flexquant {layout}", zorder=3,
        )  # fmt: skip
    for name, (colour, style) in BASELINE_STYLES.items():
        if name in times:
            axis.axhline(
                times[name]["median"], color=colour, linestyle=style, linewidth=1.2, label=name
            )
    ark = {int(name.removeprefix("ark int")): t for name, t in times.items() if "ark int" in name}
    if ark:
        axis.plot(
            sorted(ark), [ark[width]["median"] for width in sorted(ark)], color=ARK_COLOUR,
            marker="D", markersize=4, linestyle="none", label="ARK, group 64",
        )  # fmt: skip
    reads = {
        width: times[read_name(width)]["median"] for width in BITS if read_name(width) in times
    }
    if reads:
        axis.plot(
            list(reads), list(reads.values()), color="#999999", linestyle="--", linewidth=1,
            label="plain read of as many bytes",
        )  # fmt: skip
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(_few_labels)
    _bits_axis(axis)
    axis.grid(axis="y", which="both", color="#e6e6e6", linewidth=0.7)


def _few_labels(value: float, _: int) -> str:
    """Labels 2 and 5 of each decade."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _bits_axis(axis: Any) -> None:
    axis.set_xlim(BITS[0] - 0.4, BITS[-1] + 0.4)
    axis.set_xticks(BITS)


def _draw_shares(axis: Any, cell: dict[str, Any], layouts: Sequence[str]) -> None:
    for layout in layouts:
        shares = {
            width: cell["faster_than"].get(flexquant_name(layout, width), {}).get(SHARE)
            for width in PlaneLayout.parse(layout).widths
        }
        known = [width for width, share in shares.items() if share is not None]
        colour, marker = LAYOUT_STYLES.get(layout, ("#000000", "x"))
        axis.plot(known, [shares[width] for width in known], color=colour, marker=marker)
    axis.axhline(SHARE_BOUND, color="#999999", linestyle="--", linewidth=1, label="to reach: 0.8")
    axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
    _bits_axis(axis)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.7)
