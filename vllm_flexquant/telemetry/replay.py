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
from vllm_flexquant.planner.budget_control import BudgetControl
from vllm_flexquant.planner.figures import Probe
from vllm_flexquant.planner.sequences import SequenceEntropy
from vllm_flexquant.planner.table import LevelTable
from vllm_flexquant.policy.budget import CLASSES
from vllm_flexquant.policy.choose import make_policy, resolve_policy
from vllm_flexquant.policy.decision import Decision, StepSignals, decide_below
from vllm_flexquant.requests.grant import ClassBook
from vllm_flexquant.telemetry.steps import Step, Trace


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
        changes: options that differ from the recorded ones; a ceiling by load stays as recorded.

    Raises:
        ValueError: an option is bad, or the trace lacks what the policy needs.
    """
    recorded = FlexQuantOptions().updated(trace.header["options"], "the trace")
    options = recorded.updated(changes or {}, "replay")
    figures = trace.header["figures"]
    options = resolve_policy(options, calibrated=figures is not None)
    if options.policy == "budget":
        return _replay_budget(trace, options)
    policy = make_policy(options, trace.header["mean_bits"])
    state = trace.header["state"] or {}
    top = len(trace.header["mean_bits"]) - 1
    start = state.get("last", [top, 0])
    last = Decision(*(np.array([n], dtype=np.int32) for n in start))
    levels = []
    for step in trace.steps:
        if len(step.average):
            signals = StepSignals(step.average, step.known, step.position)
            last = decide_below(policy, signals, last, step.ceiling)
        levels.append(last.level.item())
    level = np.array(levels, dtype=np.int32)
    return Replayed(trace, level, level, None, _same(trace, level, level))


def _replay_budget(trace: Trace, options: FlexQuantOptions) -> Replayed:
    rows = max((len(step.average) for step in trace.steps), default=0)
    layer, figures, cpu = trace.header["probe_layer"], trace.header["figures"], torch.device("cpu")
    listening = None if layer is None else Probe("", layer, torch.zeros(0), 0.0)
    sequences = SequenceEntropy(max(rows, 1), cpu)
    table = LevelTable.without_layers(len(figures["kl"]))
    control = BudgetControl(cpu, figures, listening, sequences, table, max(rows, 1))
    control.adopt(options)
    book = ClassBook(options.classes, options.default_class, options.budget, CLASSES)
    state = trace.header["state"] or {}
    asked: dict[int, float] = {}
    if "ledger" in state:
        control.restore(state)
        asked = {int(number): budget for number, budget in state["asked"].items()}
    control.ask(asked | book.budgets)
    first, level, spent, tokens = [], [], 0.0, 0
    for step in trace.steps:
        if step.asks is not None:
            budgets, new = step.asks
            control.ask(budgets | book.budgets, new)
        _decide(control, sequences, step, options.signal)
        if step.booked:
            before = control.ledger.spent.sum()
            control.book(step.entropy)
            spent += float(control.ledger.spent.sum() - before)
            tokens += len(step.average)
        first.append(control.first.level.item())
        level.append(control.later.level.item())
    decided = np.array(first, dtype=np.int32), np.array(level, dtype=np.int32)
    return Replayed(trace, *decided, spent / max(tokens, 1), _same(trace, *decided))


def _decide(control: BudgetControl, sequences: SequenceEntropy, step: Step, signal: str) -> None:
    places = np.arange(len(step.average))
    sequences.set(places, step.average, step.known)
    facts = np.stack([places, places, step.classes, places])
    control.begin(facts, (step.low, step.high), step.ceiling)
    if control.listening is not None and signal in ("probe", "both") and len(places):
        if not step.probed:
            raise ValueError(
                "the trace has no scores of the probe, which were not asked for; "
                "record it under policy budget with signal probe, or replay with signal none"
            )
        control.decide(step.scores)


def _same(trace: Trace, first: np.ndarray, level: np.ndarray) -> int:
    wanted = [(step.first, step.level) for step in trace.steps]
    return sum(w == got for w, got in zip(wanted, zip(first, level, strict=True), strict=True))
