# SPDX-License-Identifier: Apache-2.0
"""Pictures of the report, each as SVG for a light page and for a dark one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.serving.summary import over

THEMES = {
    "light": {"text": "#1f2328", "faint": "#d0d7de"},
    "dark": {"text": "#e6edf3", "faint": "#3d444d"},
}
FAMILIES: dict[str, tuple[str, str, str]] = {
    # name in the legend: colour that reads on both pages, marker, line
    "vLLM, unquantized": ("#8b949e", "s", ""),
    "vLLM W8A8": ("#db6d28", "D", ""),
    "vLLM W4A16": ("#d4a72c", "D", ""),
    "llama.cpp": ("#a371f7", "^", ""),
    "flexquant, rounded to nearest": ("#8ab4e8", "o", ":"),
    "flexquant, calibrated, one width": ("#2f81f7", "o", "-"),
    "flexquant, policy budget": ("#2da44e", "*", "-"),
}
LINEAR_BELOW = 1e-3
"""KL in nats below which the axis is linear, so that 0 has a place on it."""


def family(name: str) -> str:
    """Which family of `FAMILIES` a configuration of the speed stage belongs to."""
    for start, found in (
        ("w8a8", "vLLM W8A8"),
        ("w4a16", "vLLM W4A16"),
        ("llama", "llama.cpp"),
        ("calibrated", "flexquant, calibrated, one width"),
        ("budget", "flexquant, policy budget"),
        ("flexquant", "flexquant, rounded to nearest"),
    ):
        if name.startswith(start):
            return found
    return "vLLM, unquantized"


@contextmanager
def themed(theme: str) -> Iterator[Any]:
    """pyplot, set up for a page; text stays text, so that a page's reader can select it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = THEMES[theme]
    style: dict[str, Any] = {
        "font.size": 10,
        "font.family": "sans-serif",
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.linewidth": 0.5,
        "grid.color": colours["faint"],
        "axes.edgecolor": colours["faint"],
        "legend.frameon": False,
    }
    style |= dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colours["text"]
    )
    with pyplot.rc_context(style):
        yield pyplot


def draw_all(folder: Path, name: str, paint: Callable[[Any, str], Any]) -> None:
    """Write `NAME-light.svg` and `NAME-dark.svg`.

    Args:
        paint: makes the figure, given pyplot and the name of the theme.
    """
    for theme in THEMES:
        with themed(theme) as pyplot:
            figure = paint(pyplot, theme)
            figure.savefig(
                folder / f"{name}-{theme}.svg", transparent=True, metadata={"Date": None}
            )
            pyplot.close(figure)


def speed_picture(configurations: Mapping[str, Any], batches: Sequence[str], base: str) -> Any:
    """KL against speed over that of the configuration `base`, a panel for each of `batches`; what
    `draw_all` wants."""

    def paint(pyplot: Any, theme: str) -> Any:
        figure, axes = pyplot.subplots(
            1, len(batches), figsize=(5.4 * len(batches), 5.2), squeeze=False, layout="constrained"
        )
        for axis, batch in zip(axes[0], batches, strict=True):
            _speed_panel(axis, configurations, batch, base, THEMES[theme]["text"])
        axes[0][0].set_ylabel(f"tokens per second while decoding, times {base}'s")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        return figure

    return paint


def _speed_panel(
    axis: Any, configurations: Mapping[str, Any], batch: str, base: str, text: str
) -> None:
    points: dict[str, list[tuple[float, float, str]]] = {}
    for name, entry in configurations.items():
        ratio = over(entry, configurations[base], batch)
        if ratio is None:
            continue
        kl, middle = max(entry["quality"]["kl"], 0.0), ratio["median"]
        low, high = ratio["quartiles"]
        colour, marker, _ = FAMILIES[family(name)]
        axis.errorbar(
            [kl], [middle], yerr=[[middle - low], [high - middle]], color=colour, elinewidth=1
        )
        points.setdefault(family(name), []).append((kl, middle, short_label(entry["label"])))
    for found, (colour, marker, line) in FAMILIES.items():
        if found not in points:
            continue
        own = sorted(points[found])
        xs, ys = [p[0] for p in own], [p[1] for p in own]
        size = 11 if marker == "*" else 7
        style = {"linestyle": line or "none", "color": colour, "marker": marker, "label": found}
        axis.plot(xs, ys, markersize=size, **style)
        for x, y, label in own:
            axis.annotate(
                label, (x, y), textcoords="offset points", xytext=(6, 5), fontsize=8, color=text
            )
    axis.axhline(1.0, color=text, linewidth=0.6, alpha=0.4)
    axis.set_xscale("symlog", linthresh=LINEAR_BELOW)
    most = max(kl for own in points.values() for kl, _, _ in own)
    axis.set_xlim(-LINEAR_BELOW / 3, 2.2 * max(most, LINEAR_BELOW))
    axis.set_ylim(bottom=0)
    axis.set_title(f"{batch} request{'' if batch == '1' else 's'} at a time")
    axis.set_xlabel("KL to the unquantized model, nats per token (better to the left)")


def short_label(label: str) -> str:
    """`flexquant 8 bit, calibrated` as `8`, `llama.cpp Q8_0` as `Q8_0`."""
    for word in ("flexquant ", "llama.cpp ", ", calibrated", " bit", "budget ", ", bf16 output"):
        label = label.replace(word, "")
    return label
