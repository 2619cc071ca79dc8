# SPDX-License-Identifier: Apache-2.0
"""Markdown in small pieces, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a `|` in a cell is escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(headings), line(["---"] * len(headings)), *map(line, rows)])


def picture(name: str, words: str, folder: str = "") -> str:
    """Markdown of a picture that `figures.draw_all` wrote, for a light and for a dark page."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{folder}{name}-dark.svg">'
        f'<img alt="{words}" src="{folder}{name}-light.svg"></picture>'
    )


def paragraphs(*parts: str) -> str:
    """Those that are not empty, with a line between them."""
    return "\n\n".join(part for part in parts if part)


def nats(kl: float, error: float | None = None) -> str:
    """KL in nats, to four digits behind the point, zero without a sign; and its standard error."""
    return f"{kl:z.4f}" + ("" if error is None else f" ± {error:.4f}")


def ratio(spread: Mapping[str, Any] | None) -> str:
    """A median, and its quartiles where there are some: `1.25 (1.20–1.31)`."""
    if spread is None:
        return "–"
    low, high = spread["quartiles"]
    return f"{spread['median']:.2f}" + (f" ({low:.2f}–{high:.2f})" if low != high else "")


def percent(share: float, digits: int = 1) -> str:
    """`0.934` as `93.4 %`."""
    return f"{100 * share:.{digits}f} %"


def listing(unavailable: Mapping[str, str]) -> str:
    """What could not be measured, and why."""
    if not unavailable:
        return ""
    return (
        "Not measured: " + "; ".join(f"{n}: {r.rstrip('.')}" for n, r in unavailable.items()) + "."
    )
