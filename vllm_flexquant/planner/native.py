# SPDX-License-Identifier: Apache-2.0
"""Policy `budget` in the native kernels of a CPU: one call for each moment of a step."""

from __future__ import annotations

import torch

from flexquant_kernels.cpu.decide import NativeSteps
from flexquant_kernels.state import Facts, State
from vllm_flexquant.policy.arrays import Array, tensor
from vllm_flexquant.policy.protocol import Policy, StepFacts


class NativeBudget(Policy):
    """As `policy.budget.Budget`, on the same state."""

    books = True
    writes = True

    def __init__(self, native: NativeSteps) -> None:
        self._native = native
        self._seen: Array = None
        self._entropy: Array = None
        self._now = self._before = Facts(torch.zeros(4, 0, dtype=torch.int64))

    def begin(self, state: State, step: StepFacts) -> None:
        self._before = self._now
        if step.sequences is not self._seen:
            self._now, self._seen = Facts(tensor(step.sequences)), step.sequences
        self._native.begin(self._now, self._before)

    def probe(self, state: State, x: torch.Tensor) -> None:
        self._native.probe(self._now, x)

    def decide(self, state: State, scores: Array) -> None:
        self._native.decide(self._now, tensor(scores))

    def book(self, state: State, entropy: Array) -> None:
        if entropy is not self._entropy:
            self._entropy, self._address = entropy, self._native.entropy_at(tensor(entropy))
        self._native.book(self._now, self._address)
