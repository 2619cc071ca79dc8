# SPDX-License-Identifier: Apache-2.0
"""What the recorded steps of an engine add up to.

`layers` is the list under that key of `flexquant_snapshot` or `GET /v1/flexquant`, `steps` the list
that `flexquant_records` returns, or `?trace=1`: one entry per step with the width of each layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import fsum
from typing import Any

SCALE_BYTES = 4  # a fp16 scale and a fp16 offset per group


def decode_steps(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps in which requests run and none of them has prompt tokens."""
    return [step for step in steps if step["request_ids"] and not any(step["prompt"])]


def mean_bits(layers: Sequence[dict[str, Any]], widths: Sequence[int]) -> float:
    """Mean width over weights, so that a layer counts by its size."""
    sizes = [layer["shape"][0] * layer["shape"][1] for layer in layers]
    return sum(n * w for n, w in zip(sizes, widths, strict=True)) / sum(sizes)


def bytes_read(layers: Sequence[dict[str, Any]], widths: Sequence[int]) -> int:
    """Bytes of planes and scales that one step reads at these widths."""
    total = 0
    for layer, width in zip(layers, widths, strict=True):
        rows, columns = layer["shape"]
        total += rows * columns * width // 8 + rows * (columns // layer["group_size"]) * SCALE_BYTES
    return total


def step_entropy(step: dict[str, Any]) -> float | None:
    """Mean over the running sequences of their moving average, nats, as known before the step."""
    known = [value for value in step["average"] if value is not None]
    return fsum(known) / len(known) if known else None


def summarise(layers: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the decode steps.

    Returns:
        steps: decode steps. mean_bits, bytes_per_step, rows (sequences per step), entropy_nats:
        means over them, None when there are none. switches: how often the table changed from one
        to the next. widths: share of weights run at each width.
    """
    chosen = decode_steps(steps)
    if not chosen:
        empty = dict.fromkeys(("mean_bits", "bytes_per_step", "rows", "entropy_nats"))
        return {"steps": 0, **empty, "switches": 0, "widths": {}}
    count = len(chosen)
    sizes = [layer["shape"][0] * layer["shape"][1] for layer in layers]
    at_width: Counter[int] = Counter()
    for step in chosen:
        for size, width in zip(sizes, step["widths"], strict=True):
            at_width[width] += size
    entropies = [e for e in map(step_entropy, chosen) if e is not None]
    return {
        "steps": count,
        "mean_bits": fsum(mean_bits(layers, step["widths"]) for step in chosen) / count,
        "bytes_per_step": fsum(bytes_read(layers, step["widths"]) for step in chosen) / count,
        "rows": sum(len(step["request_ids"]) for step in chosen) / count,
        "entropy_nats": fsum(entropies) / len(entropies) if entropies else None,
        "switches": sum(a["widths"] != b["widths"] for a, b in pairwise(chosen)),
        "widths": {str(w): n / (sum(sizes) * count) for w, n in sorted(at_width.items())},
    }
