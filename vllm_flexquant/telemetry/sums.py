# SPDX-License-Identifier: Apache-2.0
"""What a worker counts of its steps, and reports when `/metrics` is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from vllm_flexquant.planner.ladder import Ladder, mean_bits
from vllm_flexquant.planner.table import LayerRecord


class RunAt(NamedTuple):
    """What a step ran at: bounds of widths in bits, levels of the layers before and after the
    probe."""

    low: int
    high: int
    first: int
    later: int


@dataclass
class StepCounts:
    """Decode steps by what they ran at. Counting is one dictionary entry; sums are made later."""

    ran: Counter[RunAt] = field(default_factory=Counter)
    switches: int = 0
    _last: RunAt | None = None

    def add(self, step: RunAt) -> None:
        """A step has run."""
        self.ran[step] += 1
        self.switches += self._last is not None and step != self._last
        self._last = step

    def bits(self, layers: Sequence[LayerRecord], ladder: Ladder, probe_layer: int) -> float:
        """Sum over the steps of the mean width over all weights, bits."""
        total = 0.0
        for step, count in self.ran.items():
            rung = torch.cat(
                [ladder.widths[step.first, :probe_layer], ladder.widths[step.later, probe_layer:]]
            )
            total += count * mean_bits(layers, rung.clamp(step.low, step.high).tolist())
        return total


class SinceAsked:
    """Turns sums into what was added since they were asked for last, by anyone: each addition is
    handed out once, so that the counters of several API servers add up to the sums."""

    def __init__(self) -> None:
        self._told: dict[Any, float] = {}

    def __call__(self, sums: Mapping[Any, float]) -> dict[Any, float]:
        """Additions to `sums`; one that has become less begins anew."""
        added = {}
        for name, value in sums.items():
            before = self._told.get(name, 0.0)
            added[name] = value - before if value >= before else value
        self._told |= sums
        return added
