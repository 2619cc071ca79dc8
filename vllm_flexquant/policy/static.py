# SPDX-License-Identifier: Apache-2.0
"""Policies `static` and `manual`."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_flexquant.policy.arrays import namespace
from vllm_flexquant.policy.decision import Decision, StepSignals


@dataclass(frozen=True)
class FixedPolicy:
    """One level, whatever the signals say."""

    level: int

    def decide(self, signals: StepSignals, last: Decision) -> Decision:
        xp = namespace(last.level)
        level = xp.full_like(last.level, self.level)
        return Decision(level, xp.where(level == last.level, last.held + 1, 0))
