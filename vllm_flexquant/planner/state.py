# SPDX-License-Identifier: Apache-2.0
"""The three moments of a step under policy `budget`: in arrays, or in one native call each.

Both work on the same buffers and find the same; `steps_on` chooses.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch

from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner.figures import Probe
from vllm_flexquant.planner.sequences import SequenceEntropy
from vllm_flexquant.planner.table import LevelTable
from vllm_flexquant.policy.arrays import Array, namespace, tensor, view
from vllm_flexquant.policy.budget import OTHER, BudgetPolicy, Calibrated, Ledger
from vllm_flexquant.policy.decision import Decision, least_move

_BOOKED = ("balance", "spent", "tokens", "needed", "foreseen")
"""What of a ledger changes from step to step."""


@dataclass(frozen=True)
class BudgetState:
    """Buffers at addresses that stay.

    ledgers: fp64 [7, classes], the fields of `Ledger` in their order. decisions: int32 [3, 2],
    level and held of `first`, `later` and `last`, the last one by the probe. row_class: int64
    [tokens], of the rows of a forward pass. scores: fp64 [tokens], what each was taken to need.
    price: fp64 [1]. bounds: int64 [2], lowest and highest width in bits of this step. ceiling:
    int32 [1]. active: bool [1], whether the probe decides.
    """

    calibrated: Calibrated
    listening: Probe | None
    sequences: SequenceEntropy
    table: LevelTable
    ledgers: Array
    decisions: Array
    row_class: Array
    scores: Array
    price: Array
    bounds: Array
    ceiling: Array
    active: Array

    @property
    def levels(self) -> int:
        return len(self.calibrated.kl)

    @property
    def probe_layer(self) -> int:
        return self.listening.layer if self.listening else 0

    def decision_views(self) -> tuple[Decision, Decision, Decision]:
        """`first`, `later` and `last`."""
        first, later, last = (Decision(row[:1], row[1:]) for row in self.decisions)
        return first, later, last

    def ledger_view(self) -> Ledger:
        """The same memory by name."""
        lines = zip(fields(Ledger), self.ledgers, strict=True)
        return Ledger(**{field.name: line for field, line in lines})


class BudgetSteps(Protocol):
    """`facts` are int64 [4, n] of the sequences that decode: their slots, their rows of the forward
    pass, the numbers of their classes and their places in the batch."""

    def adopt(self, policy: BudgetPolicy, options: FlexQuantOptions) -> None:
        """Decide by other options from now on."""

    def begin(self, facts: Array, before: Array) -> None:
        """Decide the level that a step begins at and write all layers' widths; `bounds`, `ceiling`
        and `active` are set. `before`: facts of the last step."""

    def probe(self, x: torch.Tensor) -> None:
        """Score the rows of a forward pass, [rows, H], and decide the layers after the probe."""

    def decide(self, scores: Array) -> None:
        """The same with scores that are known, fp32 [rows]."""

    def book(self, entropy: Array) -> None:
        """Take in the entropies of the batch's logits, fp32 nats by place."""


def steps_on(state: BudgetState) -> BudgetSteps:
    """The native one on CPUs where the kernels are loaded, else the one in arrays."""
    from flexquant_kernels import ops

    if isinstance(state.scores, np.ndarray) and ops.native_status().loaded:
        return NativeSteps(state)
    return ArraySteps(state)


