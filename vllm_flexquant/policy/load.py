# SPDX-License-Identifier: Apache-2.0
"""Load: the best level whose steps keep a time per output token.

The time of a decode step is taken for a + b c, where c is the cost of its level (bytes, over those
of the best level) and a and b depend on the number of rows: recursive least squares per power of
two of rows, which forgets, so that it follows the machine. Until levels have varied, b comes from
the prior, which says that half of a step's time is its bytes.

Steps vary, so what is aimed at lies below the target: it falls a little with each step that misses
and rises less with each that keeps it, until 5 % miss.

Steps that hold prompt tokens make the sequences that decode beside them wait, and the target is a
time per output token. What such a step takes above it is owed, and the steps of decoding after it
aim lower until what they take less has paid for it: the target is kept on average over the tokens
of an answer, so far as levels can.

The same sums over a longer time are the cost table: where even the cheapest level is known to make
steps of so many rows hardly shorter, low widths buy nothing.

On the host, for the time is measured there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_FORGET, _FORGET_SLOWLY = 0.97, 0.999
"""Weight of what is known, at each new step: for the next step's time, and in the cost table."""

_PRIOR_STEPS = 4.0
"""Steps for which the prior of b stands."""

_SHARE = 0.5
"""Of a step at the best level, the part that the prior takes to follow its bytes."""

MISSED = 0.05
"""Share of steps that may miss the target, since steps vary."""

_LEARN = 0.03
"""How fast what is aimed at follows the share that is missed."""

_FIRST_AIM, _LEAST_AIM = 0.95, 0.6
_FORGET_MET = 0.98

REPAID = 16
"""Decode steps over which what steps with prompts took too long is to be made up for; no more than
so many steps' targets are ever owed."""

_WORTH = 0.02
"""Of a step, what the cheapest level must save for low widths to be worth it."""

_ERRORS, _LEAST_STEPS = 2.0, 64
"""Standard errors by which a saving must be known to be below that, and steps that tell."""

_LOOK = 16
"""Steps booked for as many rows between two looks at the table."""


@dataclass
class StepTimes:
    """What steps of so many rows (a power of two at most) have taken, as sums for least squares.

    seconds are those of steps at cost c: sums of 1, c, c², t, ct and t², fading by `forget`. steps:
    how many there were.
    """

    forget: float
    weight: float = 0.0
    cost: float = 0.0
    square: float = 0.0
    seconds: float = 0.0
    product: float = 0.0
    seconds_square: float = 0.0
    steps: int = 0

    def add(self, cost: float, seconds: float) -> None:
        """Take in a step."""
        forget = self.forget
        self.steps += 1
        self.weight = forget * self.weight + 1.0
        self.cost = forget * self.cost + cost
        self.square = forget * self.square + cost * cost
        self.seconds = forget * self.seconds + seconds
        self.product = forget * self.product + cost * seconds
        self.seconds_square = forget * self.seconds_square + seconds * seconds

    def _moments(self) -> tuple[float, float, float, float]:
        """Mean cost and mean seconds, sum of squares of cost and of products about them."""
        mean_cost, mean = self.cost / self.weight, self.seconds / self.weight
        spread = self.square - self.weight * mean_cost**2
        return mean_cost, mean, spread, self.product - self.weight * mean_cost * mean

    def line(self) -> tuple[float, float]:
        """a and b, in seconds."""
        mean_cost, mean, spread, covered = self._moments()
        # the prior: b is a share of the time that a step at the best level would take
        prior = mean * _SHARE / (1 - _SHARE + _SHARE * mean_cost)
        strength = _PRIOR_STEPS * 0.01  # as if so many steps had been 0.1 apart in cost
        slope = max((covered + strength * prior) / (spread + strength), 0.0)
        return mean - slope * mean_cost, slope

    def saving(self, cheapest: float) -> tuple[float, float]:
        """What a step at cost `cheapest` saves of one at cost 1, a share, and its standard error.

        Without the prior: where levels have not varied, the error is infinite.
        """
        mean_cost, mean, spread, covered = self._moments()
        if self.weight < _LEAST_STEPS or spread < 1e-9:
            return 0.0, math.inf
        slope = covered / spread
        rest = self.seconds_square - self.weight * mean**2 - slope * covered
        error = math.sqrt(max(rest, 0.0) / (self.weight - 2) / spread)
        full = max(mean + slope * (1 - mean_cost), 1e-9)
        return slope * (1 - cheapest) / full, error * (1 - cheapest) / full


