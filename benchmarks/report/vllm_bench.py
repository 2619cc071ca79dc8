# SPDX-License-Identifier: Apache-2.0
"""Of the stage `vllm-bench`: what vLLM's own tools say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.report.text import listing, nats, paragraphs, ratio, table


def section(results: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """`vllm bench serve` by requests at a time, and `vllm bench throughput`."""
    entries, settings = results["configurations"], results["settings"]
    columns = list(next(iter(entries.values()))["serve"])
    baseline = settings["baseline"]
    rows, base = [], (entries[baseline]["throughput"] or {}).get("tokens_per_second")
    for entry in entries.values():
        cells = [
            entry["label"],
            nats(entry["quality"]["kl"], entry["quality"]["kl_standard_error"]),
        ]
        for together in columns:
            found = entry["serve"][together]
            cells.append(
                f"{ratio(found['against'][baseline])}; {found['median_tpot_ms']['median']:.0f}, "
                f"{found['p99_tpot_ms']['median']:.0f}"
            )
        whole = entry["throughput"]
        cells.append("–" if not whole or not base else f"{whole['tokens_per_second'] / base:.2f}")
        rows.append(cells)
    headings = ["", "KL", *(f"serve, {n} at a time" for n in columns), "throughput"]
    return paragraphs(
        f"`vllm bench serve`, random prompts of {settings['input_tokens']} tokens and "
        f"{settings['output_tokens']} tokens each, {settings['rounds']} rounds: output tokens per "
        f"second over {baseline}'s of the same round; then median and 99th percentile of the time "
        f"per output token in ms. `vllm bench throughput`: tokens per second over {baseline}'s, "
        "one run each, not interleaved.",
        table(headings, rows),
        f"As a command: `{settings['serve_command']}`",
        listing(results["unavailable"]),
    )
