# SPDX-License-Identifier: Apache-2.0
"""Policy `budget`: a mean KL per token, kept at the lowest cost (the precision requirement model).

A token's KL at level l is about s k(l): k is the calibrated mean at the level, s what the token
needs over the average one. At a given mean KL, the least cost is reached where each step takes the
level with the least cost(l) + price s k(l), at one price of a nat for all: a level that is no
bargain at any price is never taken. What is known of s, and when:

- before the step, that of the average token, or (`signal: entropy`) what the average of the
  sequence's entropies says: the level of the first layers;
- at the probe, in the same step: the level of the layers after it;
- after the step, from the entropy of its own logits: whether too little was foreseen.

A class's price starts where its budget is met on average. From then on a token bucket steers it:
what is left over, or owed, lowers or raises the price, so that the mean booked meets the mean
asked. What is booked is what was foreseen, times a correction of the class: the sum of what the
steps' own entropies say over the sum of what was foreseen. The correction only raises: as a measure
of a whole text, low entropy is no proof of low KL, so it does not buy cheaper steps.

The functions are pure, over arrays of fixed shape and without branches on their values: serving and
replay are the same code.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from vllm_flexquant.policy.arrays import (
    Array,
    ascending,
    floats,
    integers,
    largest,
    namespace,
    numbers,
)
from vllm_flexquant.policy.decision import Decision, hold

CLASSES = 64
"""Classes that can have a budget of their own at a time."""

OTHER = -1
"""Class of rows that count for none: prompt tokens, padding."""

_FORESEEN_TOKENS = 128.0
"""Tokens over which the correction of what is foreseen is averaged."""

NO_PAST = _FORESEEN_TOKENS
"""As if so many average tokens had gone before."""

_MOST_CORRECTION = 8.0
_MOST_NEED = 1e4
"""Of a row whose need is no number: it asks for the best level."""

_MOST_BOOKED = 100.0
"""So that one row does not take the budget of the others for long."""

_AIM = 0.95
"""Of a budget, what is aimed at: text unlike the calibrated one costs a little more."""

_OCTAVES = 2.0
"""A full bucket divides the price by 2 to this, an empty one multiplies it."""


@dataclass(frozen=True)
class Calibrated:
    """What calibration found, on the ladder of this rank. fp64, KL in nats per token.

    kl, cost: [levels], cheapest level first; cost is over that of the best level. early_kl,
    early_cost: [levels], the part of them that is due to layers before the probe, all of it where
    there is no probe; late_kl, late_cost: the rest. width_kl: [9], KL with all layers at so many
    bits. by_entropy, by_average: [bins], KL over the mean KL of tokens whose own entropy, or whose
    sequence's average before them, is in a bin of `bin_nats`; the last bin is open.
    """

    kl: Array
    cost: Array
    early_kl: Array
    early_cost: Array
    width_kl: Array
    by_entropy: Array
    by_average: Array
    bin_nats: float
    late_kl: Array = field(init=False)
    late_cost: Array = field(init=False)

    def __post_init__(self) -> None:
        # once, not in every step
        object.__setattr__(self, "late_kl", self.kl - self.early_kl)
        object.__setattr__(self, "late_cost", self.cost - self.early_cost)

    def need(self, table: Array, nats: Array) -> Array:
        """fp64 [rows] from entropies [rows]; inf for one that is no number."""
        xp = namespace(table)
        bins = xp.nan_to_num(nats / self.bin_nats, nan=0.0, posinf=0.0, neginf=0.0)
        found = table[integers(xp.clip(bins, 0, len(table) - 1))]
        return xp.where(xp.isfinite(nats), found, xp.inf)


@dataclass(frozen=True)
class Ledger:
    """What each class asked for and what it was booked, fp64 [CLASSES].

    asked: nats per token, 0 where a class is not in use. price: of a nat per token, in the cost of
    the best level, at which the average text costs what is asked (`price_of`). balance: nats left
    over (owed if below 0). spent, tokens: sums since the class was made. needed, foreseen: sums,
    fading, of what was needed after the step and before it; they begin as `NO_PAST`.
    """

    asked: Array
    price: Array
    balance: Array
    spent: Array
    tokens: Array
    needed: Array
    foreseen: Array

    @property
    def correction(self) -> Array:
        """fp64 [CLASSES], what is foreseen times this is what will be needed."""
        xp = namespace(self.asked)
        return xp.clip(self.needed / self.foreseen, 1.0, _MOST_CORRECTION)


@dataclass(frozen=True)
class BudgetPolicy:
    """horizon: tokens whose budget fills a bucket. hysteresis: share of the ladder that a change
    must exceed; dwell: steps between two changes."""

    calibrated: Calibrated
    levels: int
    horizon: int
    hysteresis: float
    dwell: int
    aggregate: str
    quantile: float

    def price(self, need: Array, classes: Array, ledger: Ledger) -> Array:
        """What a nat of the average token is worth in this step, fp64 [1]; -1 without any row.

        Each class in the batch is to keep its own budget, so the dearest rules.

        Args:
            need: fp64 [rows], of each row over the average token's.
            classes: int64 [rows].
        """
        xp = namespace(ledger.asked)
        if len(need) == 0:
            return xp.full_like(ledger.asked[:1], -1.0)
        need = xp.clip(xp.nan_to_num(need, nan=_MOST_NEED), 0, _MOST_NEED)
        member = classes[None, :] == numbers(ledger.asked)[:, None]
        count = member.sum(1)
        if self.aggregate == "max":
            demand = largest(xp.where(member, need[None, :], 0.0))
        elif self.aggregate == "quantile":
            ordered = ascending(xp.where(member, need[None, :], _MOST_NEED))
            rank = integers(xp.round(floats(xp.clip(count - 1, 0, None)) * self.quantile))
            demand = xp.where(numbers(need)[None, :] == rank[:, None], ordered, 0.0).sum(1)
        else:
            demand = xp.where(member, need[None, :], 0.0).sum(1) / xp.clip(count, 1, None)
        price = self.in_force(ledger) * demand * ledger.correction
        return largest(xp.where(count > 0, price, -1.0)).reshape(1)

    def in_force(self, ledger: Ledger) -> Array:
        """Price of a nat of each class, fp64 [CLASSES]."""
        xp = namespace(ledger.asked)
        share = ledger.balance / xp.clip(ledger.asked * self.horizon, 1e-12, None)
        return ledger.price * xp.exp2(-_OCTAVES * xp.clip(share, -1, 1))

    def first(self, price: Array, ceiling: Array, last: Decision) -> Decision:
        """The level that the step begins at, not above `ceiling`, int32 [1]."""
        known = self.calibrated
        return self._cheapest(known.cost, known.kl, price, ceiling, last)

    def later(self, price: Array, ceiling: Array, last: Decision) -> Decision:
        """The level of the layers after the probe."""
        known = self.calibrated
        return self._cheapest(known.late_cost, known.late_kl, price, ceiling, last)

    def _cheapest(
        self, cost: Array, kl: Array, price: Array, ceiling: Array, last: Decision
    ) -> Decision:
        xp = namespace(cost)
        objective = xp.where(numbers(cost) > ceiling, xp.inf, cost + price * kl)
        wanted = integers(objective.argmin().reshape(1))
        found = hold(wanted, last, price >= 0, self.levels, self.hysteresis, self.dwell)
        return Decision(xp.minimum(found.level, ceiling), found.held)

    def kl(self, first: Decision, later: Decision, low: Array, high: Array) -> Array:
        """Mean KL of a step, nats, fp64 [1], whose widths were bounded to low..high bits, [1]."""
        xp = namespace(self.calibrated.kl)
        known = self.calibrated
        kl = known.early_kl[first.level] + known.late_kl[later.level]
        return xp.minimum(xp.maximum(kl, known.width_kl[high]), known.width_kl[low])

    def book(
        self, kl: Array, foreseen: Array, entropy: Array, classes: Array, ledger: Ledger
    ) -> Ledger:
        """The ledger after a step.

        Args:
            kl: fp64 [1], of the average token at the step's widths.
            foreseen: fp64 [rows], what the step was decided by.
            entropy: fp32 [rows] nats, of the step's own logits.
            classes: int64 [rows].
        """
        xp = namespace(ledger.asked)
        # what is no number says nothing
        needed = self.calibrated.need(self.calibrated.by_entropy, entropy)
        needed = xp.nan_to_num(needed, posinf=1.0)
        foreseen = xp.clip(xp.nan_to_num(foreseen, nan=1.0, posinf=1.0), 0, _MOST_BOOKED)
        own = classes[None, :] == numbers(ledger.asked)[:, None]
        member = xp.where(own, xp.ones_like(foreseen)[None, :], 0.0)
        rows = member.sum(1)
        expected = (member * foreseen[None, :]).sum(1)
        spent = kl * expected * ledger.correction
        full = ledger.asked * self.horizon
        fade = xp.exp(-rows / _FORESEEN_TOKENS)
        balance = ledger.balance + _AIM * ledger.asked * rows - spent
        return replace(
            ledger,
            balance=xp.maximum(xp.minimum(balance, full), -full),
            spent=ledger.spent + spent,
            tokens=ledger.tokens + rows,
            needed=ledger.needed * fade + (member * needed[None, :]).sum(1),
            foreseen=ledger.foreseen * fade + expected,
        )


def price_of(budget: float, known: Calibrated) -> float:
    """The price of a nat at which the mean KL of text like the calibrated one is `budget`.

    Layers before the probe are decided for the average token, those after it by its needs, which
    are taken for log-normal with a mean of 1.

    Args:
        known: in NumPy's arrays.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    need = np.exp(_SPREAD * nodes - _SPREAD**2 / 2)
    prices = np.geomspace(*_PRICES)
    first = (known.cost + prices[:, None] * known.kl).argmin(-1)
    later = (known.late_cost + (prices[:, None] * need)[:, :, None] * known.late_kl).argmin(-1)
    mean = known.early_kl[first] + known.late_kl[later] @ (weights * need) / weights.sum()
    return float(np.exp(np.interp(-np.log(budget), -np.log(mean), np.log(prices))))


_NODES, _SPREAD = 9, 0.4
_PRICES = (1e-3, 1e7, 401)
