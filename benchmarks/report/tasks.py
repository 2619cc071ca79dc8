# SPDX-License-Identifier: Apache-2.0
"""Of the stage `tasks`: shares with intervals and paired tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.report.text import listing, paragraphs, percent, table

NAMES = {
    "hellaswag": "HellaSwag",
    "truthfulqa": "TruthfulQA MC1",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
}
MEASURES = {
    "accuracy": "",
    "accuracy_by_bytes": ", by bytes",
    "as_reference": ", answers word for word the reference's",
    "pass_at_1": ", pass@1",
}


def columns_of(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Tasks and measures."""
    found = []
    for task, entries in results["tasks"].items():
        some = dict.fromkeys(measure for entry in entries.values() for measure in entry)
        found += [(task, measure) for measure in some]
    return found


def cell(found: Mapping[str, Any] | None) -> str:
    """`31.7 % (21.3–44.2), p 0.69`."""
    if not found:
        return "–"
    low, high = found["interval"]
    p = f", p {found['p']:.2f}" if "p" in found else ""
    return f"{percent(found['share'])} ({100 * low:.0f}–{100 * high:.0f}){p}"


def whole(results: Mapping[str, Any], columns: list[tuple[str, str]]) -> str:
    """A line for each configuration."""
    rows = []
    for name, label in results["labels"].items():
        cells = [cell(results["tasks"][task].get(name, {}).get(m)) for task, m in columns]
        if any(c != "–" for c in cells):
            rows.append([label, *cells])
    heads = []
    for task, measure in columns:
        some = next(e[measure] for e in results["tasks"][task].values() if measure in e)
        heads.append(f"{NAMES[task]}{MEASURES[measure]} ({some['items']})")
    return table(["", *heads], rows)


WORDS = (
    "Scored while decoding, on subsets (how many items stands in the heading); share, 95 % "
    "interval, "
    "and p of the exact McNemar test against fp32 on the same items."
)


def section(results: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """All tasks."""
    return paragraphs(WORDS, whole(results, columns_of(results)), listing(results["unavailable"]))


def short(results: Mapping[str, Any]) -> str:
    """For the README: one measure of each task."""
    columns = [c for c in columns_of(results) if c[1] != "accuracy_by_bytes"]
    return paragraphs(WORDS, whole(results, columns), listing(results["unavailable"]))
