# SPDX-License-Identifier: Apache-2.0
"""Policies `static` and `manual`, and `load`: one level, and what load leaves of it."""

from __future__ import annotations

from flexquant_kernels.state import State
from vllm_flexquant.policy.protocol import Policy, StepFacts, take


class Static(Policy):
    """The level `State.pinned`, whatever the signals say."""

    def __init__(self, pinned: bool = True) -> None:
        self.pinned = pinned

    def begin(self, state: State, step: StepFacts) -> None:
        take(state, state.pinned)
