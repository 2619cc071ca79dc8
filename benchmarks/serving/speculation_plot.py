# SPDX-License-Identifier: Apache-2.0
"""Self-speculation in pictures: the drafts of one answer beside their entropies; speed by gate.

    python -m benchmarks.serving.speculation_plot [--results FILE] [--answer FILE] [--out FOLDER]

Reads what `benchmarks.serving.speculation` and `speculation_answer` wrote, and writes two PNG files
beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.run import RESULTS

KEPT, REJECTED, ENTROPY = "#2f5d8a", "#e0b8a0", "#6fae75"
COLOURS = {"fixed": "#555555", "entropy": "#e9a03b", "gain": "#2f5d8a"}
MARKERS = "o^sDvP"
"""One for each kind of prompt and temperature."""


def positions(steps: Sequence[Mapping[str, Any]], first: int = 1) -> list[int]:
    """Where in the answer the tokens of each step begin; before them is the prompt's token."""
    starts = np.cumsum([first, *(step["tokens"] for step in steps)])
    return [int(start) for start in starts[:-1]]


def plot_answer(axes: Any, steps: Sequence[Mapping[str, Any]], name: str) -> None:
    """Drafts that were kept and rejected above, their entropies below, along one answer."""
    above, below = axes
    if not any(step["nats"] for step in steps):
        above.text(0.5, 0.5, "no step drafted", ha="center", transform=above.transAxes)
    starts = positions(steps)
    kept = np.array([step["kept"] for step in steps])
    drafted = np.array([len(step["nats"]) for step in steps])
    width = [step["tokens"] * 0.9 for step in steps]
    above.bar(starts, kept, width, align="edge", color=KEPT, label="kept")
    above.bar(
        starts, drafted - kept, width, bottom=kept, align="edge", color=REJECTED, label="rejected"
    )
    above.set_ylabel("tokens drafted")
    above.yaxis.get_major_locator().set_params(integer=True)
    above.set_title(f"gate {name}")
    above.margins(y=0.25)
    above.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    every = [
        (start + i, nats, i < step["kept"])
        for start, step in zip(starts, steps, strict=True)
        for i, nats in enumerate(step["nats"])
    ]
    # of the drafts of one position, the last: the line goes along the answer
    along = {at: nats for at, nats, _ in every}
    below.plot(list(along), list(along.values()), color=ENTROPY, linewidth=1, zorder=1)
    for is_kept, colour in ((True, KEPT), (False, REJECTED)):
        chosen = [(at, nats) for at, nats, good in every if good is is_kept]
        below.scatter(*(zip(*chosen, strict=True) if chosen else ((), ())), s=9, color=colour)
    below.set_ylabel("entropy of the draft, nats")
    below.set_xlabel("token of the answer")


def plot_gates(axes: Any, gates: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """A panel for each number of requests: speed over plain steps, by gate, with quartiles."""
    for axis, requests in zip(axes, numbers_of_requests(gates), strict=True):
        entries = [entry for entry in gates if entry["requests"] == requests]
        shift = np.linspace(-0.3, 0.3, len(entries)) if len(entries) > 1 else [0.0]
        for offset, marker, entry in zip(shift, MARKERS, entries, strict=False):
            for place, name in enumerate(names):
                speed = entry["gates"][name]["speed_over_plain"]
                low, high = speed["quartiles"]
                middle = speed["median"]
                axis.errorbar(
                    place + offset,
                    middle,
                    yerr=[[middle - low], [high - middle]],
                    color=COLOURS[name.partition(" ")[0]],
                    marker=marker,
                    markersize=4,
                    linestyle="none",
                )
            axis.plot(
                [],
                [],
                color="#555555",
                marker=marker,
                linestyle="none",
                label=f"{entry['kind']}, temperature {entry['temperature']}",
            )
        axis.axhline(1, color="#b5541c", linewidth=0.8)
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axis.set_title(f"{requests} at a time")
        axis.margins(y=0.3)
        axis.legend(frameon=False, fontsize=7, loc="upper left", ncols=2)
    axes[0].set_ylabel("tokens per second over plain steps")


def numbers_of_requests(gates: Sequence[Mapping[str, Any]]) -> list[int]:
    """Ascending."""
    return sorted({entry["requests"] for entry in gates})


def write_pictures(
    results: Mapping[str, Any], answers: Mapping[str, Any], folder: Path
) -> list[str]:
    """Write both; returns their names.

    Args:
        answers: steps by the gate's name.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2,
        len(answers),
        figsize=(6 * len(answers), 5),
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for column, (name, steps) in zip(axes.T, answers.items(), strict=True):
        plot_answer(column, steps, name)
    names = ["speculation-answer.png", "speculation-gates.png"]
    figure.savefig(folder / names[0], dpi=110)
    panels = len(numbers_of_requests(results["gates"]))
    figure, axes = pyplot.subplots(
        1, panels, figsize=(4.8 * panels, 4.6), squeeze=False, layout="constrained"
    )
    plot_gates(axes[0], results["gates"], list(results["gate_options"]))
    figure.savefig(folder / names[1], dpi=110)
    return names


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description="Self-speculation in pictures.")
    parser.add_argument("--results", type=Path, default=RESULTS / "speculation-cpu.json")
    parser.add_argument("--answer", type=Path, default=RESULTS / "speculation-answer-cpu.json")
    parser.add_argument("--out", type=Path, help="default: beside the results")
    options = parser.parse_args()
    folder = options.out or options.results.parent
    results, answer = (
        json.loads(file.read_text(encoding="utf-8"))["results"]
        for file in (options.results, options.answer)
    )
    names = write_pictures(results, answer["trace"], folder)
    print(f"written to {folder}: {', '.join(names)}")


if __name__ == "__main__":
    main()
