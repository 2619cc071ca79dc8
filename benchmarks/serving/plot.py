# SPDX-License-Identifier: Apache-2.0
"""Speed against KL, one picture per batch size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FAMILIES = {
    # engine: (colour, marker)
    "bf16": ("#555555", "s"),
    "fp32": ("#999999", "s"),
    "w8a8": ("#b5541c", "D"),
    "w4a16": ("#e9a03b", "D"),
    "w4a16-weights-only": ("#e9a03b", "d"),
    "flexquant": ("#2f5d8a", "o"),
    "flexquant-bf16-output": ("#6fae75", "o"),
}
LINEAR_BELOW = 1e-3


def plot_speeds(results: Mapping[str, Any], beside: Path) -> list[Path]:
    """Write a PNG and an SVG beside the JSON file `beside`; returns their paths.

    Args:
        results: as `benchmarks.serving.run` writes them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = results["configurations"]
    worst = max(entry["quality"]["kl"] for entry in entries.values())
    batches = list(next(iter(entries.values()))["decode_tokens_per_second"])
    style: dict[str, Any] = {"font.size": 11, "svg.hashsalt": "serving"}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(
            1, len(batches), figsize=(5 * len(batches), 5), squeeze=False, layout="constrained"
        )
        for axis, batch in zip(axes[0], batches, strict=True):
            families: dict[str, list[tuple[float, float]]] = {}
            for name, entry in entries.items():
                speed = entry["decode_tokens_per_second"][batch]
                ratio = speed["against"].get("bf16", {"median": 1.0, "quartiles": [1.0, 1.0]})
                colour, marker = FAMILIES.get(entry["engine"], ("#000000", "x"))
                kl, middle = entry["quality"]["kl"], ratio["median"]
                low, high = ratio["quartiles"]
                axis.errorbar(
                    [kl],
                    [middle],
                    yerr=[[middle - low], [high - middle]],
                    color=colour,
                    marker=marker,
                    markersize=8,
                    capsize=3,
                    label=entry["label"] if entry["width"] is None else None,
                )
                families.setdefault(entry["engine"], []).append((kl, middle))
                if entry["width"] is not None:
                    axis.annotate(
                        f"{entry['width']}",
                        (kl, middle),
                        textcoords="offset points",
                        xytext=(7, 5),
                        color=colour,
                        gid=name,
                    )
            for engine, points in families.items():
                if engine.startswith("flexquant"):
                    output = "bf16 output" if engine != "flexquant" else "one copy"
                    xs, ys = zip(*sorted(points), strict=True)
                    colour, marker = FAMILIES[engine]
                    label = f"flexquant, {output}: bits"
                    axis.plot(xs, ys, color=colour, marker=marker, linewidth=1.4, label=label)
            axis.axhline(1.0, color="#cccccc", linewidth=0.8, zorder=0)
            axis.set_xscale("symlog", linthresh=LINEAR_BELOW)
            axis.set_xlim(-LINEAR_BELOW / 4, 2.5 * max(worst, LINEAR_BELOW))
            axis.set_ylim(bottom=0)
            axis.set_title(f"batch {batch}")
            axis.set_xlabel("KL to fp32, nats per token")
        axes[0][0].set_ylabel("decode tokens per second, times bf16's")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        paths = [beside.with_suffix(".png"), beside.with_suffix(".svg")]
        beside.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(paths[0], dpi=120, facecolor="white")
        figure.savefig(paths[1], facecolor="white", metadata={"Date": None})
        pyplot.close(figure)
    return paths
