# SPDX-License-Identifier: Apache-2.0
"""Policy `progressive`: precision falls as an answer grows."""

from __future__ import annotations

from flexquant_kernels.state import State
from vllm_flexquant.policy.arrays import floats, indices, integers, largest, namespace
from vllm_flexquant.policy.protocol import Policy, StepFacts, take


class Progressive(Policy):
    """The first `State.full` tokens of an answer run at the best level; over the next
    `State.falling` ones the level falls evenly to `State.lowest`.

    The form is that of PMPD (arXiv 2410.13461), whose schedule has a few precisions where this has
    all levels. The youngest answer in the batch rules.
    """

    by_position = True

    def begin(self, state: State, step: StepFacts) -> None:
        if not len(step):
            return
        positions = indices(step.positions, step.sequences)
        xp = namespace(positions)
        top = state.sizes["levels"] - 1
        gone = xp.clip(floats((positions - state.full) / state.falling), 0, 1)
        wanted = largest(xp.round(top - gone * (top - state.lowest))).reshape(1)
        take(state, integers(wanted))
