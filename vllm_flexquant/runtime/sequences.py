# SPDX-License-Identifier: Apache-2.0
"""What is remembered of each running sequence, keyed by request and forgotten when it ends."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence

import numpy as np
import torch

from vllm_flexquant.policy.arrays import Array, indices, namespace, tensor, view


class SlotBook:
    """Gives each running request a slot of the device buffers."""

    def __init__(self, capacity: int) -> None:
        self._free = list(range(capacity - 1, -1, -1))
        self._slots: dict[str, int] = {}

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
    no sequence (prompt chunks whose token is discarded).
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.average = torch.zeros(slots + 1, dtype=torch.float32, device=device)
        self.seen = torch.zeros(slots + 1, dtype=torch.bool, device=device)
        self._average, self._seen = view(self.average), view(self.seen)
        self._kernel: Callable[..., None] | None = None

    def use_kernels(self) -> None:
        """From now on, `update` is one native call where the kernels are loaded."""
        from flexquant_kernels import ops
        from flexquant_kernels.cpu.budget import average_entropy

        if isinstance(self._average, np.ndarray) and ops.native_status().loaded:
            self._kernel = average_entropy

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
        if self._kernel is not None:
            self._kernel(tensor(entropy), tensor(slots), decay, self.average, self.seen)
            return
        before, seen = self.of(slots)
        mixed = entropy + decay * (before - entropy)
        keep = seen & xp.isfinite(mixed)
        self._average[slots] = xp.where(keep, mixed, entropy)
        self._seen[slots] = True


def _largest_of_slot(entropy: Array, slots: Array, count: int) -> Array:
    if isinstance(entropy, torch.Tensor):
        largest = entropy.new_full((count,), -torch.inf)
        return largest.scatter_reduce_(0, slots, entropy, "amax")[slots]
    largest = np.full(count, -np.inf, dtype=entropy.dtype)
    np.maximum.at(largest, slots, entropy)
    return largest[slots]