@dataclass
class LoadControl:
    """Keeps steps within a target.

    cost: fp64 [levels], of each level over the best one's. target: seconds per output token, which
    is a step's time. met: share of the steps of late that kept it. aims: share of the target that
    is aimed at, by number of rows. owed: seconds by which steps with prompts were too long, less
    what decode steps have saved since.
    """

    cost: np.ndarray
    target: float | None = None
    met: float = 1.0
    owed: float = 0.0
    aims: dict[int, float] = field(default_factory=dict)
    times: dict[int, StepTimes] = field(default_factory=dict)
    table: dict[int, StepTimes] = field(default_factory=dict)
    _pays: dict[int, bool] = field(default_factory=dict)

    def aim_at(self, target: float | None) -> None:
        """Keep another target from now on, None for none; what is known of steps stays."""
        if target != self.target:
            self.target, self.met, self.owed = target, 1.0, 0.0
            self.aims.clear()

    def book(self, rows: int, cost: float, seconds: float) -> None:
        """Take in a decode step of `rows` at a cost over that of the best level."""
        bucket = _bucket(rows)
        times = self.table.get(bucket)
        if times is None:
            times = self.table[bucket] = StepTimes(_FORGET_SLOWLY)
        times.add(cost, seconds)
        if times.steps % _LOOK == 0:
            saved, error = times.saving(float(self.cost[0]))
            self._pays[bucket] = saved + _ERRORS * error > _WORTH
        if self.target is None:
            return
        if bucket not in self.times:
            self.times[bucket] = StepTimes(_FORGET)
        self.times[bucket].add(cost, seconds)
        kept = self._keep(seconds)
        self.owed = max(self.owed - max(self.target - seconds, 0.0), 0.0)
        moved = self.aims.get(bucket, _FIRST_AIM) + _LEARN * (kept - (1 - MISSED))
        self.aims[bucket] = min(max(moved, _LEAST_AIM), 1.0)

    def book_prompt(self, seconds: float) -> None:
        """Take in a step that held prompt tokens beside sequences that decode."""
        if self.target is not None:
            self._keep(seconds)
            owed = self.owed + max(seconds - self.target, 0.0)
            self.owed = min(owed, REPAID * self.target)

    def _keep(self, seconds: float) -> float:
        """Whether a step kept the target, 0 or 1, which goes into `met`."""
        assert self.target is not None
        kept = float(seconds <= self.target)
        self.met = _FORGET_MET * self.met + (1 - _FORGET_MET) * kept
        return kept

    def ceiling(self, rows: int) -> int:
        """The best level whose step of `rows` is expected to keep the target, and to pay its part
        of what is owed; 0 if none does."""
        top = len(self.cost) - 1
        if self.target is None or not self.times:
            return top
        bucket = min(self.times, key=lambda b: (abs(b - _bucket(rows)), -b))
        a, b = self.times[bucket].line()
        aim = self.aims.get(bucket, _FIRST_AIM) * self.target - self.owed / REPAID
        within = np.flatnonzero(a + b * self.cost <= aim)
        return int(within[-1]) if len(within) else 0

    def pays(self, rows: int) -> bool:
        """Whether low widths may make steps of so many rows shorter; True until it is known."""
        return self._pays.get(_bucket(rows), True)

    def cost_table(self) -> list[dict[str, Any]]:
        """Of each number of rows seen: rows at most, seconds of a step of late, what the cheapest
        level saves of a step at the best one, its standard error, and whether that pays."""
        found = []
        for bucket, times in sorted(self.table.items()):
            saved, error = times.saving(float(self.cost[0]))
            known = math.isfinite(error)
            found.append(
                {
                    "rows": 1 << bucket,
                    "seconds": times.seconds / times.weight,
                    "cheapest_saves": saved if known else None,
                    "error": error if known else None,
                    "pays": self.pays(1 << bucket),
                }
            )
        return found


def _bucket(rows: int) -> int:
    return max(rows - 1, 0).bit_length()
