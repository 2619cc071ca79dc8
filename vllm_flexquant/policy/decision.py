# SPDX-License-Identifier: Apache-2.0
"""What policies are told and what they answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vllm_flexquant.policy.arrays import Array, namespace


@dataclass(frozen=True)
class StepSignals:
    """What is known before a step of the sequences that decode in it.

    entropy: fp32 [rows], moving average of the entropy of each sequence's logits, nats, of the
        steps before; NaN asks for the best level.
    known: bool [rows], False where no logits of the sequence have been seen.
    position: int64 [rows], tokens that each has generated.
    """

    entropy: Array
    known: Array
    position: Array


@dataclass(frozen=True)
class Decision:
    """level: int32 [1]. held: int32 [1], steps since the level last changed."""

    level: Array
    held: Array


class LevelPolicy(Protocol):
    """Chooses the level of the next step, all at once."""

    def decide(self, signals: StepSignals, last: Decision) -> Decision: ...


def decide_below(
    policy: LevelPolicy, signals: StepSignals, last: Decision, ceiling: int | None
) -> Decision:
    """What `policy` decides, but not above `ceiling`."""
    decision = policy.decide(signals, last)
    if ceiling is None:
        return decision
    return Decision(namespace(decision.level).clip(decision.level, None, ceiling), decision.held)


def hold(
    wanted: Array, last: Decision, may: Array, levels: int, hysteresis: float, dwell: int
) -> Decision:
    """`wanted`, int32 [1], or the last level where the change is too small or comes too soon.

    Args:
        may: bool [1], False to stay.
        hysteresis: share of the ladder that a change must exceed; an end is reached however small
            the change.
        dwell: steps between two changes at least.
    """
    xp = namespace(wanted)
    top = levels - 1
    moves = abs(wanted - last.level) > least_move(hysteresis, levels)
    moves = moves | ((wanted != last.level) & ((wanted == 0) | (wanted == top)))
    moves = moves & (last.held + 1 >= dwell) & may
    return Decision(xp.where(moves, wanted, last.level), xp.where(moves, 0, last.held + 1))


def least_move(hysteresis: float, levels: int) -> float:
    """Levels that a change must exceed; rounded to fp32, as kernels have it."""
    return float(np.float32(hysteresis * (levels - 1)))
