# SPDX-License-Identifier: Apache-2.0
"""What a request was promised, and the class whose budget it spends from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_flexquant.format.layout import PARENT_BITS
from vllm_flexquant.options import (
    LOWEST_BITS,
    XARG_BUDGET,
    XARG_CLASS,
    XARG_MIN_BITS,
    XARGS,
    RequestClass,
)

KEY_PREFIX = "flexquant_"

_announced: dict[str, RequestClass] | None = None


def announce(classes: Mapping[str, RequestClass]) -> None:
    """Let `check` know the operator's classes in this process."""
    global _announced
    _announced = dict(classes)


def check(params: Any) -> None:
    """Refuse a request whose promises cannot be kept, before it is scheduled.

    One that is promised all bits must not begin from keys and values that other requests left at
    fewer: its reading of the prefix cache is switched off.

    Args:
        params: `SamplingParams`.

    Raises:
        ValueError: as `Promise.read`; vLLM answers with HTTP 400.
    """
    promise = Promise.read(params.extra_args, _announced)
    known = (_announced or {}).get(promise.name or "", RequestClass())
    if max(promise.min_bits, known.min_bits) == PARENT_BITS:
        params.skip_reading_prefix_cache = True


@dataclass(frozen=True)
class Promise:
    """name: the class asked for, None for the default. budget: the request's own, nats per token.
    min_bits: its own, 0 if it asks for none."""

    name: str | None = None
    budget: float | None = None
    min_bits: int = 0

    @classmethod
    def read(
        cls, extra_args: Mapping[str, Any] | None, classes: Mapping[str, RequestClass] | None
    ) -> Promise:
        """From `SamplingParams.extra_args`, which vLLM fills from `vllm_xargs`.

        Args:
            classes: the operator's, None where they are not known and any name will do.

        Raises:
            ValueError: an unknown `flexquant_` key, or a value that cannot be kept.
        """
        given = {k: v for k, v in (extra_args or {}).items() if k.startswith(KEY_PREFIX)}
        if unknown := sorted(set(given) - set(XARGS)):
            raise ValueError(
                f"vllm_xargs: unknown key '{unknown[0]}'; known are {', '.join(XARGS)}"
            )
        name = given.get(XARG_CLASS)
        if name is not None and not (
            isinstance(name, str) and (classes is None or name in classes)
        ):
            raise ValueError(
                f"vllm_xargs: {XARG_CLASS} is {name!r}; "
                f"this server has {', '.join(classes or ()) or 'none'}"
            )
        bits = given.get(XARG_MIN_BITS, 0)
        if XARG_MIN_BITS in given and not (
            type(bits) is int and LOWEST_BITS <= bits <= PARENT_BITS
        ):
            raise ValueError(
                f"vllm_xargs: {XARG_MIN_BITS} is {bits!r}; "
                f"give an integer from {LOWEST_BITS} to {PARENT_BITS}"
            )
        budget = given.get(XARG_BUDGET)
        if budget is not None and not (
            type(budget) in (int, float) and math.isfinite(budget) and budget > 0
        ):
            raise ValueError(
                f"vllm_xargs: {XARG_BUDGET} is {budget!r}; give nats per token, a number above 0"
            )
        return cls(name, None if budget is None else float(budget), bits)


@dataclass
class _Entry:
    budget: float
    users: int = 0


class ClassBook:
    """Numbers the budgets that are in use, so that each has a line of the ledger.

    The operator's classes come first and stay. A request with a budget of its own shares the number
    of others that asked for the same; the number is free again when the last of them ends.
    """

    def __init__(
        self, classes: Mapping[str, RequestClass], default: str, budget: float, capacity: int
    ) -> None:
        self._named = {name: index for index, name in enumerate(classes)}
        self._classes = dict(classes)
        self._default = default
        self._capacity = capacity
        self._own: dict[int, _Entry] = {}
        self.set_default_budget(budget)

    def set_default_budget(self, budget: float) -> None:
        """Budget of classes that have none of their own."""
        self.budgets = {
            index: self._classes[name].budget or budget for name, index in self._named.items()
        }
        self.budgets |= {index: entry.budget for index, entry in self._own.items()}

    @property
    def names(self) -> dict[int, str]:
        """What each number stands for."""
        return {index: name for name, index in self._named.items()} | {
            index: f"budget {entry.budget:g}" for index, entry in self._own.items()
        }

    def admit(self, promise: Promise) -> tuple[int, int, bool]:
        """The number of a request's class, the lowest width in bits it was promised, whether the
        number is new. `release` is to be called when it ends."""
        name = promise.name or self._default
        floor = max(promise.min_bits, self._classes[name].min_bits)
        if promise.budget is None:
            return self._named[name], floor, False
        for index, entry in self._own.items():
            if entry.budget == promise.budget:
                entry.users += 1
                return index, floor, False
        taken = len(self._named) + len(self._own)
        if taken >= self._capacity:
            # the strictest of those in use that is no laxer than asked for, or all bits
            fitting = {i: b for i, b in self.budgets.items() if b <= promise.budget}
            if not fitting:
                return self._named[name], PARENT_BITS, False
            index = max(fitting, key=lambda i: fitting[i])
            if index in self._own:
                self._own[index].users += 1
            return index, floor, False
        index = next(i for i in range(self._capacity) if i not in self.budgets)
        self._own[index] = _Entry(promise.budget, 1)
        self.budgets[index] = promise.budget
        return index, floor, True

    def release(self, index: int) -> None:
        """A request of this class has ended."""
        if index in self._own:
            self._own[index].users -= 1
            if not self._own[index].users:
                del self._own[index], self.budgets[index]
