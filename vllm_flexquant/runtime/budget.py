# SPDX-License-Identifier: Apache-2.0
"""Policy `budget` inside a worker: its arrays, the probe within the forward pass, the books."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_flexquant.config import FlexQuantOptions
from vllm_flexquant.format.layout import PARENT_BITS, width_at_least
from vllm_flexquant.format.record import CalibrationRecord, NeedRecord
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
from vllm_flexquant.policy.decision import Decision
from vllm_flexquant.runtime.ladder import Ladder, bytes_read, parts_of
from vllm_flexquant.runtime.table import LayerRecord

logger = init_logger(f"vllm.{__name__}")

Figures = dict[str, Any]
"""Fields of `Calibrated`, as lists of numbers."""

WriteWidths = Callable[[Array, int, Array, Array | None], None]
"""Level [1], the first layer to write, lowest and highest width in bits [2], and whether to write
at all, bool [1] (None: yes)."""

_BOOKED = ("balance", "spent", "tokens", "needed", "foreseen")
"""What of a ledger changes from step to step."""

_NO_NEED = NeedRecord(bin_nats=1.0, by_entropy=(1.0,), by_average=(1.0,))
"""Without figures of calibration, every token is taken for an average one."""


@dataclass(frozen=True)
class Probe:
    """score = exp(x · weight + bias), of what the layer with index `layer` in the table is given.

    weight: fp32 [H].
    """

    name: str
    layer: int
    weight: torch.Tensor
    bias: float


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
        tokens: int,
        write: WriteWidths,
    ) -> None:
        """`tokens`: rows of a forward pass at most."""
        self.figures, self.listening, self.write = figures, listening, write
        self.levels = len(figures["kl"])
        self._like = view(torch.zeros(1, dtype=torch.float64, device=device))
        self.calibrated = _calibrated(figures, self._like)
        self._plain = _calibrated(figures, np.zeros(1))
        self._asked: dict[int, float] = {}
        self._prices: dict[float, float] = {}
        nothing = [0.0] * CLASSES
        self.ledger = Ledger(**{f.name: constant(nothing, self._like) for f in fields(Ledger)})
        self.ledger.needed[:] = self.ledger.foreseen[:] = NO_PAST
        self.row_class = view(torch.full((tokens,), OTHER, dtype=torch.int64, device=device))
        self.scores = view(torch.zeros(tokens, dtype=torch.float64, device=device))
        self.first, self.later, self._last = (self._best_level() for _ in range(3))
        self.price = constant([-1.0], self._like)
        self.bounds = indices([PARENT_BITS, PARENT_BITS], self._like)
        self.ceiling = self._best_level().level
        self.active = view(torch.zeros(1, dtype=torch.bool, device=device))
        self._rows = self.row_class[:0]
        self.probed = False

    def _best_level(self) -> Decision:
        like = self._like
        return Decision(*(integers(constant([n], like)) for n in (self.levels - 1, 0)))

    def adopt(self, options: FlexQuantOptions) -> None:
        """Go on by other options; steps are decided here from the next `begin` on."""
        self.options = options
        self.active[:] = False
        self.policy = BudgetPolicy(
            calibrated=self.calibrated,
            levels=self.levels,
            horizon=options.budget_horizon,
            hysteresis=options.hysteresis,
            dwell=options.dwell,
            aggregate=options.aggregate,
            quantile=options.quantile,
        )

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

    def begin(
        self,
        average: Array,
        known: Array,
        classes: Array,
        rows: Array,
        bounds: tuple[int, int],
        ceiling: int,
    ) -> None:
        """Decide the level that a step begins at, and write all layers' widths.

        Args:
            average, known: fp32 and bool [n] of the sequences that decode, as `StepSignals`.
            classes: int64 [n], their classes' numbers.
            rows: int64 [n], the row of each in what the forward pass computes.
            bounds: lowest and highest width in bits of every layer in this step.
            ceiling: best level that may be decided.
        """
        xp = namespace(average)
        self._rows, self.probed = rows, False
        self.row_class[:] = OTHER
        self.row_class[rows] = classes
        need = xp.ones_like(self.scores[rows])
        if self.options.signal in ("entropy", "both"):
            by_average = self.calibrated.need(self.calibrated.by_average, average)
            need = xp.where(known, by_average, need)
        self.scores[rows] = need
        self.price[:] = self.policy.price(need, classes, self.ledger)
        self.ceiling[:] = ceiling
        self._keep(self.first, self.policy.first(self.price, self.ceiling, self.first))
        self._keep(self.later, self.first)
        self.bounds[:] = indices(bounds, average)
        self.active[:] = self.options.signal in ("probe", "both") and self.listening is not None
        self.write(self.first.level, 0, self.bounds, None)

    def probe(self, x: torch.Tensor) -> None:
        """Score the rows of a forward pass and decide the layers after the probe.

        A captured graph replays this: it reads and writes buffers alone.

        Args:
            x: [rows, H], what the probe's layer is given.
        """
        listening = self.listening
        on_host = isinstance(self.row_class, np.ndarray)
        if listening is None or (on_host and not (self.active[0] and len(self._rows))):
            return
        rows = x[: len(self.row_class)].float()
        self.decide(view(torch.exp(torch.mv(rows, listening.weight) + listening.bias)))

    def decide(self, score: Array) -> None:
        """Decide the layers after the probe by the scores of the forward pass's rows, fp32."""
        xp = namespace(score)
        self.probed = True
        classes = self.row_class[: len(score)]
        scores, last = self.scores[: len(score)], self._last
        scores[:] = xp.where(self.active & (classes != OTHER), score, scores)
        price = self.policy.price(scores, classes, self.ledger)
        decides = self.active & (price >= 0)
        self.price[:] = xp.where(decides, price, self.price)
        later = self.policy.later(price, self.ceiling, last)
        for name in ("level", "held"):
            chosen, begun = getattr(later, name), getattr(self.first, name)
            getattr(last, name)[:] = xp.where(decides, chosen, getattr(last, name))
            getattr(self.later, name)[:] = xp.where(decides, chosen, begun)
        first = self.listening.layer if self.listening else 0
        self.write(self.later.level, first, self.bounds, self.active)

    def row_scores(self) -> Array:
        """fp64 [n], what each sequence of the step was taken to need."""
        return self.scores[self._rows]

    def book(self, entropy: Array) -> None:
        """Take in the entropies of the step, fp32 [n] nats, of the sequences that `begin` had."""
        classes = self.row_class[self._rows]
        kl = self.policy.kl(self.first, self.later, self.bounds[:1], self.bounds[1:])
        ledger = self.policy.book(kl, self.row_scores(), entropy, classes, self.ledger)
        for name in _BOOKED:
            getattr(self.ledger, name)[:] = getattr(ledger, name)

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
        best = self.calibrated.kl.min().item()
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
        levels = {
            name: [part.item() for part in (decision.level, decision.held)]
            for name, decision in self._decisions().items()
        }
        return {"ledger": books, "levels": levels, "asked": self._asked}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        for name, values in state["ledger"].items():
            getattr(self.ledger, name)[:] = constant(values, self._like)
        for name, decision in self._decisions().items():
            decision.level[:], decision.held[:] = state["levels"][name]
        self._asked = {int(number): budget for number, budget in state["asked"].items()}

    def _decisions(self) -> dict[str, Decision]:
        return {"first": self.first, "later": self.later, "last": self._last}

    @staticmethod
    def _keep(buffer: Decision, decision: Decision) -> None:
        buffer.level[:], buffer.held[:] = decision.level, decision.held


