# SPDX-License-Identifier: Apache-2.0
"""The ladder: precision tables from cheapest to best.

A calibrated checkpoint brings its own, ordered by KL of the model's output. For any other, rungs
are ordered by weight error: from all layers at all bits, each rung lowers the layer whose loss
grows least per byte saved (greedy). A layer's loss is its relative squared error times its number
of weights: without that factor the largest layer, which is the output layer of a small model, would
always look cheapest, and the KL would pay for it.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_flexquant.format.checkpoint import parts_of
from vllm_flexquant.format.layout import PARENT_BITS
from vllm_flexquant.format.record import CalibrationRecord
from vllm_flexquant.planner.table import LayerRecord, WeightError


@dataclass(frozen=True)
class Ladder:
    """`widths`: int32 [levels, layers], level 0 the cheapest.

    `bytes_read`: bytes of weights per step at each level. `mean_bits`: mean width over weights.
    `kl_nats`: mean KL per token to the unquantized model at each level, None if not calibrated.
    `source`: what ordered it.
    """

    widths: torch.Tensor
    bytes_read: tuple[int, ...]
    mean_bits: tuple[float, ...]
    source: str = "weight error (uncalibrated)"
    kl_nats: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.bytes_read)

    @property
    def cost(self) -> tuple[float, ...]:
        """Bytes read at each level over those of the best one."""
        top = max(self.bytes_read[-1], 1)
        return tuple(n / top for n in self.bytes_read)


def build_ladder(
    layers: Sequence[LayerRecord], errors: Mapping[str, WeightError] | None = None
) -> Ladder:
    """Order the precision tables of `layers` by weight error per byte saved.

    Args:
        layers: this rank's layers.
        errors: of every layer of the model by name, shards added up, whatever rank they are on
            (default: those of `layers`). Ranks that pass the same errors get ladders that agree
            level by level.
    """
    if errors is None:
        errors = {layer.name: layer.error for layer in layers}
    position = {layer.name: [index] for index, layer in enumerate(layers)}
    steps = [(position.get(name, []), width) for name, width in _lowerings(errors)]
    return _from_steps(layers, steps)


def calibrated_ladder(
    layers: Sequence[LayerRecord],
    calibration: CalibrationRecord,
    fused: Mapping[str, Sequence[str]],
) -> Ladder:
    """The ladder of a calibrated checkpoint.

    Args:
        layers: this rank's layers. Steps of layers on other ranks leave its table as it is, so
            that all ranks agree level by level.
        fused: vLLM's `packed_modules_mapping`: last part of a fused layer's name to those of the
            layers in it.

    Raises:
        ValueError: the calibration has no ladder, or one that does not fit `layers`.
    """
    if calibration.ladder is None:
        raise ValueError("flexquant.json has a calibration without a ladder; quantize again")
    unit_of = {name: i for i, unit in enumerate(calibration.units) for name in unit.layers}
    positions: dict[int, list[int]] = {}
    for index, layer in enumerate(layers):
        parts = parts_of(layer.name, fused)
        known = {unit_of[part] for part in parts if part in unit_of}
        if not known:
            raise ValueError(
                f"flexquant.json does not know layer {layer.name}; it belongs to another model, "
                "copy the checkpoint again"
            )
        if len(known) > 1:
            raise ValueError(
                f"vLLM fuses {', '.join(parts)} into {layer.name}, but flexquant.json gives them "
                "widths of their own; quantize again"
            )
        positions.setdefault(known.pop(), []).append(index)
    steps = [(positions.get(s.unit, []), s.width) for s in calibration.ladder.steps]
    return _from_steps(
        layers,
        steps,
        f"KL on {calibration.text.get('text', 'calibration text')} ({calibration.ladder.search})",
        tuple(rung.kl_nats for rung in reversed(calibration.ladder.rungs)),
    )


def _from_steps(
    layers: Sequence[LayerRecord], steps: Sequence[tuple[Sequence[int], int]], *facts: Any
) -> Ladder:
    """From (positions, width) of each step down."""
    rung = [layer.widths[-1] for layer in layers]
    rungs = [list(rung)]
    for positions, width in steps:
        for position in positions:
            rung[position] = width
        rungs.append(list(rung))
    rungs.reverse()
    return Ladder(
        torch.tensor(rungs, dtype=torch.int32).reshape(len(rungs), len(layers)),
        tuple(bytes_read(layers, r) for r in rungs),
        tuple(mean_bits(layers, r) for r in rungs),
        *facts,
    )


def bytes_read(layers: Sequence[LayerRecord], widths: Sequence[int]) -> int:
    """Bytes of planes and scales that a step reads."""
    return sum(layer.bytes_read(w) for layer, w in zip(layers, widths, strict=True))


def mean_bits(layers: Sequence[LayerRecord], widths: Sequence[int]) -> float:
    """Mean width over all weights."""
    sizes = [layer.rows * layer.columns for layer in layers]
    return sum(n * w for n, w in zip(sizes, widths, strict=True)) / max(sum(sizes), 1)


def _lowerings(errors: Mapping[str, WeightError]) -> list[tuple[str, int]]:
    """(layer, its next width) in the order of rungs; ties go by name, so that ranks agree."""
    queue: list[tuple[float, str, int]] = []

    def offer(name: str, width: int) -> None:
        error = errors[name]
        if lower := [w for w in error.square_error if w < width]:
            target = max(lower)
            growth = error.weights * (error.relative(target) - error.relative(width))
            saved = error.weights * (width - target) / PARENT_BITS
            heapq.heappush(queue, (growth / saved, name, target))

    for name, error in errors.items():
        offer(name, max(error.square_error))
    order = []
    while queue:
        _, name, width = heapq.heappop(queue)
        order.append((name, width))
        offer(name, width)
    return order
