# SPDX-License-Identifier: Apache-2.0
"""Policy `entropy`: feedback of the entropy of each sequence's logits, and of nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_flexquant.policy.arrays import Array, ascending, floats, integers, largest, namespace
from vllm_flexquant.policy.decision import Decision, StepSignals, hold


@dataclass(frozen=True)
class EntropyPolicy:
    """The more uncertain the running sequences, the higher the level.

    The form is that of FlexQuant (arXiv 2506.12024), which switches by perplexity entropy at each
    token; its formula is not public, so this one is our own definition: the aggregate h of the
    sequences' entropies maps linearly from [low, high] nats to the levels, a change must exceed
    `hysteresis` (a share of the ladder) and follow the last one by `dwell` steps.
    """

    levels: int
    low: float
    high: float
    hysteresis: float
    dwell: int
    aggregate: str
    quantile: float

    def decide(self, signals: StepSignals, last: Decision) -> Decision:
        xp = namespace(signals.entropy)
        uncertain = xp.nan_to_num(signals.entropy, nan=xp.inf, posinf=xp.inf)
        # bounded, so that one row without a usable entropy pulls a mean to the best level
        uncertain = xp.clip(uncertain, None, self.high * max(len(uncertain), 1))
        share = (self._combine(uncertain, signals.known) - self.low) / (self.high - self.low)
        wanted = integers(xp.round(xp.clip(share, 0, 1) * (self.levels - 1))).reshape(1)
        known = signals.known.any()
        return hold(wanted, last, known, self.levels, self.hysteresis, self.dwell)

    def _combine(self, entropy: Array, known: Array) -> Array:
        xp = namespace(entropy)
        if self.aggregate == "max":
            return largest(xp.where(known, entropy, -xp.inf))
        if self.aggregate == "quantile":
            # nearest rank among the known ones
            ordered = ascending(xp.where(known, entropy, xp.inf))
            rank = xp.round(floats(xp.clip(known.sum() - 1, 0, None)) * self.quantile)
            return ordered[integers(rank).reshape(1)]
        # in fp64, so that neither the order of rows nor the device decides
        total = xp.where(known, entropy, 0.0).sum(dtype=xp.float64)
        return floats(total / xp.clip(known.sum(), 1, None))
