# SPDX-License-Identifier: Apache-2.0
"""The whole report: its sections in order, and its pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import figures, load, papers, policies, quality, speed, tasks, vllm_bench
from benchmarks.report.origin import commit_words, machine_words, model_words, versions_words
from benchmarks.report.text import paragraphs, picture, table

Results = Mapping[str, Mapping[str, Any]]
"""Content of each JSON file of a folder, by its name without the ending."""

SECTIONS = {
    "quality": ("Quality of what is decoded", quality.section),
    "replay": ("Requests that come and go", load.section),
    "vllm-bench": ("vLLM's own benchmarks", vllm_bench.section),
    "tasks": ("Tasks", tasks.section),
    "policies": ("Policies in one engine", policies.section),
    "papers": ("What papers report, and what we measure", papers.section),
}


def read_results(folder: Path) -> Results:
    """What stages wrote into `folder`."""
    names = ("speed", *SECTIONS)
    files = {name: folder / f"{name}.json" for name in names}
    return {n: json.loads(f.read_text(encoding="utf-8")) for n, f in files.items() if f.is_file()}


def title(results: Results) -> str:
    """Of the page."""
    facts = next(iter(results.values()))["provenance"]
    return f"vllm-flexquant on {facts['machine']['cores']} cores of {facts['machine']['cpu']}"


def pictures(results: Results, folder: Path) -> None:
    """Draw all pictures of the page into `folder`."""
    if "speed" in results:
        found = results["speed"]["results"]
        few = [b for b in speed.batches_of(found) if b in ("1", "16")]
        base = speed.base_of(found, results["speed"]["provenance"])
        paint = figures.speed_picture(found["configurations"], few, base)
        figures.draw_all(folder, "quality-speed", paint)
    if "quality" in results:
        quality.draw(results["quality"]["results"], folder)
    if "replay" in results:
        load.draw(results["replay"]["results"], folder)


def markdown(results: Results) -> str:
    """The page, as Markdown."""
    facts = next(iter(results.values()))["provenance"]
    parts = [
        f"# {title(results)}",
        f"{model_words(facts)}; {versions_words(facts)}; {machine_words(facts)}. Written by "
        "`python -m benchmarks.report` from the JSON files in this folder, nothing by hand. Speeds "
        "are ratios within one interleaved run. KL is of the served distribution to the "
        "unquantized checkpoint's in fp32, in nats per token, while the engine decodes.",
    ]
    if "speed" in results:
        found = results["speed"]
        base = speed.base_of(found["results"], found["provenance"])
        parts += [
            "## Quality against speed",
            picture("quality-speed", "KL against speed of all systems"),
            speed.section(found["results"], found["provenance"]),
            "### At equal quality",
            speed.DUELS,
            speed.duel_table(found["results"], base),
            "### Where static wins",
            speed.losses(found["results"], base) or "Nowhere, in this run.",
        ]
    for name, (heading, write) in SECTIONS.items():
        if name in results:
            content = results[name]
            parts += [f"## {heading}", write(content["results"], content["provenance"])]
    return paragraphs(*parts, "## Where each figure is from", origins(results)) + "\n"


def origins(results: Results) -> str:
    """A line for each file: what wrote it, when, on which commit, how busy the machine was."""
    rows = []
    for name, content in results.items():
        facts = content["provenance"]
        rows.append(
            [
                f"[{name}.json]({name}.json)",
                f"`{facts['command']}`",
                facts["time_utc"],
                commit_words(facts),
                ", ".join(f"{load:g}" for load in facts["machine"]["load_average"]),
            ]
        )
    return table(["file", "command", "began", "sources", "load before"], rows)
