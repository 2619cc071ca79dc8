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

An account's price starts where its budget is met on average. From then on a token bucket steers it:
what is left over, or owed, lowers or raises the price, so that the mean booked meets the mean
asked. What is booked is what was foreseen, times a correction of the account: the sum of what the
steps' own entropies say over the sum of what was foreseen. The correction only raises: as a measure
of a whole text, low entropy is no proof of low KL, so it does not buy cheaper steps.

This is the reference of `cpu/decide.cpp`, and what runs where there is no native code: over arrays
of fixed shape and without branches on their values.
"""

from __future__ import annotations

import numpy as np
import torch

from flexquant_kernels.state import ACCOUNTS, State
from vllm_flexquant.policy.arrays import (
    Array,
    ascending,
    floats,
    integers,
    largest,
    namespace,
    numbers,
    view,
)
from vllm_flexquant.policy.protocol import (
    FIRST,
    LAST,
    LATER,
    Policy,
    StepFacts,
    by_index,
    hold,
    keep,
    write_widths,
)

OTHER = -1
"""Account of rows that count for none: prompt tokens, padding."""

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


class Budget(Policy):
    """Keeps the budgets of the accounts."""

    books = True

    def __init__(self, probe_layer: int) -> None:
        """`probe_layer`: as `State.probe_layer`, which a captured graph cannot wait for."""
        self._probe_layer = probe_layer
        self._step: StepFacts | None = None

    def begin(self, state: State, step: StepFacts) -> None:
        xp = namespace(step.sequences)
        slots, rows, accounts, _ = step.sequences
        if self._step is not None:
            state.row_account[self._step.sequences[1]] = OTHER
        self._step = step
        state.row_account[rows] = accounts
        by_average = need_of(state, state.need_by_average, state.average[slots])
        knows = (state.by_average > 0) & state.seen[slots]
        state.scores[rows] = xp.where(knows, by_average, xp.ones_like(by_average))
        state.price[:] = price(state, state.scores[rows], accounts)
        hold(state, FIRST, _cheapest(state, state.cost, state.kl), state.price >= 0)
        keep(state, LATER, state.decisions[FIRST, :1], state.decisions[FIRST, 1:])

    def probe(self, state: State, x: torch.Tensor) -> None:
        rows = x[: len(state.row_account)].float()
        weight, bias = state.tensor("weight"), state.tensor("bias")
        self.decide(state, view(torch.exp(torch.mv(rows, weight) + bias.float())))

    def decide(self, state: State, scores: Array) -> None:
        xp = namespace(scores)
        accounts = state.row_account[: len(scores)]
        kept = state.scores[: len(scores)]
        kept[:] = xp.where((state.probes > 0) & (accounts != OTHER), scores, kept)
        found = price(state, kept, accounts)
        decides = (state.probes > 0) & (found >= 0)
        state.price[:] = xp.where(decides, found, state.price)
        before = state.decisions[LAST] + 0
        hold(state, LAST, _cheapest(state, state.late_cost, state.late_kl), found >= 0)
        state.decisions[LAST] = xp.where(decides, state.decisions[LAST], before)
        state.decisions[LATER] = xp.where(decides, state.decisions[LAST], state.decisions[LATER])
        write_widths(state, self._probe_layer)

    def book(self, state: State, entropy: Array) -> None:
        step = self._step
        if step is None or not len(step):
            return
        xp = namespace(entropy)
        _, rows, _, places = step.sequences
        accounts = state.row_account[rows]
        # what is no number says nothing
        needed = need_of(state, state.need_by_entropy, entropy[places])
        needed = xp.nan_to_num(needed, posinf=1.0)
        foreseen = xp.nan_to_num(state.scores[rows], nan=1.0, posinf=1.0)
        foreseen = xp.clip(foreseen, 0, _MOST_BOOKED)
        member = _members(accounts)
        count = member.sum(1, dtype=xp.float64)
        expected = xp.where(member, foreseen[None, :], 0.0).sum(1)
        spent = step_kl(state) * expected * correction(state)
        full = state.asked * state.horizon
        balance = state.balance + _AIM * state.asked * count - spent
        fade = xp.exp(-count / _FORESEEN_TOKENS)
        state.balance[:] = xp.maximum(xp.minimum(balance, full), -full)
        state.spent[:] += spent
        state.tokens[:] += count
        state.needed[:] = state.needed * fade + xp.where(member, needed[None, :], 0.0).sum(1)
        state.foreseen[:] = state.foreseen * fade + expected


def need_of(state: State, table: Array, nats: Array) -> Array:
    """What tokens need over the average one, fp64 [n], from entropies; inf for what is no number.

    Args:
        table: by bin of `State.bin_nats`, the last one open.
    """
    xp = namespace(table)
    bins = xp.nan_to_num(nats / state.bin_nats, nan=0.0, posinf=0.0, neginf=0.0)
    found = table[integers(xp.clip(bins, 0, len(table) - 1))]
    return xp.where(xp.isfinite(nats), found, xp.inf)


def correction(state: State) -> Array:
    """By account: what is foreseen times this is what will be needed."""
    return namespace(state.needed).clip(state.needed / state.foreseen, 1.0, _MOST_CORRECTION)


def price(state: State, need: Array, accounts: Array) -> Array:
    """What a nat of the average token is worth in this step, fp64 [1]; -1 without any row.

    Each account in the batch is to keep its own budget, so the dearest rules.

    Args:
        need: fp64 [n], of each row over the average token's.
        accounts: int64 [n].
    """
    xp = namespace(state.asked)
    if len(need) == 0:
        return xp.full_like(state.asked[:1], -1.0)
    need = xp.clip(xp.nan_to_num(need, nan=_MOST_NEED), 0, _MOST_NEED)
    member = _members(accounts)
    count = member.sum(1)

    def mean() -> Array:
        return xp.where(member, need[None, :], 0.0).sum(1) / xp.clip(count, 1, None)

    def quantile() -> Array:
        ordered = ascending(xp.where(member, need[None, :], _MOST_NEED))
        rank = xp.round(floats(xp.clip(count - 1, 0, None)) * floats(state.quantile))
        chosen = numbers(need)[None, :] == integers(rank)[:, None]
        return xp.where(chosen, ordered, 0.0).sum(1)

    def greatest() -> Array:
        return largest(xp.where(member, need[None, :], 0.0))

    demand = by_index(state.aggregate, (mean, quantile, greatest))
    found = _in_force(state) * demand * correction(state)
    found = xp.where((count > 0) & xp.isfinite(found), found, -1.0)
    return largest(found).reshape(1)


def step_kl(state: State) -> Array:
    """Mean KL of the step's average token at the widths that were decided, nats, fp64 [1]."""
    xp = namespace(state.kl)
    first, later = state.decisions[FIRST, :1], state.decisions[LATER, :1]
    kl = state.early_kl[first] + state.late_kl[later]
    low, high = state.bounds[:1], state.bounds[1:]
    return xp.minimum(xp.maximum(kl, state.width_kl[high]), state.width_kl[low])


