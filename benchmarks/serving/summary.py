# SPDX-License-Identifier: Apache-2.0
"""From the speeds of each round to ratios, their spread, and the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

BASELINES = ("bf16", "w8a8")


@dataclass(frozen=True)
class Target:
    """`configuration` has at least `least` times the tokens per second of `baseline`."""

    configuration: str
    baseline: str
    batch: int
    least: float


TARGETS = (
    Target("flexquant-4", "bf16", 1, 1.6),
    Target("flexquant-4", "w8a8", 1, 1.3),
    Target("flexquant-4", "bf16", 16, 2.2),
    Target("flexquant-8", "w8a8", 1, 1.0),
    Target("flexquant-8", "w8a8", 4, 1.0),
    Target("flexquant-8", "w8a8", 16, 1.0),
)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles (inclusive method) and the values themselves."""
    low, high = values[0], values[0]
    if len(values) > 1:
        low, _, high = quantiles(values, n=4, method="inclusive")
    return {"median": median(values), "quartiles": [low, high], "rounds": list(values)}


def compare(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Spread of the ratio to a baseline that was measured in the same rounds."""
    return spread([a / b for a, b in zip(values, baseline, strict=True)])


def over(
    entry: Mapping[str, Any], base: Mapping[str, Any], batch: str | None
) -> dict[str, Any] | None:
    """Spread of a configuration's speed over another's of the same rounds, from their entries in
    the results; None where either was not measured.

    Args:
        batch: requests at a time while decoding; None: of taking in a prompt.
    """

    def rounds(one: Mapping[str, Any]) -> list[float] | None:
        by_batch = one["decode_tokens_per_second"]
        speed = one.get("prefill_tokens_per_second") if batch is None else by_batch.get(batch)
        return speed["rate"]["rounds"] if speed else None

    values, baseline = rounds(entry), rounds(base)
    return compare(values, baseline) if values and baseline else None


def tokens_per_second(batch: int, steps: Sequence[float]) -> float:
    """Speed of decode steps that took `steps` seconds each and gave `batch` tokens each."""
    return batch * len(steps) / sum(steps)


def summarise_speeds(rates: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """By configuration: spread of its rates, and of their ratio to each baseline.

    Args:
        rates: by configuration, one value per round, more is better.
    """
    return {
        name: {
            "rate": spread(values),
            "against": {
                b: compare(values, rates[b]) for b in BASELINES if b in rates and b != name
            },
        }
        for name, values in rates.items()
    }


def check_targets(decode: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each target with what was measured; `met` is None where it was not measured.

    Args:
        decode: by batch, as `summarise_speeds` of tokens per second.
    """
    rows = []
    for target in TARGETS:
        speeds = decode.get(target.batch, {}).get(target.configuration)
        ratio = speeds["against"].get(target.baseline) if speeds else None
        row: dict[str, Any] = dict(vars(target)) | {"met": None}
        if ratio:
            row |= {"median": ratio["median"], "quartiles": ratio["quartiles"]}
            row["met"] = ratio["median"] >= target.least
        rows.append(row)
    return rows
