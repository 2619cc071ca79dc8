# SPDX-License-Identifier: Apache-2.0
"""What is counted of a worker's steps: sums that only grow, however long it runs."""

from __future__ import annotations

import numpy as np

from vllm_flexquant.planner.planner import Planner
from vllm_flexquant.planner.step import RanAt
from vllm_flexquant.planner.watcher import Watcher


class Sums(Watcher):
    """Counts the steps of a planner that decode alone.

    steps: how many. bits: their mean widths over all weights, added up. switches: those that ran at
    other widths than the one before.
    """

    def __init__(self, planner: Planner) -> None:
        self.steps = self.switches = 0
        self.bits = 0.0
        self._planner = planner
        self._last: RanAt | None = None
        self._bits_of: dict[tuple[int, int], np.ndarray] = {}
        """By bounds, of which there are no more than pairs of widths."""
        planner.watchers.add(self)

    def ran(self, step: RanAt) -> None:
        self.steps += 1
        self.switches += self._last is not None and step != self._last
        self._last = step
        self.bits += self.mean_bits(step)

    def mean_bits(self, step: RanAt) -> float:
        """Mean width over all weights of a step, bits."""
        bounds = step.low, step.high
        found = self._bits_of.get(bounds)
        if found is None:
            found = self._bits_of[bounds] = self._table(*bounds)
        return float(found[0, step.first] + found[1, step.later])

    def _table(self, low: int, high: int) -> np.ndarray:
        """fp64 [2, levels]: the parts of the mean that layers before and after the probe add."""
        planner = self._planner
        assert planner.table is not None
        layers = planner.table.layers
        sizes = np.array([layer.rows * layer.columns for layer in layers], dtype=np.float64)
        share = sizes / max(sizes.sum(), 1.0)
        rungs = planner.model.ladder.widths.numpy().clip(low, high)
        widths = planner.state.tensor("allowed").cpu().numpy()[np.arange(len(layers)), rungs]
        listening = planner.model.listening
        first = 0 if listening is None else listening.layer
        weighted = widths * share
        return np.stack([weighted[:, :first].sum(1), weighted[:, first:].sum(1)])
