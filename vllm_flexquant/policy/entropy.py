# SPDX-License-Identifier: Apache-2.0
"""Policy `entropy`: feedback of the entropy of each sequence's logits, and of nothing else."""

from __future__ import annotations

from flexquant_kernels.state import State
from vllm_flexquant.policy.arrays import Array, ascending, floats, integers, largest, namespace
from vllm_flexquant.policy.protocol import FIRST, LATER, Policy, StepFacts, by_index, hold, keep


class Entropy(Policy):
    """The more uncertain the running sequences, the higher the level.

    The form is that of FlexQuant (arXiv 2506.12024), which switches by perplexity entropy at each
    token; its formula is not public, so this one is our own definition: the aggregate of the
    sequences' average entropies maps linearly from `entropy_low` to `entropy_high` nats to the
    levels, a change must exceed a share of the ladder and follow the last one by `dwell` steps.
    An entropy that is no number asks for the best level.
    """

    def begin(self, state: State, step: StepFacts) -> None:
        if not len(step):
            return
        slots = step.sequences[0]
        xp = namespace(slots)
        known = state.seen[slots]
        uncertain = xp.nan_to_num(state.average[slots], nan=xp.inf, posinf=xp.inf)
        # bounded, so that one row without a usable entropy pulls a mean to the best level
        uncertain = xp.minimum(uncertain, floats(state.entropy_high * len(step)))
        spread = state.entropy_high - state.entropy_low
        share = (_combined(state, uncertain, known) - state.entropy_low) / spread
        top = state.sizes["levels"] - 1
        wanted = integers(xp.round(xp.clip(floats(share), 0, 1) * top)).reshape(1)
        hold(state, FIRST, wanted, known.any())
        keep(state, LATER, state.decisions[FIRST, :1], state.decisions[FIRST, 1:])


def averaged(before: Array, seen: Array, entropy: Array, decay: float) -> Array:
    """The moving averages after a step, fp32 nats, of those before it and its own entropies.

    What is no number is not averaged away, but replaced by the present.

    Args:
        seen: bool, whether there is one before. decay: weight of the past.
    """
    xp = namespace(before)
    mixed = entropy + decay * (before - entropy)
    return xp.where(seen & xp.isfinite(mixed), mixed, entropy)


def _combined(state: State, entropy: Array, known: Array) -> Array:
    """fp32 [1] nats, of fp32 and bool [n]."""
    xp = namespace(entropy)

    def mean() -> Array:
        # in fp64, so that neither the order of rows nor the device decides
        total = xp.where(known, entropy, 0.0).sum(dtype=xp.float64)
        return floats((total / xp.clip(known.sum(), 1, None)).reshape(1))

    def quantile() -> Array:
        # nearest rank among the known ones
        ordered = ascending(xp.where(known, entropy, xp.inf))
        rank = xp.round(floats(xp.clip(known.sum() - 1, 0, None)) * floats(state.quantile))
        return ordered[integers(rank)]

    def greatest() -> Array:
        return largest(xp.where(known, entropy, -xp.inf)).reshape(1)

    return by_index(state.aggregate, (mean, quantile, greatest))