class ArraySteps:
    """In NumPy's arrays or torch's, by the functions of the policy."""

    def __init__(self, state: BudgetState) -> None:
        self.state = state
        self.first, self.later, self._last = state.decision_views()
        self.ledger = state.ledger_view()

    def adopt(self, policy: BudgetPolicy, options: FlexQuantOptions) -> None:
        self.policy = policy
        self._by_average = options.signal in ("entropy", "both")

    def begin(self, facts: Array, before: Array) -> None:
        state, known = self.state, self.state.calibrated
        xp = namespace(facts)
        slots, rows, classes, self._places = facts
        self._rows = rows
        state.row_class[before[1]] = OTHER
        state.row_class[rows] = classes
        need = xp.ones_like(state.scores[rows])
        if self._by_average:
            average, seen = state.sequences.of(slots)
            need = xp.where(seen, known.need(known.by_average, average), need)
        state.scores[rows] = need
        state.price[:] = self.policy.price(need, classes, self.ledger)
        _keep(self.first, self.policy.first(state.price, state.ceiling, self.first))
        _keep(self.later, self.first)
        state.table.write(self.first.level, 0, state.bounds)

    def probe(self, x: torch.Tensor) -> None:
        listening = self.state.listening
        assert listening is not None
        rows = x[: len(self.state.row_class)].float()
        self.decide(view(torch.exp(torch.mv(rows, listening.weight) + listening.bias)))

    def decide(self, scores: Array) -> None:
        state, last = self.state, self._last
        xp = namespace(scores)
        classes = state.row_class[: len(scores)]
        kept = state.scores[: len(scores)]
        kept[:] = xp.where(state.active & (classes != OTHER), scores, kept)
        price = self.policy.price(kept, classes, self.ledger)
        decides = state.active & (price >= 0)
        state.price[:] = xp.where(decides, price, state.price)
        later = self.policy.later(price, state.ceiling, last)
        for name in ("level", "held"):
            chosen, begun = getattr(later, name), getattr(self.first, name)
            getattr(last, name)[:] = xp.where(decides, chosen, getattr(last, name))
            getattr(self.later, name)[:] = xp.where(decides, chosen, begun)
        state.table.write(self.later.level, state.probe_layer, state.bounds, state.active)

    def book(self, entropy: Array) -> None:
        state, rows = self.state, self._rows
        kl = self.policy.kl(self.first, self.later, state.bounds[:1], state.bounds[1:])
        own, classes = entropy[self._places], state.row_class[rows]
        ledger = self.policy.book(kl, state.scores[rows], own, classes, self.ledger)
        for name in _BOOKED:
            getattr(self.ledger, name)[:] = getattr(ledger, name)


def _keep(buffer: Decision, decision: Decision) -> None:
    buffer.level[:], buffer.held[:] = decision.level, decision.held


class NativeSteps:
    """In the native kernels of a CPU."""

    def __init__(self, state: BudgetState) -> None:
        from flexquant_kernels.cpu import budget as native

        known, probe, table = state.calibrated, state.listening, state.table
        self._facts_of = native.Sequences
        self._aggregates = native.AGGREGATES
        self._seen: Array = None
        self._entropy: Array = None
        self._native = native.NativeBudget(
            levels=state.levels,
            **{
                name: tensor(getattr(known, name))
                for name in ("kl", "cost", "early_kl", "late_kl", "late_cost", "width_kl")
            },
            entropy_bins=len(known.by_entropy),
            average_bins=len(known.by_average),
            by_entropy=tensor(known.by_entropy),
            by_average=tensor(known.by_average),
            bin_nats=known.bin_nats,
            horizon=0.0,
            least_move=0.0,
            quantile=0.0,
            dwell=0,
            aggregate=0,
            by_average_before=False,
            weight=probe and probe.weight,
            hidden=len(probe.weight) if probe else 0,
            probe_layer=state.probe_layer,
            bias=probe.bias if probe else 0.0,
            average=state.sequences.average,
            seen=state.sequences.seen,
            ledger=tensor(state.ledgers),
            decisions=tensor(state.decisions),
            row_class=tensor(state.row_class),
            scores=tensor(state.scores),
            price=tensor(state.price),
            bounds=tensor(state.bounds),
            ceiling=tensor(state.ceiling),
            layers=table.written.shape[0],
            rungs=tensor(table.rungs),
            allowed=None if table.allowed is None else tensor(table.allowed),
            written=tensor(table.written),
        )

    def adopt(self, policy: BudgetPolicy, options: FlexQuantOptions) -> None:
        self._native.set_policy(
            horizon=policy.horizon,
            least_move=least_move(policy.hysteresis, policy.levels),
            quantile=policy.quantile,
            dwell=policy.dwell,
            aggregate=self._aggregates.index(policy.aggregate),
            by_average_before=options.signal in ("entropy", "both"),
        )

    def begin(self, facts: Array, before: Array) -> None:
        if facts is not self._seen:
            self._before = self._facts_of(tensor(before))
            self._now, self._seen = self._facts_of(tensor(facts)), facts
        else:
            self._before = self._now
        self._native.begin(self._now, self._before)

    def probe(self, x: torch.Tensor) -> None:
        self._native.probe(self._now, x)

    def decide(self, scores: Array) -> None:
        self._native.decide(self._now, tensor(scores))

    def book(self, entropy: Array) -> None:
        if entropy is not self._entropy:
            self._entropy, self._address = entropy, self._native.entropy_at(tensor(entropy))
        self._native.book(self._now, self._address)
