# SPDX-License-Identifier: Apache-2.0
"""Policies in pictures: KL against speed, asked against spent, load as it comes and goes.

    python -m benchmarks.serving.policies_plot [--times FILE] [--quality FILE] [--out FOLDER]

Reads what `benchmarks.serving.policies` and `benchmarks.quality.budget` wrote for the same
checkpoint, and writes three PNG files beside the first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.run import RESULTS

STYLES = {
    # first word of a policy's name: (colour, marker, what it is)
    "level": ("#555555", "o", "a level of the ladder, static"),
    "static": ("#b5541c", "s", "static 8 bit"),
    "probe": ("#2f5d8a", "D", "policy budget, by the probe"),
    "none": ("#6fae75", "^", "policy budget, without a signal"),
    "entropy": ("#e9a03b", "v", "policy entropy"),
    "progressive": ("#8e5ea2", "P", "policy progressive"),
}


def mean_kl(quality: Mapping[str, Any], rows: str) -> dict[str, float]:
    """Mean over the texts of what each policy and level spent, by name."""
    sums: dict[str, list[float]] = {}
    for entry in quality["rows"][rows].values():
        results = {f"level {r['level']}": r for r in entry["static"]}
        results |= {f"{r['signal']} {r['asked_nats']}": r for r in entry["policies"]}
        results |= entry["others"] | {"static 8 bit": entry["8 bit"]}
        for name, result in results.items():
            sums.setdefault(name, []).append(result["summary"]["kl"])
    return {name: float(np.mean(values)) for name, values in sums.items()}


def plot_speed(axes: Any, times: Mapping[str, Any], quality: Mapping[str, Any]) -> None:
    """A panel for each number of rows that both files have."""
    for axis, rows in zip(axes, common_rows(times, quality), strict=True):
        kl, steps = mean_kl(quality, rows), times["steps"][rows]
        shown = set()
        for name in [n for n in steps if n in kl]:
            kind = name.partition(" ")[0]
            colour, marker, label = STYLES[kind]
            speed = 1 / np.array(steps[name]["ratios"])
            low, middle, high = np.quantile(speed, [0.25, 0.5, 0.75])
            axis.errorbar(
                kl[name],
                middle,
                yerr=[[middle - low], [high - middle]],
                color=colour,
                marker=marker,
                linestyle="none",
                label=None if kind in shown else label,
            )
            shown.add(kind)
        axis.set_xscale("log")
        axis.set_xlabel("mean KL to the unquantized model, nats per token")
        axis.set_title(f"{rows} at a time")
    axes[0].set_ylabel("tokens per second over static 8 bit")
    axes[0].legend(frameon=False, fontsize=8)


def common_rows(times: Mapping[str, Any], quality: Mapping[str, Any]) -> list[str]:
    """Numbers of rows in both, ascending."""
    return sorted(times["steps"].keys() & quality["rows"].keys(), key=int)


def plot_spent(axis: Any, quality: Mapping[str, Any]) -> None:
    """What the probe's policy spent of what it was asked, by text and rows."""
    markers = dict(zip(sorted(quality["rows"], key=int), "o^sDv", strict=False))
    texts = list(next(iter(quality["rows"].values())))
    colours = dict(zip(texts, ("#2f5d8a", "#b5541c", "#6fae75", "#8e5ea2"), strict=False))
    for rows, marker in markers.items():
        for text, entry in quality["rows"][rows].items():
            results = [r for r in entry["policies"] if r["signal"] == "probe"]
            axis.plot(
                [r["asked_nats"] for r in results],
                [r["summary"]["kl"] for r in results],
                marker=marker,
                color=colours[text],
                linestyle="none",
                label=f"{text}, {rows} at a time",
            )
    asked = np.array([0.008, 0.13])
    axis.plot(asked, asked, color="black", linewidth=0.8)
    within = quality["within"]
    axis.fill_between(asked, (1 - within) * asked, (1 + within) * asked, color="#dddddd")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("asked, nats per token")
    axis.set_ylabel("spent in the engine")
    axis.legend(frameon=False, fontsize=7)


def plot_load(axes: Any, load: Mapping[str, Any]) -> None:
    """Step times above, bits below, over the seconds of a run."""
    steps = load["steps"]
    seconds = np.array([step["seconds"] for step in steps])
    when = np.cumsum(seconds)
    rows = np.array([step["rows"] for step in steps])
    above, below = axes
    above.plot(when, seconds / load["full_seconds"], ".", markersize=2, color="#2f5d8a")
    share = load["target_over_full"]
    above.axhline(share, color="#b5541c", linewidth=1, label=f"asked: {share:.2f}")
    above.set_ylabel("step over a full one")
    above.set_ylim(0, 2)
    above.legend(frameon=False, fontsize=8)
    below.plot(when, [step["mean_bits"] for step in steps], color="#6fae75", label="mean bits")
    below.plot(when, rows / rows.max() * 8, color="#aaaaaa", label=f"rows, of {rows.max()}")
    below.set_ylim(0, 8.5)
    below.set_xlabel("seconds")
    below.legend(frameon=False, fontsize=8)


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description="Policies in pictures.")
    parser.add_argument("--times", type=Path, default=RESULTS / "policies-cpu.json")
    parser.add_argument("--quality", type=Path, default=RESULTS / "budget.json")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    times = json.loads(options.times.read_text(encoding="utf-8"))["results"]
    quality = json.loads(options.quality.read_text(encoding="utf-8"))["results"]
    panels = len(common_rows(times, quality))
    if not panels:
        raise SystemExit(f"{options.times} and {options.quality} have no number of rows in common")
    figure, axes = pyplot.subplots(
        1, panels, figsize=(4.8 * panels, 4.2), squeeze=False, layout="constrained"
    )
    plot_speed(axes[0], times, quality)
    figure.savefig(options.out / "policies-speed.png", dpi=110)
    figure, axis = pyplot.subplots(figsize=(5, 4.5), layout="constrained")
    plot_spent(axis, quality)
    figure.savefig(options.out / "policies-spent.png", dpi=110)
    loads = times["load"]["runs"]
    figure, axes = pyplot.subplots(
        2, len(loads), figsize=(5.5 * len(loads), 5), squeeze=False, layout="constrained"
    )
    for column, load in zip(axes.T, loads, strict=True):
        plot_load(column, load)
    figure.savefig(options.out / "policies-load.png", dpi=110)
    print(f"written to {options.out}: policies-speed.png, policies-spent.png, policies-load.png")


if __name__ == "__main__":
    main()
