# SPDX-License-Identifier: Apache-2.0
"""Accounts: the lines of the ledger that budgets are kept on.

The operator's classes have the first lines. Behind them lies a fixed grid of budgets, on which
those that requests ask for themselves fall: a request shares its line with all others of nearly the
same budget, before and after it. So what is owed or left over outlives a request, and however many
budgets clients think of, the ledger stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from flexquant_kernels.state import ACCOUNTS
from vllm_flexquant.options import OWN, RequestClass

_PER_DECADE, _DECADES = 16, 5
LOWEST_BUDGET = 1e-4
"""Nats per token, the first line of the grid; the last one is 10."""

GRID = tuple(LOWEST_BUDGET * 10 ** (i / _PER_DECADE) for i in range(_PER_DECADE * _DECADES + 1))
"""Budgets in nats per token, ascending."""

FIRST_OWN = ACCOUNTS - len(GRID)
"""The line of ``GRID[0]``; classes have those before it."""


def own_account(budget: float) -> int:
    """The line for a budget of its own: that of the largest on the grid that is no higher.

    Raises:
        ValueError: it is below the grid.
    """
    fitting = [i for i, nats in enumerate(GRID) if nats <= budget * (1 + 1e-9)]
    if not fitting:
        raise ValueError(f"the lowest budget that is kept is {LOWEST_BUDGET:g} nats per token")
    return FIRST_OWN + fitting[-1]


def class_accounts(classes: Mapping[str, RequestClass]) -> dict[str, int]:
    """The line of each class.

    Raises:
        ValueError: there are more than `FIRST_OWN`.
    """
    if len(classes) > FIRST_OWN:
        raise ValueError(f"there are {len(classes)} classes; have at most {FIRST_OWN}")
    return {name: index for index, name in enumerate(classes)}


def asked(classes: Mapping[str, RequestClass], budget: float) -> list[float]:
    """Nats per token that each account may spend, [ACCOUNTS]; 0 for lines that are not in use.

    Args:
        budget: of classes that have none of their own.
    """
    found = [0.0] * ACCOUNTS
    for name, index in class_accounts(classes).items():
        found[index] = classes[name].budget or budget
    found[FIRST_OWN:] = GRID
    return found


def label(classes: Mapping[str, RequestClass], account: int) -> str:
    """The name of a class, or `OWN`: what users see of an account."""
    return OWN if account >= FIRST_OWN else list(classes)[account]
