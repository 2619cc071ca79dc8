# SPDX-License-Identifier: Apache-2.0
"""Moving average of the entropy of each sequence's logits: `average` and `seen` of the `State`.

The last slot takes rows that count for no sequence (prompt chunks whose token is discarded).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flexquant_kernels import ops
from flexquant_kernels.cpu.decide import LogitsReader
from flexquant_kernels.state import State
from vllm_flexquant.policy.arrays import Array, indices, namespace, view
from vllm_flexquant.policy.entropy import averaged


class SequenceEntropy:
    """Reads logits into a state."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._reader: LogitsReader | None = None
        if isinstance(state.average, np.ndarray) and ops.native_status().loaded:
            self._reader = LogitsReader(state, len(state.average))
            self._nats = self._read = view(self._reader.nats)
            self._slots: Array = None
            self._address = 0

    @property
    def discard(self) -> int:
        """The slot of rows that count for no sequence."""
        return self._state.sizes["slots"] - 1

    def forget(self, slots: Sequence[int]) -> None:
        """Start anew in `slots`, which new sequences take."""
        if slots:
            self._state.seen[indices(slots, self._state.seen)] = False

    def read(self, logits: torch.Tensor, slots: Array, decay: float) -> Array:
        """`update` with the entropies of logits [rows, vocabulary], one row of each slot.

        Returns:
            fp32 [rows] nats, the same array while there are as many rows; its values stay until the
            next call.
        """
        if self._reader is not None:
            if slots is not self._slots:
                self._slots, self._address = slots, slots.ctypes.data
            if self._reader(logits, self._address, decay):
                if len(logits) != len(self._read):
                    self._read = self._nats[: len(logits)]
                return self._read
        entropy = view(torch.ops.flexquant.entropy(logits))
        self.update(entropy, slots, decay)
        return entropy

    def update(self, entropy: Array, slots: Array, decay: float, drafted: bool = False) -> None:
        """Take in the entropies of a step.

        Args:
            entropy: fp32 [rows] nats.
            slots: int64 [rows].
            decay: weight of the past; NaN in the past or the present is not averaged away but
                replaced by the present.
            drafted: a sequence may have several rows (drafted tokens), and counts its largest.
        """
        state = self._state
        xp = namespace(state.average)
        if drafted:
            entropy = _largest_of_slot(entropy, slots, len(state.average))
        state.average[slots] = averaged(state.average[slots], state.seen[slots], entropy, decay)
        state.unknown[:] += (~xp.isfinite(entropy)).sum()
        state.seen[slots] = True


def _largest_of_slot(entropy: Array, slots: Array, count: int) -> Array:
    if isinstance(entropy, torch.Tensor):
        largest = entropy.new_full((count,), -torch.inf)
        return largest.scatter_reduce_(0, slots, entropy, "amax")[slots]
    largest = np.full(count, -np.inf, dtype=entropy.dtype)
    np.maximum.at(largest, slots, entropy)
    return largest[slots]
