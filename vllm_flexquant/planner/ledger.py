# SPDX-License-Identifier: Apache-2.0
"""The accounts of one worker: what they are asked, at which price they begin, what was booked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexquant_kernels.state import ACCOUNTS, State
from vllm_flexquant.planner.state import fill
from vllm_flexquant.policy.arrays import host
from vllm_flexquant.policy.budget import correction, price_curve, price_of
from vllm_flexquant.requests.accounts import FIRST_OWN


class Ledger:
    """Reads and sets the accounts of a state.

    best: nats per token that the best level costs.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._curve = price_curve(state)
        self.best = float(state.tensor("kl").min())
        self._asked = np.zeros(ACCOUNTS)
        self._since = np.zeros((2, ACCOUNTS))
        """`spent` and `tokens` when what is asked was changed last."""

    def ask(self, asked: Sequence[float]) -> None:
        """Set what accounts may spend, nats per token, 0 for none. Those that change begin with
        nothing left over and nothing owed; their sums go on."""
        new = np.array(asked)
        changed = new != self._asked
        if not changed.any():
            return
        self._asked = new
        prices = [price_of(nats, self._curve) if nats > 0 else 0.0 for nats in asked]
        balance = np.where(changed, 0.0, self._values("balance"))
        sums = np.stack([self._values("spent"), self._values("tokens")])
        self._since = np.where(changed, sums, self._since)
        fill(self._state, asked=new, base_price=np.array(prices), balance=balance)

    def view(self, names: Mapping[str, int]) -> dict[str, Any]:
        """For operators: the accounts of classes by name, and those of the grid that were used.

        Args:
            names: account of each class.
        """
        asked, balance, spent, tokens = map(self._values, ("asked", "balance", "spent", "tokens"))
        raised = host(correction(self._state))
        of_late, booked = tokens - self._since[1], spent - self._since[0]

        def account(line: int) -> dict[str, Any]:
            return {
                "asked_nats": float(asked[line]),
                "balance_nats": float(balance[line]),
                "booked_nats": float(booked[line] / max(of_late[line], 1.0)),
                "tokens": float(of_late[line]),
                "correction": float(raised[line]),
            }

        classes = {
            name: account(line) | {"can_be_met": bool(asked[line] >= self.best)}
            for name, line in names.items()
        }
        own = [line for line in range(FIRST_OWN, ACCOUNTS) if tokens[line] > 0]
        return {
            "best_nats": self.best,
            "classes": classes,
            "own": [account(line) for line in own],
        }

    def sums(self, lines: slice | int) -> dict[str, float]:
        """Tokens and nats booked since the start, of one account or some."""
        return {
            "tokens": float(self._values("tokens")[lines].sum()),
            "booked_nats": float(self._values("spent")[lines].sum()),
        }

    def _values(self, name: str) -> np.ndarray:
        return self._state.tensor(name).cpu().numpy()
