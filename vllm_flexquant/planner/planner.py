# SPDX-License-Identifier: Apache-2.0
"""One per worker: turns signals into the precision table, step by step.

Order within an engine step n: `before_forward` (host facts, decision, table) -> layers read their
entries; before the one that the probe listens to, `probe` may rewrite the later ones ->
`after_logits` (entropy of step n, which decides step n + 1).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from vllm_flexquant.format.layout import PARENT_BITS, width_at_least, width_at_most
from vllm_flexquant.format.record import CalibrationRecord
from vllm_flexquant.options import PINNED, FlexQuantOptions, PolicyUpdate
from vllm_flexquant.planner.budget_control import BudgetControl
from vllm_flexquant.planner.figures import listen, read_figures
from vllm_flexquant.planner.ladder import (
    Ladder,
    build_ladder,
    calibrated_ladder,
)
from vllm_flexquant.planner.sequences import SequenceEntropy, SlotBook
from vllm_flexquant.planner.step import Batch, BatchFacts, Held, StepRecord
from vllm_flexquant.planner.table import LevelTable, PrecisionTable, WeightError, allowed_widths
from vllm_flexquant.policy.arrays import Array, copied, host, indices, integers, namespace, view
from vllm_flexquant.policy.budget import CLASSES
from vllm_flexquant.policy.choose import make_policy, resolve_policy
from vllm_flexquant.policy.decision import Decision, LevelPolicy, StepSignals, decide_below
from vllm_flexquant.policy.load import LoadControl
from vllm_flexquant.requests.grant import ClassBook, Promise
from vllm_flexquant.speculation.drafts import SelfSpeculation
from vllm_flexquant.telemetry.snapshot import metrics, status
from vllm_flexquant.telemetry.steps import Recorder, Step
from vllm_flexquant.telemetry.sums import RunAt, SinceAsked, StepCounts

CLOCKED = 8
"""Of so many steps, one is timed where no target asks for all of them."""


class Controller:
    """State and decisions of one worker."""

    def __init__(self, options: FlexQuantOptions) -> None:
        self.options = options
        self.table: PrecisionTable | None = None
        self.steps = 0
        self.requests: SlotBook | None = None
        """Whose state is held, where the slots are ours (V1 runner)."""
        self.held: dict[int, Held] = {}
        """By slot; those of requests that have ended stay until the slot is taken again."""
        self.classes = ClassBook(options.classes, options.default_class, options.budget, CLASSES)
        self._unheld = Held(*self.classes.admit(Promise())[:2])
        self.budget: BudgetControl | None = None
        self._written_floor: int | None = None
        """Under a pinned policy: the floor with which the table was written last."""
        self.batch: Batch | None = None
        self.facts = BatchFacts()
        self._facts_from: object = None
        self._admitted = 0
        self._began, self._seconds = time.perf_counter(), 0.0
        self._run_at: tuple[int, int] | None = None
        """Bounds of the step before, if it was one of decoding alone."""
        self._delayed: frozenset[int] = frozenset()
        """Slots that decoded in the step before, if it held prompt tokens too."""
        self.counts, self.since_asked = StepCounts(), SinceAsked()
        self.speculation: SelfSpeculation | None = None
        self._drafts = False
        self._trace: deque[StepRecord] = deque(maxlen=options.trace_steps)
        self._recorder = Recorder(options.trace_steps) if options.trace_steps else None

    # ---- set-up

    def allocate(self, device: torch.device, slots: int, tokens: int = 1) -> None:
        """Allocate the buffers, before the weights are loaded, at addresses that stay.

        Args:
            slots: sequences that run at a time at most.
            tokens: rows of a forward pass at most.
        """
        self.device, self._on_host = device, device.type == "cpu"
        self.table = PrecisionTable(device)
        self.sequences = SequenceEntropy(slots, device)
        self._tokens = tokens
        nothing = torch.zeros(2, dtype=torch.int32, device=device)
        self.last = Decision(view(nothing[:1]), view(nothing[1:]))

    def start(
        self,
        errors: Mapping[str, WeightError] | None = None,
        calibration: CalibrationRecord | None = None,
        fused: Mapping[str, Sequence[str]] | None = None,
        ranks: int = 1,
    ) -> None:
        """Build ladder and policy once all layers are loaded.

        Args:
            errors: as `build_ladder`, which is used where there is no `calibration`.
            fused: as `calibrated_ladder`.
            ranks: workers of the model, which must decide the same without asking each other.

        Raises:
            ValueError: the options ask for what the checkpoint does not have.
        """
        from flexquant_kernels import ops  # noqa: F401 - registers the operators

        assert self.table is not None
        self._ranks = ranks
        self.calibration = calibration
        layers = self.table.layers
        self.ladder: Ladder = (
            calibrated_ladder(layers, calibration, fused or {})
            if calibration is not None
            else build_ladder(layers, errors)
        )
        self._rungs = view(self.ladder.widths.to(self.device))
        self._widths = sorted({width for layer in layers for width in layer.widths})
        self._written = view(self.table.widths)
        pruned = any(layer.widths != layer.layout.widths for layer in layers)
        allowed = view(allowed_widths(layers).to(self.device)) if pruned else None
        self._levels = LevelTable(self._rungs, self._written, allowed)
        self.sequences.use_kernels()
        self.last.level[:] = len(self.ladder) - 1
        if calibration is not None and self.ladder.kl_nats is not None:
            listening = listen(self.device, layers, calibration, fused or {})
            probe_layer = listening.layer if listening else None
            figures = read_figures(layers, self.ladder, calibration, probe_layer, fused or {})
            self.budget = BudgetControl(
                self.device, figures, listening, self.sequences, self._levels, self._tokens
            )
        self.load = LoadControl(np.array(self.ladder.cost))
        self._adopt(self.options)
        full = integers(indices([layer.widths[-1] for layer in layers], self._rungs))
        self._levels.put(self._bounded(full, 0))

    def _adopt(self, options: FlexQuantOptions) -> None:
        options = resolve_policy(options, calibrated=self.budget is not None)
        if self.speculation is not None:
            self.speculation.adopt(options)
        levelled = options.policy != "budget"
        self.policy: LevelPolicy | None = (
            make_policy(options, self.ladder.mean_bits) if levelled else None
        )
        if self.budget is not None:
            self.budget.adopt(options)
        self.classes.set_default_budget(options.budget)
        self._ask()
        self.options = options
        self._bounds_by_floor: dict[int, tuple[int, int]] = {}
        self.load.aim_at(options.target_ms and options.target_ms / 1e3)
        self._written_floor = None
        if self._recorder is not None:
            self._recorder.clear()
        if self.pinned:
            assert self.policy is not None
            slots = indices([], self._rungs)
            self._decide(StepSignals(*self.sequences.of(slots), slots))

    def _ask(self, new: Sequence[int] = ()) -> None:
        if self.budget is not None:
            self.budget.ask(self.classes.budgets, new)
            if self._recorder is not None:
                self._recorder.ask(self.classes.budgets, new)

    # ---- requests

    def admit(self, slot: int, extra_args: Mapping[str, Any] | None) -> None:
        """A request takes `slot`.

        Raises:
            ValueError: as `Promise.read`; the request runs at all bits.
        """
        self._admitted += 1
        if slot in self.held:
            self.classes.release(self.held[slot].number)
        self.held[slot] = Held(self._unheld.number, PARENT_BITS)
        promise = Promise.read(extra_args, self.options.classes)
        number, floor, new = self.classes.admit(promise)
        self.held[slot] = Held(number, floor)
        if new:
            self._ask([number])

    # ---- the step

    def before_forward(self, batch: Batch) -> None:
        """Decide the widths of this step and write the table."""
        ran = self.count()
        self.batch = batch
        source = batch.slots, batch.rows, batch.prompt, batch.discarded, self._admitted
        steady = source == self._facts_from
        if self.speculation is None:
            self._clock(ran if steady else None)
        if not steady:
            self.facts, self._facts_from = self._facts_of(batch), source
        if self.pinned:
            bounds = self._bounds(self.facts.floor)
            self._write_pinned()
        else:
            bounds = self._decide_step(batch)
        decoding, prompts = self.facts.decoding, any(batch.prompt)
        self._run_at = bounds if decoding and not prompts else None
        self._delayed = frozenset(batch.slots[i] for i in decoding if prompts)
        if self.options.trace_steps:
            self._record(batch)
        self.steps += 1

    def _facts_of(self, batch: Batch) -> BatchFacts:
        held = [self.held.get(slot, self._unheld) for slot in batch.slots]
        decoding = [i for i, prompt in enumerate(batch.prompt) if not prompt]
        rows = (batch.slots, batch.rows, [h.number for h in held], range(len(held)))
        pairs = zip(batch.slots, batch.discarded, strict=True)
        return BatchFacts(
            max((h.floor for h in held), default=0),
            decoding,
            indices([[row[i] for i in decoding] for row in rows], self._rungs),
            indices([self.sequences.discard if d else s for s, d in pairs], self._rungs),
        )

    def count(self) -> RunAt | None:
        """Count the step before and return what it ran at, if it was one of decoding alone.

        On a GPU its level would have to be waited for; only under a target it is.
        """
        bounds, self._run_at = self._run_at, None
        if bounds is None or not (self._on_host or self.load.target is not None):
            return None
        ran = RunAt(*bounds, *self._levels_run())
        self.counts.add(ran)
        return ran

    def _levels_run(self) -> tuple[int, int]:
        if self.policy is None and self.budget is not None:
            return self.budget.first.level.item(), self.budget.later.level.item()
        level = self.last.level.item()
        return level, level

    def _decide_step(self, batch: Batch) -> tuple[int, int]:
        """Returns the bounds in bits that were in force."""
        low, high = self._bounds(self.facts.floor)
        decoding = len(self.facts.decoding)
        # each rank has a clock of its own
        if self.options.up_for_free and self._ranks == 1 and not self.load.pays(decoding):
            low = high
        if self.options.prefill == "full" and decoding < len(batch.slots):
            low = high
        ceiling, sequences = self._ceiling(), self.facts.sequences
        if self._recorder is not None:
            self._record_step(batch, (low, high), ceiling)
        if self.policy is None:
            assert self.budget is not None
            self.budget.begin(sequences, (low, high), ceiling)
            return low, high
        if self.facts.decoding:
            signals = StepSignals(*self.sequences.of(sequences[0]), self._positions(batch))
            self._decide(signals, ceiling)
        if self._recorder is not None:
            self._recorder.last.first = self._recorder.last.level = self.last.level.item()
        widths = self._rungs[self.last.level][0]
        self._levels.put(namespace(widths).clip(widths, low, high))
        return low, high

    def _positions(self, batch: Batch) -> Array:
        return indices([batch.positions[i] for i in self.facts.decoding], self._rungs)

    def _record_step(self, batch: Batch, bounds: tuple[int, int], ceiling: int) -> None:
        assert self._recorder is not None
        facts = self.facts.sequences
        average, known = self.sequences.of(facts[0])
        step = Step(
            average=host(average),
            known=host(known),
            classes=host(facts[2]),
            position=host(self._positions(batch)),
            low=bounds[0],
            high=bounds[1],
            ceiling=ceiling,
            seconds=self._seconds,
        )
        self._recorder.add(step, self._state() if self._recorder.wants_state else None)

    def _state(self) -> dict[str, Any]:
        """What the next decision depends on beside its step."""
        if self.policy is None and self.budget is not None:
            return self.budget.state()
        return {"last": [self.last.level.item(), self.last.held.item()]}

    def _decide(self, signals: StepSignals, ceiling: int | None = None) -> None:
        assert self.policy is not None
        decision = decide_below(self.policy, signals, self.last, ceiling)
        self.last.level[:], self.last.held[:] = decision.level, decision.held

    def _ceiling(self) -> int:
        """The best level that load allows for the sequences that decode in this step."""
        if self.options.rank_first == "budget" and self.policy is None:
            return len(self.ladder) - 1
        return self.load.ceiling(len(self.facts.decoding))

    def _clock(self, ran: RunAt | None) -> None:
        """Book the time from the step before to this one.

        Args:
            ran: what that step ran at, if both were of the same sequences.
        """
        every = self.load.target is not None or self._recorder is not None
        turn = self.steps % CLOCKED
        if not every and turn > 1:
            return
        now = time.perf_counter()
        self._seconds, self._began = now - self._began, now
        if self.batch is not None and not self._delayed.isdisjoint(self.batch.slots):
            self.load.book_prompt(self._seconds)  # else the engine may have rested between
        if ran is not None and (every or turn == 1) and (cost := self._cost_of(ran)) is not None:
            self.load.book(len(self.facts.decoding), cost, self._seconds)

    def _cost_of(self, ran: RunAt) -> float | None:
        """Cost of a step over one at the best level; None where bounds left other widths than those
        of a level."""
        if ran.low == self._widths[-1]:
            return 1.0
        if (ran.low, ran.high) != (self._widths[0], self._widths[-1]):
            return None
        if self.policy is None and self.budget is not None:
            return self.budget.cost(ran.first, ran.later)
        return float(self.load.cost[ran.later])

    def _write_pinned(self) -> None:
        """The level was decided when the policy was adopted; only a floor can change the table."""
        if self._written_floor != self.facts.floor:
            self._levels.put(self._bounded(self._rungs[self.last.level][0], self.facts.floor))
            self._written_floor = self.facts.floor

    def probe(self, x: torch.Tensor) -> None:
        """Decide later layers by what the probe's layer is given, [rows, H]."""
        if self.budget is not None and not self._drafts:
            self.budget.probe(x)

    # ---- drafts

    @contextmanager
    def drafting(self, widths: Array) -> Iterator[None]:
        """While drafts run: layers are at `widths`, int32 [layers], and nothing is decided."""
        before = copied(self._written)
        self._drafts = True
        self._levels.put(widths)
        try:
            yield
        finally:
            self._written[:], self._drafts = before, False

    def book_seconds(self, seconds: float) -> None:
        """The step that ran last took so many seconds per token of a sequence, with its drafts."""
        self._seconds = seconds
        if (ran := self._run_at and RunAt(*self._run_at, *self._levels_run())) is None:
            return
        if (cost := self._cost_of(ran)) is not None:
            self.load.book(len(self.facts.decoding), cost, seconds)

    @property
    def written(self) -> Array:
        """int32 [layers], the widths in force."""
        return self._written

    def rung(self, level: int) -> Array:
        """int32 [layers], the widths of a level."""
        return self._rungs[level]

    def after_logits(self, logits: torch.Tensor, slots: torch.Tensor | None = None) -> None:
        """Take in the logits of the step that `before_forward` announced.

        Args:
            logits: [rows, vocabulary], before penalties and temperature, masks applied.
            slots: int64 [rows] of each row; default: one row per request, in batch order.
        """
        batch = self.batch
        if batch is None:
            return
        decay, drafted = self.options.entropy_decay, slots is not None
        if slots is not None:
            entropy = view(torch.ops.flexquant.entropy(logits))
            self.sequences.update(entropy, view(slots), decay, drafted)
        elif len(logits) == len(batch.slots):
            entropy = self.sequences.read(logits, self.facts.logit_slots, decay)
        else:
            return
        if self.policy is None and self.budget is not None and not drafted and self.facts.decoding:
            self.budget.book(entropy)
            if self._recorder is not None and len(self._recorder):
                own = host(entropy[self.facts.sequences[3]])
                self._recorder.last.entropy, self._recorder.last.booked = own, True
        if self.options.trace_steps and self._trace:
            self._finish_record(entropy)

    @property
    def pinned(self) -> bool:
        return self.options.policy in PINNED

    def _bounds(self, floor: int) -> tuple[int, int]:
        """The operator's bounds in bits, and not below `floor`, which wins over them."""
        found = self._bounds_by_floor.get(floor)
        if found is None:
            options = self.options
            low, high = options.min_bits, options.max_bits
            if self.pinned and options.width is not None:
                low = high = options.width
            low = width_at_least(self._widths, max(low, floor))
            found = low, max(width_at_most(self._widths, high), low)
            self._bounds_by_floor[floor] = found
        return found

    def _bounded(self, widths: Array, floor: int) -> Array:
        low, high = self._bounds(floor)
        return namespace(widths).clip(widths, low, high)

    # ---- the operator's view

    def update(self, changes: Mapping[str, Any]) -> None:
        """Change the policy while serving; from the next step on.

        Raises:
            ValueError: a bad value; nothing is changed.
        """
        options = PolicyUpdate.read(changes).apply(self.options)
        if options.speculate and self.speculation is None:
            raise ValueError(
                f"speculate is {options.speculate}, but the engine was started without "
                "self-speculation; start it with option speculate"
            )
        self.count()
        self._adopt(options)
        self._levels.put(self._bounded(self._rungs[self.last.level][0], self.facts.floor))

    def status(self) -> dict[str, Any]:
        """As `telemetry.snapshot.status`."""
        return status(self)

    def metrics(self) -> dict[str, Any]:
        """As `telemetry.snapshot.metrics`."""
        return metrics(self)

    def steps_trace(self) -> bytes:
        """The last `trace_steps` steps as the content of a file that `flexquant replay` reads.

        Raises:
            ValueError: nothing is recorded.
        """
        if self._recorder is None:
            raise ValueError("no steps are recorded; start the server with trace_steps, say 10000")
        if self.pinned:
            raise ValueError(f"policy {self.options.policy} decides nothing; choose another one")
        header = {
            "options": self.plain_options(),
            "mean_bits": list(self.ladder.mean_bits),
            "cost": list(self.ladder.cost),
            "figures": self.budget and self.budget.figures,
            "probe_layer": self.budget and self.budget.listening and self.budget.listening.layer,
        }
        return self._recorder.trace(header).dump()

    def trace(self, clear: bool = False) -> list[dict[str, Any]]:
        """The last `trace_steps` steps, oldest first, as the fields of `StepRecord`."""
        records = [vars(record) for record in self._trace]
        if clear:
            self._trace.clear()
        return records

    def plain_options(self) -> dict[str, Any]:
        return self.options.model_dump(mode="json") | {"layout": str(self.options.layout)}

    def level(self) -> Array:
        """int32 [1], of the layers that are decided last."""
        if self.policy is None and self.budget is not None:
            return self.budget.later.level
        return self.last.level

    def _record(self, batch: Batch) -> None:
        average, seen = self.sequences.average.tolist(), self.sequences.seen.tolist()
        self._trace.append(
            StepRecord(
                step=self.steps,
                request_ids=list(batch.request_ids),
                prompt=list(batch.prompt),
                level=self.level().item(),
                widths=self._written.tolist(),
                average=[average[s] if seen[s] else None for s in batch.slots],
            )
        )

    def _finish_record(self, entropy: Array) -> None:
        """Add what is known once the step has run."""
        record = self._trace[-1]
        record.entropy = entropy.tolist()
        if self.policy is None and self.budget is not None:
            record.first_level = self.budget.first.level.item()
            record.level = self.budget.later.level.item()
            record.widths = self._written.tolist()
            scores = host(self.budget.row_scores())
            record.scores = scores.tolist()
            if self._recorder is not None and len(self._recorder):
                step = self._recorder.last
                step.first, step.level = record.first_level, record.level
                step.probed, step.scores = self.budget.probed, scores
