# SPDX-License-Identifier: Apache-2.0
"""The precision table: one int32 entry per quantized layer, at an address that never changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_flexquant.format.layout import PARENT_BITS, PlaneLayout, bytes_read, width_at_least

CAPACITY = 1 << 14
"""Entries allocated before the model is known (64 KiB)."""


@dataclass(frozen=True)
class WeightError:
    """How far a layer's weights at each width are from the weights at all bits.

    `square_error[width]` and `square_norm` are sums over sampled rows, `weights` counts all. The
    shards of a layer add up.
    """

    weights: int
    square_norm: float
    square_error: dict[int, float]

    def __add__(self, other: WeightError) -> WeightError:
        return WeightError(
            self.weights + other.weights,
            self.square_norm + other.square_norm,
            {w: e + other.square_error[w] for w, e in self.square_error.items()},
        )

    def relative(self, width: int) -> float:
        """Squared error over squared norm at `width` bits."""
        return self.square_error[width] / self.square_norm if self.square_norm > 0 else 0.0


@dataclass(frozen=True)
class LayerRecord:
    """What the ladder, the metrics and the operator know of one quantized layer.

    `name` is the vLLM module name; `kernel` and `reason` say which kernel runs it and why.
    `widths` are those at which it can run, ascending: fewer than the layout's if it was pruned.
    """

    name: str
    rows: int
    columns: int
    group_size: int
    layout: PlaneLayout
    widths: tuple[int, ...]
    kernel: str
    reason: str
    error: WeightError

    def bytes_read(self, width: int) -> int:
        """Bytes of planes and scales that one step reads at `width`."""
        return bytes_read(self.rows, self.columns, self.group_size, width)


def allowed_widths(layers: Sequence[LayerRecord]) -> torch.Tensor:
    """int32 [layers, 9]: the width at which each layer runs when some width in bits is wanted.

    The smallest one that it has at or above the wanted one, else its highest.
    """
    return torch.tensor(
        [
            [width_at_least(layer.widths, wanted) for wanted in range(PARENT_BITS + 1)]
            for layer in layers
        ],
        dtype=torch.int32,
    ).reshape(len(layers), PARENT_BITS + 1)


class PrecisionTable:
    """Widths in bits of all layers: `tensor`, int32 [CAPACITY] on the device of the kernels.

    Layers hold 1-element views of it. Its values change between steps, its address never does, so
    compiled code and captured graphs stay valid.
    """

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.full((CAPACITY,), PARENT_BITS, dtype=torch.int32, device=device)
        self.layers: list[LayerRecord] = []
        self._taken = 0

    def reserve(self) -> tuple[int, torch.Tensor]:
        """The next free index and the int32 [1] view that a layer's kernel reads."""
        if self._taken == CAPACITY:
            raise RuntimeError(f"the precision table is full: {CAPACITY} layers")
        index = self._taken
        self._taken += 1
        self.layers.append(None)  # type: ignore[arg-type]
        return index, self.tensor[index : index + 1]

    def describe(self, index: int, record: LayerRecord) -> None:
        self.layers[index] = record

    @property
    def widths(self) -> torch.Tensor:
        """int32 [layers], a view."""
        return self.tensor[: self._taken]
