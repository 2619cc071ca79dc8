# SPDX-License-Identifier: Apache-2.0
"""Policy `progressive`: precision falls as an answer grows."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_flexquant.policy.arrays import floats, integers, largest, namespace
from vllm_flexquant.policy.decision import Decision, StepSignals


@dataclass(frozen=True)
class ProgressivePolicy:
    """The first `full` tokens of an answer run at the best level; over the next `falling` ones the
    level falls evenly to `lowest`.

    The form is that of PMPD (arXiv 2410.13461), whose schedule has a few precisions where this has
    all levels. The youngest answer in the batch rules.
    """

    levels: int
    lowest: int
    full: int
    falling: int

    def decide(self, signals: StepSignals, last: Decision) -> Decision:
        xp = namespace(signals.position)
        top = self.levels - 1
        gone = xp.clip(floats(signals.position - self.full) / self.falling, 0, 1)
        wanted = integers(largest(xp.round(top - gone * (top - self.lowest)))).reshape(1)
        return Decision(wanted, xp.where(wanted == last.level, last.held + 1, 0))
