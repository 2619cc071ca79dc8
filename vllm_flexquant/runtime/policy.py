# SPDX-License-Identifier: Apache-2.0
"""Policies: from what is known before a step to the level of the ladder that it runs at.

A policy is a pure function over tensors of fixed shape, without branches on their values, so that
it runs on the device beside the model and needs no host read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_flexquant.config import FlexQuantOptions


@dataclass(frozen=True)
class StepSignals:
    """What is known before a step of the sequences that decode in it.

    entropy: fp32 [rows], moving average of the entropy of each sequence's logits, nats, of the
        steps before; NaN asks for the best level.
    known: bool [rows], False where no logits of the sequence have been seen.
    """

    entropy: torch.Tensor
    known: torch.Tensor


@dataclass(frozen=True)
class Decision:
    """level: int32 [1]. held: int32 [1], steps since the level last changed."""

    level: torch.Tensor
    held: torch.Tensor


class Policy(Protocol):
    """Chooses the level of the next step."""

    def decide(self, signals: StepSignals, last: Decision) -> Decision: ...


@dataclass(frozen=True)
class FixedPolicy:
    """`static` and `manual`: one level, whatever the signals say."""

    level: int

    def decide(self, signals: StepSignals, last: Decision) -> Decision:
        level = torch.full_like(last.level, self.level)
        return Decision(level, torch.where(level == last.level, last.held + 1, 0))


@dataclass(frozen=True)
class EntropyPolicy:
    """`entropy`: the more uncertain the running sequences, the higher the level.

    The form is that of FlexQuant (arXiv 2506.12024), which switches by perplexity entropy at each
    token; its formula is not public, so this one is our own definition: the aggregate h of the
    sequences' entropies maps linearly from [low, high] nats to the levels, a change must exceed
    `hysteresis` (a share of the ladder) and follow the last one by `dwell` steps.
    """

    levels: int
    low: float
    high: float
    hysteresis: float
    dwell: int
    aggregate: str
    quantile: float

    def decide(self, signals: StepSignals, last: Decision) -> Decision:
        uncertain = torch.nan_to_num(signals.entropy, nan=torch.inf, posinf=torch.inf)
        # bounded, so that one row without a usable entropy pulls a mean to the best level
        uncertain = uncertain.clamp(max=self.high * max(len(uncertain), 1))
        share = (self._combine(uncertain, signals.known) - self.low) / (self.high - self.low)
        top = self.levels - 1
        wanted = (share.clamp(0, 1) * top).round().to(torch.int32).reshape(1)
        # an end of the ladder is reached however small the change
        moves = (wanted - last.level).abs() > self.hysteresis * top
        moves |= (wanted != last.level) & ((wanted == 0) | (wanted == top))
        moves &= (last.held + 1 >= self.dwell) & signals.known.any()
        return Decision(
            torch.where(moves, wanted, last.level), torch.where(moves, 0, last.held + 1)
        )

    def _combine(self, entropy: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        if self.aggregate == "max":
            return torch.where(known, entropy, -torch.inf).amax()
        if self.aggregate == "quantile":
            # nearest rank among the known ones
            ordered = torch.where(known, entropy, torch.inf).sort().values
            rank = (known.sum() - 1).clamp_min(0) * self.quantile
            return ordered.gather(0, rank.round().long().reshape(1))
        # in fp64, so that neither the order of rows nor the device decides
        total = torch.where(known, entropy, 0.0).sum(dtype=torch.float64)
        return (total / known.sum().clamp_min(1)).float()


def make_policy(options: FlexQuantOptions, levels: int) -> Policy:
    """The policy that `options` ask for on a ladder of `levels`.

    Raises:
        ValueError: `level` is not on the ladder.
    """
    if options.policy != "entropy":
        level = levels - 1 if options.level is None else options.level
        if level >= levels:
            raise ValueError(
                f"level {level} is not on the ladder, which has levels 0 to {levels - 1}"
            )
        return FixedPolicy(level)
    return EntropyPolicy(
        levels=levels,
        low=options.entropy_low,
        high=options.entropy_high,
        hysteresis=options.hysteresis,
        dwell=options.dwell,
        aggregate=options.aggregate,
        quantile=options.quantile,
    )
