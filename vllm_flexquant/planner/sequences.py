# SPDX-License-Identifier: Apache-2.0
"""What is remembered of each running sequence, keyed by request and forgotten when it ends."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_flexquant.policy.arrays import Array, indices, namespace, view

if TYPE_CHECKING:
    from flexquant_kernels.cpu.budget import LogitsReader


class SlotBook:
    """Gives each running request a slot of the device buffers.

    batch, batch_slots: the requests admitted last and their slots.
    """

    def __init__(self, capacity: int) -> None:
        self._free = list(range(capacity - 1, -1, -1))
        self._slots: dict[str, int] = {}
        self.batch: list[str] = []
        self.batch_slots: list[int] = []

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._slots

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __getitem__(self, request_id: str) -> int:
        return self._slots[request_id]

    def admit(self, request_ids: Sequence[str]) -> list[str]:
        """Give a slot to each request of a batch that has none; returns those.

        Preempted requests keep their slots while there are enough; when there are not, those
        waiting longest lose theirs, and start anew when they come back.

        Args:
            request_ids: not more than the capacity.
        """
        new = [r for r in request_ids if r not in self._slots]
        if len(new) > len(self._free):
            batch = set(request_ids)
            waiting = [r for r in self._slots if r not in batch]
            for request_id in waiting[: len(new) - len(self._free)]:
                self._free.append(self._slots.pop(request_id))
        for request_id in new:
            self._slots[request_id] = self._free.pop()
        self.batch = list(request_ids)
        self.batch_slots = [self._slots[r] for r in request_ids]
        return new

    def retain(self, running: Container[str]) -> list[str]:
        """Take back the slots of requests that are not in `running`; returns those."""
        ended = [r for r in self._slots if r not in running]
        for request_id in ended:
            self._free.append(self._slots.pop(request_id))
        return ended


class SequenceEntropy:
    """Moving average of the entropy of each sequence's logits.

    average: fp32 [slots + 1] nats; seen: bool [slots + 1]. The last slot takes rows that count for
    no sequence (prompt chunks whose token is discarded). unknown: int64 [1], rows so far whose
    logits were no distribution.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.average = torch.zeros(slots + 1, dtype=torch.float32, device=device)
        self.seen = torch.zeros(slots + 1, dtype=torch.bool, device=device)
        self._average, self._seen = view(self.average), view(self.seen)
        self.unknown = torch.zeros(1, dtype=torch.int64, device=device)
        self._unknown = view(self.unknown)
        self._reader: LogitsReader | None = None

    def use_kernels(self) -> None:
        """From now on, `read` is one native call where the kernels are loaded (CPU)."""
        from flexquant_kernels import ops
        from flexquant_kernels.cpu.budget import LogitsReader

        if isinstance(self._average, np.ndarray) and ops.native_status().loaded:
            self._reader = LogitsReader(len(self.average), self.average, self.seen, self.unknown)
            self._nats = self._read = view(self._reader.nats)
            self._slots: Array = None
            self._address = 0

    @property
    def discard(self) -> int:
        """The slot of rows that count for no sequence."""
        return len(self.average) - 1

    def of(self, slots: Array) -> tuple[Array, Array]:
        """Average and seen of `slots`, int64 [rows]."""
        return self._average[slots], self._seen[slots]

    def set(self, slots: Array, average: Array, seen: Array) -> None:
        """Go on from what `of` returned."""
        self._average[slots], self._seen[slots] = average, seen

    def forget(self, slots: Sequence[int]) -> None:
        """Start anew in `slots`, which new sequences take."""
        if slots:
            self._seen[indices(slots, self._seen)] = False

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
        xp = namespace(self._average)
        if drafted:
            entropy = _largest_of_slot(entropy, slots, len(self._average))
        before, seen = self.of(slots)
        mixed = entropy + decay * (before - entropy)
        keep = seen & xp.isfinite(mixed)
        self._average[slots] = xp.where(keep, mixed, entropy)
        self._unknown += (~xp.isfinite(entropy)).sum()
        self._seen[slots] = True


def _largest_of_slot(entropy: Array, slots: Array, count: int) -> Array:
    if isinstance(entropy, torch.Tensor):
        largest = entropy.new_full((count,), -torch.inf)
        return largest.scatter_reduce_(0, slots, entropy, "amax")[slots]
    largest = np.full(count, -np.inf, dtype=entropy.dtype)
    np.maximum.at(largest, slots, entropy)
    return largest[slots]
