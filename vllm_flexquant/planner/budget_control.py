# SPDX-License-Identifier: Apache-2.0
"""Policy `budget` inside a worker: what is asked, the steps, the books."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_flexquant.format.layout import PARENT_BITS
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner.figures import Figures, Probe
from vllm_flexquant.planner.sequences import SequenceEntropy
from vllm_flexquant.planner.state import BudgetState, steps_on
from vllm_flexquant.planner.table import LevelTable
from vllm_flexquant.policy.arrays import Array, constant, indices, integers, namespace, view
from vllm_flexquant.policy.budget import (
    CLASSES,
    NO_PAST,
    OTHER,
    BudgetPolicy,
    Calibrated,
    Ledger,
    price_of,
)

logger = init_logger(f"vllm.{__name__}")


class BudgetControl:
    """Decides a worker's steps by policy `budget`.

    Within step n: `begin` (level of the first layers), `probe` (level of those after it), `book`
    (what the step cost). Buffers have addresses that stay.
    """

    def __init__(
        self,
        device: torch.device,
        figures: Figures,
        listening: Probe | None,
        sequences: SequenceEntropy,
        table: LevelTable,
        tokens: int,
    ) -> None:
        """`tokens`: rows of a forward pass at most."""
        self.figures, self.listening = figures, listening
        self._on_host = device.type == "cpu"
        self._asks_probe = False
        self._like = view(torch.zeros(1, dtype=torch.float64, device=device))
        self._plain = _calibrated(figures, np.zeros(1))
        self._asked: dict[int, float] = {}
        self._prices: dict[float, float] = {}

        def buffer(value: float, dtype: torch.dtype, *shape: int) -> Array:
            return view(torch.full(shape, value, dtype=dtype, device=device))

        best = len(figures["kl"]) - 1
        self._state = BudgetState(
            calibrated=_calibrated(figures, self._like),
            listening=listening,
            sequences=sequences,
            table=table,
            ledgers=buffer(0.0, torch.float64, len(fields(Ledger)), CLASSES),
            decisions=buffer(0, torch.int32, 3, 2),
            row_class=buffer(OTHER, torch.int64, tokens),
            scores=buffer(0.0, torch.float64, tokens),
            price=buffer(-1.0, torch.float64, 1),
            bounds=buffer(PARENT_BITS, torch.int64, 2),
            ceiling=buffer(best, torch.int32, 1),
            active=buffer(False, torch.bool, 1),
        )
        self._state.decisions[:, 0] = best
        self.first, self.later, _ = self._state.decision_views()
        self.ledger = self._state.ledger_view()
        self.ledger.needed[:] = self.ledger.foreseen[:] = NO_PAST
        self._steps = steps_on(self._state)
        self._facts = indices([[]] * 4, self._like)
        self.probed = False

    @property
    def probe_layer(self) -> int:
        """Index of the first layer that the probe decides."""
        return self._state.probe_layer

    def adopt(self, options: FlexQuantOptions) -> None:
        """Go on by other options; steps are decided here from the next `begin` on."""
        self._state.active[:] = self._asks_probe = False
        self._probes = options.signal in ("probe", "both") and self.listening is not None
        policy = BudgetPolicy(
            calibrated=self._state.calibrated,
            levels=self._state.levels,
            horizon=options.budget_horizon,
            hysteresis=options.hysteresis,
            dwell=options.dwell,
            aggregate=options.aggregate,
            quantile=options.quantile,
        )
        self._steps.adopt(policy, options)

    def ask(self, budgets: Mapping[int, float], new: Sequence[int] = ()) -> None:
        """Set what classes may spend, nats per token by number.

        Those in `new`, and those whose budget changes, begin a new account.
        """
        anew = {*new, *(n for n, budget in budgets.items() if self._asked.get(n) != budget)}
        self._asked = dict(budgets)
        asked, price = [0.0] * CLASSES, [0.0] * CLASSES
        for number, budget in budgets.items():
            asked[number] = budget
            if budget not in self._prices:
                self._prices[budget] = price_of(budget, self._plain)
            price[number] = self._prices[budget]
        best = float(self._plain.kl.min())
        for number in anew:
            if 0 < asked[number] < best:
                logger.warning_once(
                    "flexquant: a budget of %g nats per token cannot be met: the best level costs "
                    "%.2g; it is served at the best level",
                    asked[number],
                    best,
                )
        self.ledger.asked[:] = constant(asked, self._like)
        self.ledger.price[:] = constant(price, self._like)
        if anew:
            for values in (self.ledger.balance, self.ledger.spent, self.ledger.tokens):
                values[indices(sorted(anew), self._like)] = 0.0
        if new:
            for values in (self.ledger.needed, self.ledger.foreseen):
                values[indices(new, self._like)] = NO_PAST

    def begin(self, facts: Array, bounds: tuple[int, int], ceiling: int) -> None:
        """Decide the level that a step begins at, and write all layers' widths.

        Args:
            facts: int64 [4, n], of the sequences that decode, as `BudgetSteps`; not changed later.
            bounds: lowest and highest width in bits of every layer in this step.
            ceiling: best level that may be decided.
        """
        state, before = self._state, self._facts
        self._facts, self.probed = facts, False
        self._asks_probe = self._probes and facts.shape[1] > 0
        if self._on_host:
            state.bounds[0], state.bounds[1] = bounds
        else:
            state.bounds[:] = indices(bounds, self._like)
        state.ceiling[:] = ceiling
        state.active[:] = self._probes
        self._steps.begin(facts, before)

    def probe(self, x: torch.Tensor) -> None:
        """Score the rows of a forward pass and decide the layers after the probe.

        A captured graph replays this: it reads and writes buffers alone.

        Args:
            x: [rows, H], what the probe's layer is given.
        """
        if self.listening is None or (self._on_host and not self._asks_probe):
            return
        self.probed = True
        self._steps.probe(x)

    def decide(self, scores: Array) -> None:
        """Decide the layers after the probe by the scores of the forward pass's rows, fp32."""
        self.probed = True
        self._steps.decide(scores)

    def row_scores(self) -> Array:
        """fp64 [n], what each sequence of the step was taken to need."""
        return self._state.scores[self._facts[1]]

    def book(self, entropy: Array) -> None:
        """Take in the entropies of the batch's logits, fp32 nats by place."""
        if self._facts.shape[1]:
            self._steps.book(entropy)

    def cost(self, first: int, later: int) -> float:
        """Of a step at these levels, over that of the best level."""
        return float(self._plain.early_cost[first] + self._plain.late_cost[later])

    def status(self, names: Mapping[int, str]) -> dict[str, Any]:
        """What each class asked for and was booked, by its name."""
        ledger, xp = self.ledger, namespace(self._like)
        spent = ledger.spent / xp.clip(ledger.tokens, 1, None)
        figures = {
            "asked_nats": ledger.asked,
            "balance_nats": ledger.balance,
            "booked_nats": spent,
            "tokens": ledger.tokens,
            "correction": ledger.correction,
        }
        best = self._state.calibrated.kl.min().item()
        plain = {name: values.tolist() for name, values in figures.items()}
        return {
            "best_nats": best,
            "probe": self.listening.name if self.listening else None,
            "classes": {
                name: {figure: values[number] for figure, values in plain.items()}
                | {"can_be_met": plain["asked_nats"][number] >= best}
                for number, name in names.items()
            },
        }

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, as plain values (syncs a GPU)."""
        books = {f.name: getattr(self.ledger, f.name).tolist() for f in fields(Ledger)}
        levels = self._state.decisions.tolist()
        return {"ledger": books, "levels": levels, "asked": self._asked}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        for name, values in state["ledger"].items():
            getattr(self.ledger, name)[:] = constant(values, self._like)
        self._state.decisions[:] = integers(constant(state["levels"], self._like))
        self._asked = {int(number): budget for number, budget in state["asked"].items()}


def _calibrated(figures: Figures, like: Array) -> Calibrated:
    """`figures` as arrays beside `like`."""
    values = {f.name: figures[f.name] for f in fields(Calibrated) if f.init}
    return Calibrated(
        **{n: constant(v, like) if isinstance(v, list) else v for n, v in values.items()}
    )
