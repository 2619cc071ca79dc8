# SPDX-License-Identifier: Apache-2.0
"""Of the stage `quality`: KL, top-1 and perplexity of every configuration, by text."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from pathlib import Path
from typing import Any

from benchmarks.report.figures import FAMILIES, THEMES, draw_all, family
from benchmarks.report.text import listing, nats, paragraphs, percent, picture, table

LEVEL = "flexquant, calibrated, one width"
"""Levels of the ladder are drawn as one family with uniform widths."""


def texts_of(results: Mapping[str, Any]) -> list[str]:
    """Names of the texts."""
    return list(next(iter(results["configurations"].values()))["texts"])


def section(results: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Tables and the picture."""
    texts = texts_of(results)
    rows = []
    for entry in results["configurations"].values():
        cells = [entry["label"]]
        for text in texts:
            q = entry["texts"][text]
            ratio, low, high = q["perplexity_ratio"]
            bits = q["mean_bits"]
            cells += [
                "–" if bits is None else f"{bits:.2f}",
                nats(q["kl"], q["kl_standard_error"]),
                f"{q['kl_99']:.3f}",
                percent(q["top1"]),
                f"{ratio:.3f} ({low:.3f}–{high:.3f})",
            ]
        rows.append(cells)
    headings = [""]
    for text in texts:
        headings += [f"{text}: bits", "KL", "99th percentile", "top-1", "perplexity ratio"]
    some = next(iter(results["configurations"].values()))["texts"]
    tokens = ", ".join(f"{q['tokens']} of {text}" for text, q in some.items())
    seen = results["texts_seen_in_calibration"]
    return paragraphs(
        picture("quality-bits", "KL against mean bits"),
        f"Tokens: {tokens}, {results['settings']['rows']} sequences at a time. The perplexity "
        "ratio is "
        "over the reference's on the same tokens, with its 95 % interval over sequences."
        + (f" The calibrated checkpoint has seen {' and '.join(seen)}." if seen else ""),
        table(headings, rows),
        "### Dynamic policies beside static levels",
        "KL over that of a static level of the ladder with the same mean bits (below 1 the policy "
        "is "
        "better), and mean bits saved over a level of the same KL; – where no level has it.",
        levels(results),
        listing(results["unavailable"]),
    )


def levels(results: Mapping[str, Any]) -> str:
    """A line for each policy."""
    texts = texts_of(results)
    rows = []
    for entry in results["configurations"].values():
        found = [entry["texts"][text].get("static_level") for text in texts]
        if any(found):
            cells = [entry["label"]]
            for level in found:
                cells += (
                    ["–", "–"]
                    if level is None
                    else [
                        f"{level['kl_over_it']:.2f}",
                        signed(level["bits_saved_at_equal_kl"]),
                    ]
                )
            rows.append(cells)
    headings = [""]
    for text in texts:
        headings += [f"{text}: KL over a level's", "bits saved"]
    return table(headings, rows) if rows else ""


def signed(bits: float | None) -> str:
    """With its sign, to two digits; – where it is not known."""
    return "–" if bits is None or isnan(bits) else f"{bits:+.2f}"


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """KL against mean bits, a panel for each text."""
    texts = texts_of(results)

    def paint(pyplot: Any, theme: str) -> Any:
        figure, axes = pyplot.subplots(
            1, len(texts), figsize=(4.2 * len(texts), 4.2), squeeze=False, layout="constrained"
        )
        for axis, text in zip(axes[0], texts, strict=True):
            points: dict[str, list[tuple[float, float]]] = {}
            for name, entry in results["configurations"].items():
                quality = entry["texts"][text]
                if quality["mean_bits"] is not None and quality["kl"] > 0:
                    own = LEVEL if name.startswith("level") else family(name)
                    points.setdefault(own, []).append((quality["mean_bits"], quality["kl"]))
            for name, (colour, marker, line) in FAMILIES.items():
                if name in points:
                    xs, ys = zip(*sorted(points[name]), strict=True)
                    style = {"linestyle": line or "none", "color": colour, "marker": marker}
                    axis.plot(xs, ys, label=name, **style)
            axis.set_yscale("log")
            axis.set_xlim(3.5, 17)
            axis.set_title(text, color=THEMES[theme]["text"])
            axis.set_xlabel("mean bits of the decode steps")
        axes[0][0].set_ylabel("KL, nats per token")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        return figure

    draw_all(folder, "quality-bits", paint)
