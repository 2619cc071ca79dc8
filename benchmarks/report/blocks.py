# SPDX-License-Identifier: Apache-2.0
"""Blocks of the README: from the content of one file of results, and its path, Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from benchmarks.report import load as load_section
from benchmarks.report import papers as papers_section
from benchmarks.report import speed
from benchmarks.report import tasks as tasks_section
from benchmarks.report.origin import origin
from benchmarks.report.text import nats, paragraphs, percent, picture, table

Content = Mapping[str, Any]

HEADLINE = (
    *("fp32", "bf16", "w8a8", "w4a16", "llama-q8_0", "llama-q4_k_m", "llama-q4_0"),
    *("calibrated-8", "calibrated-6", "calibrated-4", "budget-0.01", "budget-0.03", "budget-0.1"),
)
"""Configurations of the README's first table, where they were measured."""

FEW = ("1", "4", "16", "32", speed.PROMPT)


def demo(content: Content, file: str) -> str:
    """What `make demo` ends with."""
    rows, base = [], content["results"].get("baseline", "bf16")
    for name, entry in content["results"]["policies"].items():
        ratio = entry.get("speed_to_baseline", entry.get("speed_to_bf16"))
        chat, text = entry["chat_steps"], entry["text"]
        rows.append(
            [
                f"{name}, no flexquant" if name == base else name,
                f"{ratio:.2f}",
                f"{chat['mean_bits']:.2f}",
                f"{chat['bytes_per_step'] / 1e6:.0f}",
                f"{entry['text_steps']['mean_bits']:.2f}",
                nats(text["kl"], text["kl_standard_error"]),
                percent(text["top1"]),
            ]
        )
    headings = ["policy", f"speed against {base}", "mean bits, chat", "MB of weights per step"]
    headings += ["mean bits, text", "KL on the text, nats per token", "top-1"]
    return paragraphs(table(headings, rows), origin(file, content["provenance"]))


def headline(content: Content, file: str) -> str:
    """All systems in one picture, and the lines of most interest."""
    results = content["results"]
    configurations = results["configurations"]
    base = speed.base_of(results, content["provenance"])
    batches = [batch for batch in speed.batches_of(results) if batch in FEW]
    rows = [
        [
            entry["label"],
            nats(entry["quality"]["kl"], entry["quality"]["kl_standard_error"]),
            *(ratio_only(speed.speed_over(configurations, name, batch, base)) for batch in batches),
        ]
        for name, entry in configurations.items()
        if name in HEADLINE
    ]
    folder = f"{PurePosixPath(file).parent}/"
    return paragraphs(
        picture("quality-speed", "KL against speed of all systems", folder),
        table(["", "KL", *map(speed.heading, batches)], rows),
        f"Tokens per second as a multiple of {base}'s in the same round, medians of "
        f"{results['settings']['rounds']} rounds. {speed.no_bf16(base)}",
        f"[All systems, quartiles, load, tasks, papers]"
        f"({folder}report.md). {origin(file, content['provenance'])}",
    )


def ratio_only(spread: Mapping[str, Any] | None) -> str:
    """The median alone."""
    return "–" if spread is None else f"{spread['median']:.2f}"


def static_wins(content: Content, file: str) -> str:
    """Where a static choice is faster at no more KL, or nearer to the reference."""
    results = content["results"]
    base = speed.base_of(results, content["provenance"])
    return paragraphs(
        speed.DUELS,
        speed.duel_table(results, base),
        "So a static choice is the better one for:",
        speed.losses(results, base) or "- nothing, in this run.",
        origin(file, content["provenance"]),
    )


def load(content: Content, file: str) -> str:
    """Requests that come and go."""
    section = load_section.short(content["results"])
    return paragraphs(section, origin(file, content["provenance"]))


def tasks(content: Content, file: str) -> str:
    """Accuracy with intervals."""
    return paragraphs(tasks_section.short(content["results"]), origin(file, content["provenance"]))


def papers(content: Content, file: str) -> str:
    """Claims of papers beside ours."""
    return paragraphs(papers_section.short(content["results"]), origin(file, content["provenance"]))
