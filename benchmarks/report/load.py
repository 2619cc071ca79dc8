# SPDX-License-Identifier: Apache-2.0
"""Of the stage `replay`: latencies and KL while requests come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any

from benchmarks.report.figures import draw_all
from benchmarks.report.text import listing, nats, paragraphs, percent, picture, table

LINES = {
    "bf16": "#8b949e",
    "fp32": "#8b949e",
    "w8a8": "#db6d28",
    "w4a16": "#d4a72c",
    "calibrated-8": "#2f81f7",
    "flexquant-8": "#2f81f7",
    "budget-load": "#2da44e",
    "load": "#a371f7",
}
"""Configurations that are drawn."""


def section(results: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """What was replayed, and a table for each load."""
    parts = [words(results), picture("replay-burst", "requests under way and time per token")]
    for load, found in results["loads"].items():
        parts += [f"### {load}", offered(results, load), load_table(found)]
    return paragraphs(*parts, listing(results["unavailable"]))


def words(results: Mapping[str, Any]) -> str:
    """What was replayed."""
    trace, targets = results["trace"], results["settings"]["targets"]
    name = "A trace that was made up" if trace["made_up"] else f"`{trace['name']}`"
    (prompt, answer), (own_prompt, own_answer) = (
        trace["means"]["trace"],
        trace["means"]["replayed"],
    )
    return (
        f"{name} ({trace['requests']} requests; means {prompt:.0f} and {answer:.0f} tokens of "
        f"prompt and answer), lengths divided by {trace['divided_by']} and clipped (means "
        f"{own_prompt:.0f} and {own_answer:.0f}), {results['settings']['seconds']:g} s a run, "
        "which ends with the last answer. Capacity is what static 8 bit does with 16 requests "
        f"under way, {results['capacity']['tokens_per_second']:.0f} tokens a second. Within the "
        f"targets is a request whose first token came within {targets['first_token_seconds']:.2f} "
        f"s and whose others took {1e3 * targets['token_seconds']:.0f} ms each at the most. One "
        f"token of {results['settings']['compared_token_of']} was compared with the reference "
        f"meanwhile. Policies named *load* keep {1e3 * targets['token_seconds']:.0f} ms a token "
        "(`target_ms`) and may run prompts at less than all bits for it (`prefill=policy`). "
        f"{results['settings']['rounds']} rounds, in which the systems take turns."
    )


def offered(results: Mapping[str, Any], load: str) -> str:
    """What was asked for in a load, as it came out."""
    parts = []
    stretches = results["settings"]["loads"][load]
    for stretch, found in zip(stretches, results["offered"][load], strict=True):
        parts.append(
            f"{found['share']:.2f} of capacity for {stretch['seconds']:.0f} s "
            f"({found['requests']} requests)"
        )
    return f"Offered: {', then '.join(parts)}."


def load_table(found: Mapping[str, Any]) -> str:
    """A line for each configuration."""
    rows = []
    for entry in found.values():
        first, each = entry["first_token_seconds"], entry["token_seconds"]
        whole, quality, bits = entry["request_seconds"], entry["quality"], entry["mean_bits"]
        rows.append(
            [
                entry["label"],
                f"{entry['tokens_per_second']:.0f}",
                " / ".join(f"{first[p]:.2f}" for p in ("p50", "p95", "p99")),
                " / ".join(f"{1e3 * each[p]:.0f}" for p in ("p50", "p95", "p99")),
                " / ".join(f"{whole[p]:.2f}" for p in ("p50", "p90", "p99")),
                percent(entry["within_targets"], 0),
                f"{entry['failed']:g} of {entry['requests']:g}",
                "–" if bits is None else f"{bits:.2f}",
                nats(quality["kl"], quality["kl_standard_error"]),
                f"{quality['kl_99']:.3f}",
                f"{exp(quality['nll']):.2f}",
            ]
        )
    headings = ["", "tokens/s", "first token, s: p50 / p95 / p99", "per token, ms: p50 / p95 / p99"]
    headings += ["request, s: p50 / p90 / p99", "within targets", "failed", "mean bits", "KL"]
    return table([*headings, "KL, 99th percentile", "perplexity"], rows)


def short(results: Mapping[str, Any]) -> str:
    """For the README: what was replayed, and the burst."""
    parts = [words(results)]
    for load, found in results["loads"].items():
        rows = []
        for entry in found.values():
            bits = entry["mean_bits"]
            rows.append(
                [
                    entry["label"],
                    f"{entry['first_token_seconds']['p95']:.2f}",
                    f"{1e3 * entry['token_seconds']['p95']:.0f}",
                    percent(entry["within_targets"], 0),
                    "–" if bits is None else f"{bits:.2f}",
                    nats(entry["quality"]["kl"], entry["quality"]["kl_standard_error"]),
                ]
            )
        headings = [load, "first token p95, s", "per token p95, ms"]
        parts += [
            table([*headings, "within targets", "mean bits", "KL"], rows),
            offered(results, load),
        ]
    return paragraphs(*parts)


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Requests under way, time per token and mean bits along the burst."""
    found = results["loads"].get("burst")
    if not found:
        return
    target = results["settings"]["targets"]["token_seconds"]

    def paint(pyplot: Any, theme: str) -> Any:
        figure, (above, below, last) = pyplot.subplots(
            3, 1, figsize=(9, 7.4), sharex=True, layout="constrained"
        )
        for name, colour in LINES.items():
            if name not in found:
                continue
            series, label = found[name]["series"], found[name]["label"]
            above.plot(series["under_way"], color=colour, label=label)
            _along(below, series["token_seconds"], 1e3, colour)
            _along(last, series["bits"], 1.0, colour)
        below.axhline(1e3 * target, color="#cf222e", linewidth=0.9, linestyle="--")
        above.set_ylabel("requests under way")
        below.set_ylabel("ms per token, median")
        below.set_ylim(bottom=0)
        last.set_ylabel("mean bits")
        last.set_xlabel("seconds; dashed: the target")
        figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return figure

    draw_all(folder, "replay-burst", paint)


def _along(axis: Any, values: Sequence[float | None], scale: float, colour: str) -> None:
    known = [(second, scale * v) for second, v in enumerate(values) if v is not None]
    axis.plot([second for second, _ in known], [v for _, v in known], color=colour)