def read_figures(
    layers: Sequence[LayerRecord],
    ladder: Ladder,
    record: CalibrationRecord,
    probe_layer: int | None,
    fused: Mapping[str, Sequence[str]],
) -> Figures:
    """What the policy is told of this rank's ladder, from what calibration wrote."""
    assert ladder.kl_nats is not None
    need = record.need or _NO_NEED
    weights_kl = np.array(ladder.kl_nats)
    rounding = _activations_kl(layers, record)
    early_kl = weights_kl * _early_share(layers, ladder, record, probe_layer, fused)
    early = layers[:probe_layer]
    early_bytes = [bytes_read(early, w[: len(early)]) for w in ladder.widths.tolist()]
    top = ladder.bytes_read[-1]
    uniform = {width: kl for width, (kl, _) in record.uniform_kl.items()}
    known = sorted(uniform)
    # no layer runs at widths that the layout lacks, but at the next one up
    width_kl = [
        uniform[width_at_least(known, bits)] if known else 0.0 for bits in range(PARENT_BITS + 1)
    ]
    return {
        "kl": (weights_kl + rounding).tolist(),
        "cost": list(ladder.cost),
        "early_kl": early_kl.tolist(),
        "early_cost": [n / top for n in early_bytes],
        "width_kl": [kl + rounding for kl in width_kl],
        "by_entropy": list(need.by_entropy),
        "by_average": list(need.by_average),
        "bin_nats": need.bin_nats,
    }


def _calibrated(figures: Figures, like: Array) -> Calibrated:
    """`figures` as arrays beside `like`."""
    values = {f.name: figures[f.name] for f in fields(Calibrated) if f.init}
    return Calibrated(
        **{n: constant(v, like) if isinstance(v, list) else v for n, v in values.items()}
    )


def listen(
    device: torch.device,
    layers: Sequence[LayerRecord],
    record: CalibrationRecord,
    fused: Mapping[str, Sequence[str]],
) -> Probe | None:
    """The checkpoint's probe, None if it has none or listens to a layer on another rank."""
    if record.probe is None:
        return None
    for index, layer in enumerate(layers):
        if record.probe.layer in parts_of(layer.name, fused):
            weight = torch.tensor(record.probe.weight, device=device)
            return Probe(record.probe.layer, index, weight, record.probe.bias)
    return None


def _activations_kl(layers: Sequence[LayerRecord], record: CalibrationRecord) -> float:
    """Nats per token that the kernels add to what the weights cost, at any width."""
    from flexquant_kernels import ops

    int8 = any(layer.kernel.startswith(ops.INT8_KERNELS) for layer in layers)
    return record.int8_activations[0] if int8 and record.int8_activations else 0.0


def _early_share(
    layers: Sequence[LayerRecord],
    ladder: Ladder,
    record: CalibrationRecord,
    probe_layer: int | None,
    fused: Mapping[str, Sequence[str]],
) -> np.ndarray:
    """Of the KL at each level, fp64 [levels], the part of layers before the probe: sensitivities
    add up nearly (design, section 5)."""
    if probe_layer is None:
        return np.ones(len(ladder))
    unit_of = {name: unit for unit in record.units for name in unit.layers}
    sums = np.zeros((2, len(ladder)))
    for index, layer in enumerate(layers):
        unit = unit_of.get(parts_of(layer.name, fused)[0])
        costs = {w: kl for w, (kl, _) in unit.sensitivity.items()} if unit else {}
        of_width = np.array([costs.get(width, 0.0) for width in range(PARENT_BITS + 1)])
        sums[int(index >= probe_layer)] += of_width[ladder.widths[:, index].numpy()]
    return sums[0] / np.maximum(sums.sum(0), 1e-12)
