# SPDX-License-Identifier: Apache-2.0
"""What a policy is: three moments of a step, over one state.

All that a policy reads and writes is in the `State`, its own parameters included: on a GPU what
runs in a captured graph goes by new values without being captured again, and replay is the same
code. In NumPy's arrays on a CPU, in torch's elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flexquant_kernels.state import State
from vllm_flexquant.policy.arrays import Array, namespace, numbers

FIRST, LATER, LAST = range(3)
"""Rows of `State.decisions`: the layers before the probe, those after it, the probe's last one."""

_MOST_HELD = 1 << 30
"""Where the count of steps since the last change ends, long before it would wrap."""


@dataclass(slots=True)
class StepFacts:
    """The sequences that decode in a step.

    sequences: int64 [4, n], their slots, rows of the forward pass, accounts and places in the
    batch; the same array while the batch is the same. count: n. positions: tokens that each has
    generated, for a policy that asks for them.
    """

    sequences: Array
    count: int
    positions: Sequence[int] = ()

    def __len__(self) -> int:
        return self.count


class Policy:
    """Decides nothing; a policy overrides what it needs."""

    pinned = False
    """The level does not depend on the step."""
    by_position = False
    """It goes by `StepFacts.positions`."""
    writes = False
    """`begin` writes the table too."""
    books = False
    """The policy has a probe and accounts: `probe`, `decide` and `book` do something."""

    def begin(self, state: State, step: StepFacts) -> None:
        """Before a step, decide the level that its layers begin at, `FIRST` and `LATER`.

        `bounds`, `ceiling` and `probes` are set.
        """

    def probe(self, state: State, x: torch.Tensor) -> None:
        """Within a step, decide the later layers by what the probe's layer is given, [rows, H]."""

    def decide(self, state: State, scores: Array) -> None:
        """As `probe`, with the scores of the rows, fp32, already known."""

    def book(self, state: State, entropy: Array) -> None:
        """After a step, take in the entropies of its logits, fp32 nats by place."""


def write_widths(state: State, first: int = 0) -> None:
    """Give layers from `first` on the widths of the later level, within the bounds, as they have
    them."""
    xp = namespace(state.table)
    wanted = state.rungs[state.decisions[LATER, :1]][0, first:]
    wanted = xp.minimum(xp.maximum(wanted, state.bounds[0]), state.bounds[1])
    state.table[first:] = state.allowed[first:][numbers(wanted), wanted]


def keep(state: State, row: int, level: Array, held: Array) -> None:
    """Write a decision, both int [1]."""
    state.decisions[row, :1], state.decisions[row, 1:] = level, held


def take(state: State, wanted: Array) -> None:
    """The step's level, int [1], is `wanted`, down to the ceiling."""
    xp = namespace(wanted)
    level, held = state.decisions[FIRST, :1], state.decisions[FIRST, 1:]
    found = xp.minimum(wanted, state.ceiling)
    held = xp.where(found == level, xp.clip(held + 1, 0, _MOST_HELD), 0)
    for row in (FIRST, LATER):
        keep(state, row, found, held)


def hold(state: State, row: int, wanted: Array, may: Array) -> None:
    """Take up the level `wanted`, int32 [1], unless the change is too small or comes too soon.

    An end of the ladder is reached however small the change; the ceiling holds in any case.

    Args:
        row: of `State.decisions`.
        may: bool [1], False to stay.
    """
    xp = namespace(wanted)
    level, held = state.decisions[row, :1], state.decisions[row, 1:]
    top = state.sizes["levels"] - 1
    moves = abs(wanted - level) > state.least_move
    moves = moves | ((wanted != level) & ((wanted == 0) | (wanted == top)))
    moves = moves & (held + 1 >= state.dwell) & may
    found = xp.minimum(xp.where(moves, wanted, level), state.ceiling)
    keep(state, row, found, xp.where(moves, 0, xp.clip(held + 1, 0, _MOST_HELD)))


def least_move(hysteresis: float, levels: int) -> float:
    """Levels that a change must exceed; rounded to fp32, as kernels have it."""
    return float(np.float32(hysteresis * (levels - 1)))


def by_index(index: Array, choices: Sequence[Callable[[], Array]]) -> Array:
    """What that one gives of equally shaped arrays which `index`, int [1], names.

    On a GPU it is not read, so all are computed.
    """
    if isinstance(index, np.ndarray):
        return choices[index[0]]()
    found = choices[0]()
    for i, choice in enumerate(choices[1:], 1):
        found = torch.where(index == i, choice(), found)
    return found
