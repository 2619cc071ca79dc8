# SPDX-License-Identifier: Apache-2.0
"""Replay: take the decisions of a recorded trace again, by the same policy or by another one.

What the model did stays as it was recorded: entropies, scores and times are those of the levels
that were served. Under the policy and options of the recording, the decisions are the recorded ones
exactly; under others, they are what that policy would have decided from the same signals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner.figures import Probe, without_calibration
from vllm_flexquant.planner.ledger import Ledger
from vllm_flexquant.planner.state import empty_state, fill, restore
from vllm_flexquant.policy.choose import make_policy, parameters, resolve_policy
from vllm_flexquant.policy.protocol import FIRST, LATER, StepFacts
from vllm_flexquant.requests.accounts import asked
from vllm_flexquant.telemetry.steps import Step, Trace

DECIDING = (
    "policy",
    "level",
    "budget",
    "budget_horizon",
    "classes",
    "signal",
    "aggregate",
    "quantile",
    "entropy_low",
    "entropy_high",
    "hysteresis",
    "dwell",
    "progressive_tokens",
    "progressive_full",
    "progressive_bits",
)
"""Options that a replay goes by."""


@dataclass(frozen=True)
class Replayed:
    """first, level: int32 [steps], decided for the layers before and after the probe. booked_nats:
    mean KL per token that policy budget booked, None for others. same: steps decided as recorded.
    """

    trace: Trace
    first: np.ndarray
    level: np.ndarray
    booked_nats: float | None
    same: int

    def summary(self) -> dict[str, Any]:
        """Means over the steps in which sequences decode."""
        decoding = np.array([len(step.average) > 0 for step in self.trace.steps], dtype=bool)
        level, first = self.level[decoding], self.first[decoding]
        bits = np.array(self.trace.header["mean_bits"])
        return {
            "steps": len(self.level),
            "decoding": int(decoding.sum()),
            "decided_as_recorded": self.same,
            "mean_bits_of_levels": float(bits[level].mean()) if len(level) else None,
            "mean_level": float(level.mean()) if len(level) else None,
            "bytes_over_best": self._bytes(first, level),
            "switches": int((np.diff(level) != 0).sum()),
            "booked_nats": self.booked_nats,
        }

    def _bytes(self, first: np.ndarray, level: np.ndarray) -> float | None:
        """Bytes read per step over those at the best level, bounds aside."""
        figures = self.trace.header["figures"]
        if not len(level):
            return None
        cost = np.array(self.trace.header["cost"])
        if figures is None:
            return float(cost[level].mean())
        early = np.array(figures["early_cost"])
        return float((early[first] + cost[level] - early[level]).mean())


def replay(trace: Trace, changes: Mapping[str, Any] | None = None) -> Replayed:
    """Decide the steps of `trace` again.

    Args:
        changes: options of `DECIDING` that differ from the recorded ones.

    Raises:
        ValueError: an option is bad, or the trace lacks what the policy needs.
    """
    if stays := sorted((changes or {}).keys() & FlexQuantOptions.model_fields.keys() - {*DECIDING}):
        raise ValueError(
            f"replay: {stays[0]} stays as it was recorded, as do bounds, ceilings and times; "
            f"options that decide are {', '.join(DECIDING)}"
        )
    header = trace.header
    recorded = FlexQuantOptions().updated(header["options"], "the trace")
    options = recorded.updated(changes or {}, "replay")
    figures, layer = header["figures"], header["probe_layer"]
    options = resolve_policy(options, calibrated=figures is not None)
    rows = max((len(step.average) for step in trace.steps), default=0)
    state = empty_state(
        torch.zeros(0, dtype=torch.int32),
        figures or without_calibration(header["cost"]),
        slots=max(rows, 1),
        rows=max(rows, 1),
        listening=None if layer is None else Probe("", 0, torch.zeros(0), 0.0),
    )
    if header["state"] is not None:
        restore(state, header["state"])
    fill(state, **parameters(options, header["mean_bits"]))
    if figures is not None:
        ledger = Ledger(state)
        # what was asked at the recording, whose balances go on, then what is asked now
        ledger.ask(asked(recorded.classes, recorded.budget))
        fill(state, balance=header["state"]["balance"] if header["state"] else 0.0)
        ledger.ask(asked(options.classes, options.budget))
    policy = make_policy(options.policy, 0)
    probes = policy.books and layer is not None and options.signal in ("probe", "both")
    spent, tokens = float(state.spent.sum()), float(state.tokens.sum())
    first, level = [], []
    for step in trace.steps:
        places = np.arange(len(step.average))
        state.average[places], state.seen[places] = step.average, step.known
        fill(state, bounds=[step.low, step.high], ceiling=step.ceiling)
        state.probes[:] = probes and len(places) > 0
        facts = np.stack([places, places, step.accounts, places])
        policy.begin(state, StepFacts(facts, len(places), step.position.tolist()))
        if state.probes[0]:
            policy.decide(state, _scores(step))
        if step.booked:
            policy.book(state, step.entropy)
        first.append(int(state.decisions[FIRST, 0]))
        level.append(int(state.decisions[LATER, 0]))
    tokens = float(state.tokens.sum()) - tokens
    decided = np.array(first, dtype=np.int32), np.array(level, dtype=np.int32)
    booked = (float(state.spent.sum()) - spent) / max(tokens, 1.0) if policy.books else None
    return Replayed(trace, *decided, booked, _same(trace, *decided))


def _scores(step: Step) -> np.ndarray:
    if not step.probed:
        raise ValueError(
            "the trace has no scores of the probe, which were not asked for; "
            "record it under policy budget with signal probe, or replay with signal none"
        )
    return step.scores


def _same(trace: Trace, first: np.ndarray, level: np.ndarray) -> int:
    wanted = [(step.first, step.level) for step in trace.steps]
    return sum(w == got for w, got in zip(wanted, zip(first, level, strict=True), strict=True))
