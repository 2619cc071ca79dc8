# SPDX-License-Identifier: Apache-2.0
"""One per worker: turns signals into the precision table, step by step.

Order within an engine step n: `before_forward` (host facts, decision, table) -> layers read their
entries -> `after_logits` (entropy of step n, which decides step n + 1).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_flexquant.config import FlexQuantOptions, PolicyUpdate
from vllm_flexquant.format.layout import width_at_least, width_at_most
from vllm_flexquant.format.record import CalibrationRecord
from vllm_flexquant.runtime.ladder import (
    Ladder,
    build_ladder,
    bytes_read,
    calibrated_ladder,
    mean_bits,
)
from vllm_flexquant.runtime.policy import Decision, StepSignals, make_policy
from vllm_flexquant.runtime.sequences import SequenceEntropy, SlotBook
from vllm_flexquant.runtime.table import PrecisionTable, WeightError, allowed_widths


@dataclass(frozen=True)
class Batch:
    """Host facts of one step, in the order of the batch.

    slots: slot of each request. prompt: the step computes prompt tokens of it. discarded: the
    token sampled for it is thrown away (a prompt chunk that is not the last).
    floors: lowest width in bits that each request asked for, 0 for none.
    """

    request_ids: Sequence[str]
    slots: Sequence[int]
    prompt: Sequence[bool]
    discarded: Sequence[bool]
    floors: Sequence[int]


@dataclass
class StepRecord:
    """One step as `flexquant_trace` returns it. Entropies in nats, None where there are none."""

    step: int
    request_ids: list[str]
    prompt: list[bool]
    level: int
    widths: list[int]
    average: list[float | None]
    entropy: list[float | None] | None = None


class Controller:
    """State and decisions of one worker."""

    def __init__(self, options: FlexQuantOptions) -> None:
        self.options = options
        self.table: PrecisionTable | None = None
        self.steps = 0
        self.requests: SlotBook | None = None
        """Whose state is held, where the slots are ours (V1 runner)."""
        self.slot_floors: dict[int, int] = {}
        """Lowest width in bits that the request in each slot asked for."""
        self._floor_in_force = 0
        self._written_floor: int | None = None
        """Under a pinned policy: the floor with which the table was written last."""
        self._batch: Batch | None = None
        self._trace: deque[StepRecord] = deque(maxlen=options.trace_steps)
        self._entropy_op: Callable[[torch.Tensor], torch.Tensor] | None = None

    # ---- set-up

    def allocate(self, device: torch.device, slots: int) -> None:
        """Allocate the buffers, before the weights are loaded, at addresses that stay."""
        self.device = device
        self.table = PrecisionTable(device)
        self.sequences = SequenceEntropy(slots, device)
        self.last = Decision(
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )

    def start(
        self,
        errors: Mapping[str, WeightError] | None = None,
        calibration: CalibrationRecord | None = None,
        fused: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Build ladder and policy once all layers are loaded.

        Args:
            errors: as `build_ladder`, which is used where there is no `calibration`.
            fused: as `calibrated_ladder`.
        """
        from flexquant_kernels import ops  # noqa: F401 - registers the operators

        assert self.table is not None
        layers = self.table.layers
        self.ladder: Ladder = (
            calibrated_ladder(layers, calibration, fused or {})
            if calibration is not None
            else build_ladder(layers, errors)
        )
        self._rungs = self.ladder.widths.to(self.device)
        self._full = torch.tensor(
            [layer.widths[-1] for layer in layers], dtype=torch.int32, device=self.device
        )
        self._allowed = allowed_widths(layers).to(self.device)
        self._widths = sorted({width for layer in layers for width in layer.widths})
        self._pruned = any(layer.widths != layer.layout.widths for layer in layers)
        self._entropy_op = torch.ops.flexquant.entropy
        self.last.level.fill_(len(self.ladder) - 1)
        self._adopt(self.options)
        self._write(self._bounded(self._full, 0))

    def _adopt(self, options: FlexQuantOptions) -> None:
        self.policy = make_policy(options, len(self.ladder))
        self.options = options
        self._written_floor = None
        if self._pinned:
            nothing = self.sequences.seen[:0]
            self.last = self.policy.decide(StepSignals(nothing.float(), nothing), self.last)

    # ---- the step

    def before_forward(self, batch: Batch) -> None:
        """Decide the widths of this step and write the table."""
        self._batch = batch
        self._floor_in_force = max(batch.floors, default=0)
        if self._pinned:
            self._write_pinned()
        else:
            self._decide(batch)
        if self.options.trace_steps:
            self._record(batch)
        self.steps += 1

    def _decide(self, batch: Batch) -> None:
        decoding = [s for s, p in zip(batch.slots, batch.prompt, strict=True) if not p]
        if decoding:
            slots = self._index(decoding)
            signals = StepSignals(self.sequences.average[slots], self.sequences.seen[slots])
            self.last = self.policy.decide(signals, self.last)
        if any(batch.prompt) and self.options.prefill == "full":
            widths = self._full
        else:
            widths = self._rungs.index_select(0, self.last.level)[0]
        self._write(self._bounded(widths, self._floor_in_force))

    def _write_pinned(self) -> None:
        """The level was decided when the policy was adopted; only a floor can change the table."""
        if self._written_floor != self._floor_in_force:
            rung = self._rungs.index_select(0, self.last.level)[0]
            self._write(self._bounded(rung, self._floor_in_force))
            self._written_floor = self._floor_in_force

    def after_logits(self, logits: torch.Tensor, slots: torch.Tensor | None = None) -> None:
        """Take in the logits of the step that `before_forward` announced.

        Args:
            logits: [rows, vocabulary], before penalties and temperature, masks applied.
            slots: int64 [rows] of each row; default: one row per request, in batch order.
        """
        batch = self._batch
        if batch is None or self._entropy_op is None:
            return
        drafted = slots is not None
        if slots is None:
            if len(logits) != len(batch.slots):
                return
            pairs = zip(batch.slots, batch.discarded, strict=True)
            slots = self._index([self.sequences.discard if d else s for s, d in pairs])
        entropy = self._entropy_op(logits)
        self.sequences.update(entropy, slots, self.options.entropy_decay, drafted)
        if self.options.trace_steps and self._trace:
            self._trace[-1].entropy = entropy.tolist()

    def _index(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long).to(self.device, non_blocking=True)

    @property
    def _pinned(self) -> bool:
        return self.options.policy != "entropy"

    def _bounded(self, widths: torch.Tensor, floor: int) -> torch.Tensor:
        """`widths` within the operator's bounds, and not below `floor`, which wins over them."""
        options = self.options
        low, high = options.min_bits, options.max_bits
        if self._pinned and options.width is not None:
            low = high = options.width
        low = width_at_least(self._widths, max(low, floor))
        high = max(width_at_most(self._widths, high), low)
        return widths.clamp(low, high)

    def _write(self, widths: torch.Tensor) -> None:
        assert self.table is not None
        if self._pruned:
            widths = self._allowed.gather(1, widths.long().unsqueeze(1))[:, 0]
        self.table.widths.copy_(widths)

    # ---- the operator's view

    def update(self, changes: Mapping[str, Any]) -> None:
        """Change the policy while serving; from the next step on.

        Raises:
            ValueError: a bad value; nothing is changed.
        """
        self._adopt(PolicyUpdate.read(changes).apply(self.options))
        rung = self._rungs.index_select(0, self.last.level)[0]
        self._write(self._bounded(rung, self._floor_in_force))

    def status(self) -> dict[str, Any]:
        """What is in force now, as plain values (syncs a GPU)."""
        from flexquant_kernels import ops

        assert self.table is not None
        layers, widths = self.table.layers, self.table.widths.tolist()
        average, seen = self.sequences.average.tolist(), self.sequences.seen.tolist()
        batch = zip(self._batch.request_ids, self._batch.slots, strict=True) if self._batch else ()
        return {
            "steps": self.steps,
            "options": self.options.model_dump(mode="json") | {"layout": str(self.options.layout)},
            "level": int(self.last.level),
            "levels": len(self.ladder),
            "mean_bits": mean_bits(layers, widths),
            "bytes_read_per_step": bytes_read(layers, widths),
            "request_floor_bits": self._floor_in_force,
            "clamped_widths": ops.clamped_calls(),
            "entropy_nats": {request: average[s] for request, s in batch if seen[s]},
            "ladder": {
                "source": self.ladder.source,
                "kl_nats": self.ladder.kl_nats and list(self.ladder.kl_nats),
                "mean_bits": list(self.ladder.mean_bits),
                "bytes_read_per_step": list(self.ladder.bytes_read),
            },
            "layers": [
                {
                    "name": layer.name,
                    "width": width,
                    "widths": list(layer.widths),
                    "shape": [layer.rows, layer.columns],
                    "group_size": layer.group_size,
                    "kernel": layer.kernel,
                    "why": layer.reason,
                }
                for layer, width in zip(layers, widths, strict=True)
            ],
        }

    def trace(self, clear: bool = False) -> list[dict[str, Any]]:
        """The last `trace_steps` steps, oldest first, as the fields of `StepRecord`."""
        records = [vars(record) for record in self._trace]
        if clear:
            self._trace.clear()
        return records

    def _record(self, batch: Batch) -> None:
        assert self.table is not None
        average, seen = self.sequences.average.tolist(), self.sequences.seen.tolist()
        self._trace.append(
            StepRecord(
                step=self.steps,
                request_ids=list(batch.request_ids),
                prompt=list(batch.prompt),
                level=int(self.last.level),
                widths=self.table.widths.tolist(),
                average=[average[s] if seen[s] else None for s in batch.slots],
            )
        )
