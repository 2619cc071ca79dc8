# SPDX-License-Identifier: Apache-2.0
"""One per worker: from the facts of a step to the precision table.

Order within an engine step n: `step` (bounds, ceiling, first decision, table) -> layers read their
entries; before the one that the probe listens to, `probe` may rewrite the later ones -> `logits`
(entropy of step n, which decides step n + 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from flexquant_kernels import ops
from flexquant_kernels.cpu.decide import NativeSteps
from flexquant_kernels.state import State
from vllm_flexquant.format.record import CalibrationRecord
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner.bounds import Bounds
from vllm_flexquant.planner.clock import Clock
from vllm_flexquant.planner.figures import Figures, Probe, listen, read_figures, without_calibration
from vllm_flexquant.planner.ladder import Ladder, build_ladder, calibrated_ladder
from vllm_flexquant.planner.ledger import Ledger
from vllm_flexquant.planner.native import NativeBudget
from vllm_flexquant.planner.sequences import SequenceEntropy
from vllm_flexquant.planner.state import fill, make_state
from vllm_flexquant.planner.step import Batch, BatchFacts, RanAt
from vllm_flexquant.planner.table import PrecisionTable, WeightError
from vllm_flexquant.planner.watcher import Watchers
from vllm_flexquant.policy.arrays import Array, copied, indices, numbers, tensor, view
from vllm_flexquant.policy.budget import OTHER
from vllm_flexquant.policy.choose import make_policy, parameters, resolve_policy
from vllm_flexquant.policy.load import LoadControl
from vllm_flexquant.policy.protocol import LATER, Policy, StepFacts, write_widths
from vllm_flexquant.requests.accounts import asked
from vllm_flexquant.requests.grant import Grant, Terms

Agree = Callable[[torch.Tensor], torch.Tensor]
"""From an int32 tensor of this rank to that of the first rank of its tensor-parallel group."""


@dataclass(frozen=True)
class Model:
    """What of the model does not change while it is served.

    widths: at which some layer can run, ascending. figures: None without calibration. listening:
    the probe, None where this rank has none. ranks: workers of the model.
    """

    ladder: Ladder
    widths: Sequence[int]
    calibration: CalibrationRecord | None
    figures: Figures | None
    listening: Probe | None
    ranks: int


class Planner:
    """State and decisions of one worker."""

    def __init__(self, options: FlexQuantOptions, terms: Terms) -> None:
        self.options, self.terms = options, terms
        self._default = terms.grant(None)
        self.watchers = Watchers()
        self.speculates = False
        """Somebody can go by the option `speculate`."""
        self.table: PrecisionTable | None = None
        self.steps = 0
        self.grants: dict[int, Grant] = {}
        """Of the requests that run, by slot."""
        self.batch: Batch | None = None
        self.facts = BatchFacts()
        self._facts_from: object = None
        self._started = 0
        self._new: list[int] = []
        self._ran_in: tuple[int, int] | None = None
        """Bounds of the step before, if it was one of decoding alone."""
        self._pinned_at: tuple[int, int] | None = None
        self._armed = self._drafts = False
        self.asks_probe = False
        """The step in force is to be decided by the probe too."""

    # ---- set-up

    def allocate(self, device: torch.device, slots: int, tokens: int = 1) -> None:
        """Allocate the precision table, before the weights are loaded, at an address that stays.

        Args:
            slots: sequences that run at a time at most.
            tokens: rows of a forward pass at most.
        """
        self.device, self._on_host = device, device.type == "cpu"
        self.table = PrecisionTable(device)
        self._slots, self._tokens = slots, tokens

    def start(
        self,
        errors: Mapping[str, WeightError] | None = None,
        calibration: CalibrationRecord | None = None,
        fused: Mapping[str, Sequence[str]] | None = None,
        ranks: int = 1,
        agree: Agree | None = None,
    ) -> None:
        """Build ladder, state and policy once all layers are loaded.

        Args:
            errors: as `build_ladder`, which is used where there is no `calibration`.
            fused: as `calibrated_ladder`.
            ranks: workers of the model.
            agree: where tensor-parallel ranks decide for the same layers.

        Raises:
            ValueError: the options ask for what the checkpoint does not have.
        """
        assert self.table is not None
        fused, layers = fused or {}, self.table.layers
        ladder = (
            calibrated_ladder(layers, calibration, fused)
            if calibration is not None
            else build_ladder(layers, errors)
        )
        widths = sorted({width for layer in layers for width in layer.widths})
        figures = listening = None
        if calibration is not None and ladder.kl_nats is not None:
            listening = listen(self.device, layers, calibration, fused)
            first = listening.layer if listening else None
            figures = read_figures(layers, ladder, calibration, first, fused)
        self.model = Model(ladder, widths, calibration, figures, listening, ranks)
        self.state: State = make_state(
            self.table.widths,
            layers,
            ladder,
            self._slots,
            self._tokens,
            figures or without_calibration(ladder.cost),
            listening,
        )
        self.sequences = SequenceEntropy(self.state)
        self.ledger = Ledger(self.state) if figures is not None else None
        self.clock = Clock(LoadControl(np.array(ladder.cost)))
        self._agree = agree
        self._native = None
        if self._on_host and isinstance(self.state.kl, np.ndarray) and ops.native_status().loaded:
            self._native = NativeSteps(self.state)
        self._write: Callable[[int], None] = (
            partial(write_widths, self.state) if self._native is None else self._native.write
        )
        self._adopt(resolve_policy(self.options, calibrated=figures is not None))

    def _adopt(self, options: FlexQuantOptions) -> None:
        self.options = options
        if options.policy == "budget" and self._native is not None:
            self.policy: Policy = NativeBudget(self._native)
        else:
            self.policy = make_policy(options.policy, int(self.state.probe_layer[0]))
        fill(self.state, row_account=OTHER, probes=0)
        fill(self.state, **parameters(options, self.model.ladder.mean_bits))
        if self.ledger is not None:
            self.ledger.ask(asked(options.classes, options.budget))
        self._bounds = Bounds(options, self.model.widths)
        self.clock.load.aim_at(options.target_ms and options.target_ms / 1e3)
        by_probe = options.signal in ("probe", "both") and self.model.listening is not None
        self._probes = by_probe and self.policy.books
        self._facts_from = self._pinned_at = None
        nobody = StepFacts(indices([[]] * 4, self.state.table), 0)
        self._begin(self._bounds.of(self.facts.floor), nobody)
        for tell in self.watchers.changed:
            tell(options)

    def change(self, changes: Mapping[str, Any], apply: bool = True) -> None:
        """Go by other options from the next step on.

        Args:
            apply: False only to see whether it would be refused.

        Raises:
            ValueError: a bad value; nothing is changed.
        """
        options = self.options.changed(changes)
        options = resolve_policy(options, calibrated=self.ledger is not None)
        parameters(options, self.model.ladder.mean_bits)
        if options.speculate and not self.speculates:
            raise ValueError(
                f"speculate is {options.speculate}, but the engine was started without "
                "self-speculation; start it with option speculate"
            )
        for tell in self.watchers.check:
            tell(options)
        if apply:
            self.count()
            self._adopt(options)

    # ---- a request's life

    def started(self, slot: int, grant: Grant) -> None:
        """A request takes `slot`."""
        self.grants[slot] = grant
        self._started += 1
        self._new.append(slot)

    def ended(self, slot: int) -> None:
        """The request in `slot` has left."""
        self.grants.pop(slot, None)

    # ---- the step

    def step(self, batch: Batch) -> None:
        """Decide the widths of this step and write the table."""
        ran = self.count()
        for tell in self.watchers.deciding:
            tell()
        if self._new:
            self.sequences.forget(self._new)
            self._new = []
        self.batch = batch
        source = batch.slots, batch.rows, batch.prompt, batch.discarded, self._started
        steady = source == self._facts_from
        cost = self._cost_of(ran) if ran is not None and steady else None
        if not steady:
            self.facts, self._facts_from = self._facts_of(batch), source
        decoding = self.facts.decoding
        self.clock.tick(batch.slots, len(decoding), cost)
        bounds = self._bounds_now()
        step = StepFacts(self.facts.sequences, len(decoding))
        if self.policy.by_position:
            step.positions = [batch.positions[i] for i in decoding]
        self._begin(bounds, step)
        self._ran_in = bounds if decoding and not self.facts.prompts else None
        if self.facts.prompts:
            self.clock.delays([batch.slots[i] for i in decoding])
        self.steps += 1
        for tell in self.watchers.began:
            tell()

    def _facts_of(self, batch: Batch) -> BatchFacts:
        granted = [self.grants.get(slot, self._default) for slot in batch.slots]
        decoding = [i for i, prompt in enumerate(batch.prompt) if not prompt]
        rows = (batch.slots, batch.rows, [g.account for g in granted], range(len(granted)))
        discard = self.sequences.discard
        pairs = zip(batch.slots, batch.discarded, strict=True)
        return BatchFacts(
            max((g.floor for g in granted), default=0),
            decoding,
            indices([[row[i] for i in decoding] for row in rows], self.state.table),
            indices([discard if d else slot for slot, d in pairs], self.state.table),
            len(decoding) < len(batch.slots),
        )

    def _bounds_now(self) -> tuple[int, int]:
        """Lowest and highest width in bits that are in force in this step."""
        low, high = self._bounds.of(self.facts.floor)
        if self.policy.pinned:
            return low, high
        full = self.options.prefill == "full" and self.facts.prompts
        # each rank has a clock of its own
        clocked = self.options.up_for_free and self.model.ranks == 1
        if full or (clocked and not self.clock.load.pays(len(self.facts.decoding))):
            low = high
        return low, high

    def ceiling(self) -> int:
        """The best level that load allows for the sequences that decode in this step."""
        if self.policy.pinned or (self.options.rank_first == "budget" and self.policy.books):
            return len(self.model.ladder) - 1
        return self.clock.load.ceiling(len(self.facts.decoding))

    def _begin(self, bounds: tuple[int, int], step: StepFacts) -> None:
        if self.policy.pinned and bounds == self._pinned_at:
            return
        self._pinned_at = bounds
        state = self.state
        self._armed = self.asks_probe = self._probes and len(step) > 0
        if self._on_host:
            state.bounds[0], state.bounds[1] = bounds
        else:
            state.bounds[:] = indices(bounds, state.bounds)
        state.ceiling[0] = self.ceiling()
        state.probes[0] = self._armed
        self.policy.begin(state, step)
        if self._agree is not None and not self.policy.pinned:
            self._agree_from(0)
        elif not self.policy.writes:
            self._write(0)

    def probe(self, x: torch.Tensor) -> None:
        """Decide later layers by what the probe's layer is given, [rows, H].

        A captured graph replays this: it reads and writes the state alone.
        """
        if self._drafts or (self._on_host and not self._armed):
            return
        self._armed = False
        self.policy.probe(self.state, x)
        if self._agree is not None and self.model.listening is not None:
            self._agree_from(self.model.listening.layer)

    def _agree_from(self, layer: int) -> None:
        """Take up what the first rank decided, whose sums may differ from ours in last bits."""
        assert self._agree is not None
        decisions = tensor(self.state.decisions)
        decisions.copy_(self._agree(decisions))
        self._write(layer)

    def logits(
        self, logits: torch.Tensor, slots: torch.Tensor | None = None, drafted: bool = False
    ) -> None:
        """Take in the logits of the step that `step` announced.

        Args:
            logits: [rows, vocabulary], before penalties and temperature, masks applied.
            slots: int64 [rows] of each row; default: one row per request, in batch order.
            drafted: a sequence may have several rows; nothing is booked.
        """
        batch, self._armed = self.batch, False
        if batch is None:
            return
        decay = self.options.entropy_decay
        if slots is None and len(logits) == len(batch.slots):
            entropy = self.sequences.read(logits, self.facts.logit_slots, decay)
        elif slots is None:
            return
        else:
            entropy = view(torch.ops.flexquant.entropy(logits))
            if drafted:
                self.sequences.update(entropy, view(slots), decay, drafted=True)
            else:
                by_slot = self.state.average * 0
                by_slot[view(slots)] = entropy
                entropy = by_slot[indices(batch.slots, by_slot)]
                self.sequences.update(entropy, self.facts.logit_slots, decay)
        booked = self.policy.books and not drafted and len(self.facts.decoding) > 0
        if booked:
            self.policy.book(self.state, entropy)
        for tell in self.watchers.ended:
            tell(entropy, booked)

    # ---- what has run

    def count(self) -> RanAt | None:
        """What the step before ran at, once, if it was one of decoding alone.

        On a GPU its level would have to be waited for; only under a target it is.
        """
        bounds, self._ran_in = self._ran_in, None
        if bounds is None or not (self._on_host or self.clock.load.target is not None):
            return None
        first, later = self.state.decisions[: LATER + 1, 0].tolist()
        ran = RanAt(*bounds, first, later)
        for tell in self.watchers.ran:
            tell(ran)
        return ran

    def _cost_of(self, ran: RanAt) -> float | None:
        """Cost of a step over one at the best level; None where bounds left other widths than those
        of a level."""
        if ran.low == self._bounds.all[1]:
            return 1.0
        if (ran.low, ran.high) != self._bounds.all:
            return None
        return float(self.state.early_cost[ran.first] + self.state.late_cost[ran.later])

    def book_seconds(self, seconds: float) -> None:
        """The step that ran last took so many seconds per token of a sequence, with its drafts."""
        cost = None
        if self._ran_in is not None:
            levels = self.state.decisions[: LATER + 1, 0].tolist()
            cost = self._cost_of(RanAt(*self._ran_in, *levels))
        self.clock.book(len(self.facts.decoding), cost, seconds)

    # ---- drafts

    @contextmanager
    def drafting(self, widths: Array) -> Iterator[None]:
        """While drafts run: layers are at `widths`, int32 [layers], and nothing is decided."""
        table = self.state.table
        before, self._drafts = copied(table), True
        table[:] = self.state.allowed[numbers(widths), widths]
        try:
            yield
        finally:
            table[:], self._drafts = before, False
