# SPDX-License-Identifier: Apache-2.0
"""What the counters of self-speculation say of the steps between two looks at them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SUMS = ("verified", "steps", "plain_steps", "tokens", "draft_seconds", "verify_seconds")


def read_counts(speculation: Any) -> dict[str, Any]:
    """Of a `SelfSpeculation`, as plain values: `drafted` and `kept` by position from 0, `SUMS`."""
    counts = speculation.counts
    return {
        "drafted": [counts.drafted[i] for i in range(len(counts.drafted))],
        "kept": [counts.kept[i] for i in range(len(counts.drafted))],
        **{name: getattr(counts, name) for name in SUMS},
    }


def between(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What was added."""
    found: dict[str, Any] = {name: after[name] - before[name] for name in SUMS}
    for name in ("drafted", "kept"):
        earlier = [*before[name], *[0] * (len(after[name]) - len(before[name]))]
        found[name] = [a - b for a, b in zip(after[name], earlier, strict=True)]
    longest = sum(count > 0 for count in found["drafted"])
    return found | {name: found[name][:longest] for name in ("drafted", "kept")}


def add_up(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums of several runs."""
    found: dict[str, Any] = {name: sum(part[name] for part in parts) for name in SUMS}
    for name in ("drafted", "kept"):
        longest = max((len(part[name]) for part in parts), default=0)
        found[name] = [
            sum(part[name][i] for part in parts if i < len(part[name])) for i in range(longest)
        ]
    return found


def shares(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of what was drafted, None where nothing was.

    by_position: share of the drafts at each position that were kept. chance: that a draft is kept
    if all before it were. accepted_length: tokens per answer and step that verified drafts.
    drafting: share of the steps of decoding that verified drafts.
    """
    drafted, kept = counts["drafted"], counts["kept"]
    # a draft was looked at if the one before it was kept; of longer drafts not all have a next one
    reached = sum(drafted[:1]) + sum(min(d, k) for d, k in zip(drafted[1:], kept, strict=False))
    steps = counts["steps"] + counts["plain_steps"]
    return {
        "by_position": [k / d if d else None for d, k in zip(drafted, kept, strict=True)],
        "chance": sum(kept) / reached if reached else None,
        "accepted_length": 1 + sum(kept) / counts["verified"] if counts["verified"] else None,
        "drafting": counts["steps"] / steps if steps else None,
    }


def evenly(mean_bits: Sequence[float], count: int, most: float) -> list[int]:
    """Levels of a ladder, the cheapest and `count` - 1 more, evenly spaced in bits up to `most`."""
    low = mean_bits[0]
    wanted = [low + (most - low) * i / max(count - 1, 1) for i in range(count)]
    return sorted({min(range(len(mean_bits)), key=lambda n: abs(mean_bits[n] - w)) for w in wanted})
