# SPDX-License-Identifier: Apache-2.0
"""What a request asks for, resolved once: the account it spends from, its lowest width, and whether
it may read the prefix cache; or the reason why not.

The front end and the workers call the same function of the same values, which travel in the
engine's config. So what is promised where a request enters is what is kept where it runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vllm_flexquant.format.layout import width_at_least
from vllm_flexquant.options import (
    XARG_BUDGET,
    XARG_CLASS,
    XARG_MIN_BITS,
    XARGS,
    FlexQuantOptions,
    RequestClass,
)
from vllm_flexquant.requests.accounts import class_accounts, own_account
from vllm_flexquant.values import LOWEST_BITS, shown

KEY_PREFIX = "flexquant_"


@dataclass(frozen=True)
class Grant:
    """account: line of the ledger. floor: bits, below which no layer runs in the steps that the
    request is part of. skip_cache: it must not begin from keys and values that other requests left
    at fewer bits."""

    account: int
    floor: int
    skip_cache: bool


@dataclass(frozen=True)
class Kept:
    """Which budgets an engine keeps: those of `lowest` nats per token and more; None with the
    reason, a clause, where it keeps none."""

    lowest: float | None
    why_none: str = ""


@dataclass(frozen=True)
class Terms:
    """All that decides what a request of one engine gets.

    widths: bits at which layers can run, ascending. kept: by the policy that the server was started
    with. The rest are options of the operator.
    """

    classes: Mapping[str, RequestClass]
    default: str
    widths: tuple[int, ...]
    kept: Kept
    request_floor: Literal["allow", "deny"] | int = "allow"
    request_budget: Literal["allow", "deny"] | float = "allow"
    request_classes: tuple[str, ...] | None = None

    @classmethod
    def of(cls, options: FlexQuantOptions, widths: tuple[int, ...], kept: Kept) -> Terms:
        """The terms that `options` set."""
        return cls(
            classes=options.classes,
            default=options.default_class,
            widths=widths,
            kept=kept,
            request_floor=options.request_floor,
            request_budget=options.request_budget,
            request_classes=options.request_classes,
        )

    def grant(self, extra_args: Mapping[str, Any] | None) -> Grant:
        """What a request gets.

        Args:
            extra_args: of its `SamplingParams`, which vLLM fills from `vllm_xargs`.

        Raises:
            ValueError: an unknown `flexquant_` key, or what this server does not allow or cannot
                keep; one sentence, to be answered with HTTP 400.
        """
        items = (extra_args or {}).items()
        given = {k: v for k, v in items if isinstance(k, str) and k.startswith(KEY_PREFIX)}
        if unknown := sorted(set(given) - set(XARGS)):
            raise ValueError(
                f"vllm_xargs: unknown key {shown(unknown[0])}; known are {', '.join(XARGS)}"
            )
        name = self._class_of(given)
        account = class_accounts(self.classes)[name]
        if XARG_BUDGET in given:
            account = self._own_account(given[XARG_BUDGET])
        wanted = max(self._floor_of(given), self.classes[name].min_bits)
        floor = width_at_least(self.widths, wanted) if wanted > self.widths[0] else 0
        return Grant(account, floor, skip_cache=floor == self.widths[-1])

    def strictest(self) -> Grant:
        """For a request that runs already and cannot be understood: all bits."""
        return Grant(class_accounts(self.classes)[self.default], self.widths[-1], True)

    def _class_of(self, given: Mapping[str, Any]) -> str:
        if XARG_CLASS not in given:
            return self.default
        name, asked = given[XARG_CLASS], self.request_classes
        allowed = [n for n in self.classes if asked is None or n in asked]
        if not isinstance(name, str) or name not in allowed:
            raise ValueError(
                f"vllm_xargs: {XARG_CLASS} is {shown(name)}; "
                f"this server has {', '.join(allowed) or 'none'}"
            )
        budget = self.classes[name].budget
        if budget is not None and XARG_BUDGET not in given and self.kept.lowest is None:
            raise ValueError(
                f"vllm_xargs: {XARG_CLASS} {name} has a budget, and {self.kept.why_none}"
            )
        return name

    def _floor_of(self, given: Mapping[str, Any]) -> int:
        if XARG_MIN_BITS not in given:
            return 0
        bits, most = given[XARG_MIN_BITS], self.widths[-1]
        if type(bits) is not int or not LOWEST_BITS <= bits <= most:
            raise ValueError(
                f"vllm_xargs: {XARG_MIN_BITS} is {shown(bits)}; "
                f"give an integer from {LOWEST_BITS} to {most}"
            )
        limit = self.request_floor
        if limit == "deny" or (isinstance(limit, int) and bits > limit):
            allowed = "none" if limit == "deny" else f"at most {limit}"
            raise ValueError(
                f"vllm_xargs: {XARG_MIN_BITS} is {bits}, and this server allows {allowed} "
                "(its option request_floor)"
            )
        return bits

    def _own_account(self, budget: object) -> int:
        # an int may be too large for a float
        number = budget if isinstance(budget, float) else math.nan
        if type(budget) is int and abs(budget) < 1 << 53:
            number = float(budget)
        if not (math.isfinite(number) and number > 0):
            raise ValueError(
                f"vllm_xargs: {XARG_BUDGET} is {shown(budget)}; "
                "give nats per token, a number above 0"
            )
        limit, kept = self.request_budget, self.kept
        if limit == "deny" or (isinstance(limit, float) and number < limit):
            allowed = "none" if limit == "deny" else f"{limit:g} and more"
            raise ValueError(
                f"vllm_xargs: {XARG_BUDGET} is {number:g}, and this server allows {allowed} "
                "(its option request_budget)"
            )
        if kept.lowest is None:
            raise ValueError(f"vllm_xargs: {XARG_BUDGET} is {number:g}, and {kept.why_none}")
        if number < kept.lowest:
            raise ValueError(
                f"vllm_xargs: {XARG_BUDGET} is {number:g}, which cannot be met: the best that this "
                f"server does is {kept.lowest:.3g} nats per token; give more, or ask for "
                f"{XARG_MIN_BITS} {self.widths[-1]}"
            )
        try:
            return own_account(number)
        except ValueError as error:
            raise ValueError(f"vllm_xargs: {XARG_BUDGET} is {number:g}; {error}") from None