def _members(accounts: Array) -> Array:
    """bool [ACCOUNTS, n], which rows are whose."""
    lines = numbers(accounts, ACCOUNTS)
    return accounts[None, :] == lines[:, None]


def _in_force(state: State) -> Array:
    """Price of a nat by account, fp64."""
    xp = namespace(state.asked)
    share = state.balance / xp.clip(state.asked * state.horizon, 1e-12, None)
    return state.base_price * xp.exp2(-_OCTAVES * xp.clip(share, -1, 1))


def _cheapest(state: State, cost: Array, kl: Array) -> Array:
    """The level of the least cost and KL at the price in force, int32 [1]."""
    xp = namespace(cost)
    objective = cost + state.price * kl
    objective = xp.where(numbers(cost) > state.ceiling, xp.inf, objective)
    return integers(objective.argmin().reshape(1))


def price_curve(state: State) -> tuple[np.ndarray, np.ndarray]:
    """Prices of a nat, ascending, and the mean KL of text like the calibrated one at each, fp64.

    Layers before the probe are decided for the average token, those after it by its needs, which
    are taken for log-normal with a mean of 1.
    """
    fields = ("kl", "cost", "early_kl", "late_kl", "late_cost")
    kl, cost, early_kl, late_kl, late_cost = (state.tensor(n).cpu().numpy() for n in fields)
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    need = np.exp(_SPREAD * nodes - _SPREAD**2 / 2)
    prices = np.geomspace(*_PRICES)
    first = (cost + prices[:, None] * kl).argmin(-1)
    later = (late_cost + (prices[:, None] * need)[:, :, None] * late_kl).argmin(-1)
    return prices, early_kl[first] + late_kl[later] @ (weights * need) / weights.sum()


def price_of(budget: float, curve: tuple[np.ndarray, np.ndarray]) -> float:
    """The price at which the mean KL is `budget`, nats per token."""
    prices, mean = curve
    tiny = np.finfo(np.float64).tiny
    logs = -np.log(np.maximum(mean, tiny))
    return float(np.exp(np.interp(-np.log(budget), logs, np.log(prices))))


_NODES, _SPREAD = 9, 0.4
_PRICES = (1e-3, 1e7, 401)
