# SPDX-License-Identifier: Apache-2.0
"""A picture of the entropy run: bits and entropy over steps, and the width of every layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import trace

WIDTH_COLOURS = {2: "#9e2a2b", 3: "#c8553d", 4: "#e9a03b", 6: "#6fae75", 8: "#2f5d8a"}
BITS_COLOUR, ENTROPY_COLOUR = "#2f5d8a", "#b5541c"
MARKS = 6


def layer_marks(names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Positions and short names of a few layers: the first of some blocks, and the last layer."""
    firsts: dict[str, int] = {}
    for index, name in enumerate(names):
        number = next((part for part in name.split(".") if part.isdigit()), None)
        if number is not None:
            firsts.setdefault(number, index)
    blocks = sorted(firsts.items(), key=lambda item: item[1])
    chosen = blocks[:: max(1, math.ceil(len(blocks) / MARKS))]
    marks = [(index, f"block {number}") for number, index in chosen]
    last = len(names) - 1
    near = [mark for mark in marks if last - mark[0] > len(names) / 40]
    marks = [*near, (last, names[-1].rsplit(".", 1)[-1])]
    return [index for index, _ in marks], [label for _, label in marks]


def plot_run(
    layers: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]], path: Path, title: str
) -> bool:
    """Write a PNG of the decode steps among `steps` (as `benchmarks.trace`).

    Returns:
        False, and nothing is written, when there is no decode step.
    """
    chosen = trace.decode_steps(steps)
    if not chosen:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    bits = [trace.mean_bits(layers, step["widths"]) for step in chosen]
    entropies = [trace.step_entropy(step) for step in chosen]
    entropy = [math.nan if value is None else value for value in entropies]
    number = range(1, len(chosen) + 1)
    with pyplot.rc_context({"font.size": 11, "axes.spines.top": False}):
        figure, (above, below) = pyplot.subplots(
            2, 1, figsize=(11, 7.5), sharex=True, height_ratios=(2, 3), layout="constrained"
        )
        figure.suptitle(title, fontsize=13)
        above.step(number, bits, where="mid", color=BITS_COLOUR, linewidth=2)
        above.set_ylabel("mean bits per weight", color=BITS_COLOUR)
        above.tick_params(axis="y", labelcolor=BITS_COLOUR)
        widths = sorted({w for layer in layers for w in layer["widths"]})
        above.set_ylim(widths[0] - 0.2, widths[-1] + 0.2)
        above.grid(axis="y", color="#dddddd", linewidth=0.8)
        beside = above.twinx()
        beside.plot(number, entropy, color=ENTROPY_COLOUR, linewidth=1.6, linestyle="--")
        beside.set_ylabel("mean entropy of the\nrunning requests (nats)", color=ENTROPY_COLOUR)
        beside.tick_params(axis="y", labelcolor=ENTROPY_COLOUR)
        beside.set_ylim(bottom=0)
        beside.spines["right"].set_visible(True)

        colours = [WIDTH_COLOURS.get(w, "#888888") for w in widths]
        edges = [widths[0] - 1, *((a + b) / 2 for a, b in pairwise(widths))]
        norm = BoundaryNorm([*edges, widths[-1] + 1], len(widths))
        below.imshow(
            [[step["widths"][i] for step in chosen] for i in range(len(layers))],
            aspect="auto",
            interpolation="nearest",
            cmap=ListedColormap(colours),
            norm=norm,
            extent=(0.5, len(chosen) + 0.5, len(layers) - 0.5, -0.5),
        )
        positions, labels = layer_marks([layer["name"] for layer in layers])
        below.set_yticks(positions, labels)
        below.set_ylabel("layers, first to last")
        below.set_xlabel("decoding step")
        patches = [Patch(color=c, label=f"{w} bits") for w, c in zip(widths, colours, strict=True)]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(widths), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, facecolor="white")
        pyplot.close(figure)
    return True
