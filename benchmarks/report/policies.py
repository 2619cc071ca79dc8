# SPDX-License-Identifier: Apache-2.0
"""Of the stage `policies`: what policies cost and save in time, in one engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.report.text import paragraphs, percent, table


def section(results: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Time of a decode step by policy, and the machinery's share of one."""
    steps = results["steps"]
    rows = []
    for name in next(iter(steps.values())):
        cells = [name]
        for found in steps.values():
            cells += [f"{found[name]['mean_bits']:.2f}", f"{found[name]['time_over_8_bit']:.3f}"]
        rows.append(cells)
    headings = ["policy"]
    for batch in steps:
        headings += [f"mean bits, {batch}", f"time, {batch}"]
    shares = ", ".join(
        f"{percent(found['machinery_share'], 2)} at {batch}"
        for batch, found in results["owners"].items()
    )
    return paragraphs(
        "Time of a decode step over static 8 bit's of the same round, by number of requests; one "
        "engine on the calibrated checkpoint, policies in turn.",
        table(headings, rows),
        f"The machinery (batch facts, decision, probe, entropy, accounts) takes so much of a step "
        f"by a clock around each part: {shares}.",
    )
