# SPDX-License-Identifier: Apache-2.0
"""Intervals and paired tests of what is compared on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959963984540054
"""Standard errors on either side of a 95 % interval."""


def wilson(successes: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), from 0 to 1."""
    if not count:
        return 0.0, 1.0
    share, square = successes / count, Z * Z
    middle = share + square / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    scale = 1 + square / count
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided p of the exact McNemar test: that both are as often right, on the same items.

    Only items on which they differ tell; by chance half of those go either way.
    """
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    differing, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(differing, k) for k in range(fewer + 1)) / 2**differing
    return min(1.0, 2 * tail)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval by the normal approximation, items taken for independent."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, -math.inf, math.inf
    variance = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
    half = Z * math.sqrt(variance / count)
    return mean, mean - half, mean + half


def percentile(values: Sequence[float], share: float) -> float:
    """Between the two nearest of the ordered values, as NumPy's default; NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
