# SPDX-License-Identifier: Apache-2.0
"""Of the stage `papers`: claims beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.report.text import paragraphs, table

WORDS = (
    "*Quoted* is what a paper reports, *measured* is ours. Their models have 7 to 9 billion "
    "weights, "
    "on GPUs; ours has 135 million, on CPU cores: the columns say what was claimed and what we "
    "see, "
    "and are not to be divided by each other."
)


def whole(results: Mapping[str, Any], notes: bool) -> str:
    """A line for each claim."""
    rows = []
    for row in results["rows"]:
        measured = row["ours"] != "not measured"
        ours = f"measured: {row['ours']}" if measured else f"not measured; {row['source']}"
        cells = [
            row["system"],
            f"quoted: {row['claim']} ({row['paper']}; {row['quoted_from']})",
            ours + (f" ({row['source']})" if measured and notes else ""),
        ]
        rows.append([*cells, row["comparable"]] if notes else cells)
    headings = ["system", "their claim", "ours"]
    return table([*headings, "what can be compared"] if notes else headings, rows)


def section(results: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """All of it."""
    return paragraphs(WORDS, whole(results, notes=True))


def short(results: Mapping[str, Any]) -> str:
    """For the README."""
    return paragraphs(WORDS, whole(results, notes=False))
