# SPDX-License-Identifier: Apache-2.0
"""What a planner's books keep and cost, without a model: layers that are only described.

    python -m benchmarks.serving.bookkeeping [--out FILE]

- *serial*: what requests are booked that come one after another and ask for a budget of their own,
  on text that needs more than the average by e to the power of `NEED`, over what they asked.
- *budgets*: lines of `/metrics` that one snapshot gives, and accounts, after so many requests that
  each asked for another budget.
- *snapshot*: seconds that a snapshot takes after so many distinct things that steps ran at.
- *step*: seconds of a step's bookkeeping (decision, probe, averages, accounts) by number of
  sequences, with the native kernels; reading the logits aside.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.provenance import RESULTS, provenance, write_json
from flexquant_kernels import load_native
from vllm_flexquant.format.layout import bytes_read
from vllm_flexquant.format.record import (
    CalibrationRecord,
    LadderRecord,
    NeedRecord,
    ProbeRecord,
    RungRecord,
    StepRecord,
    UnitRecord,
)
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner.planner import Planner
from vllm_flexquant.planner.step import Batch, RanAt
from vllm_flexquant.planner.table import LayerRecord, WeightError
from vllm_flexquant.requests.grant import Kept, Terms
from vllm_flexquant.telemetry.snapshot import Snapshots
from vllm_flexquant.telemetry.sums import Sums

LAYERS, HIDDEN = 120, 576
PROBE_LAYER = 24
ASKED, NEED = 0.05, 1.5
"""Nats per token; logarithm of what a token of the text needs over the average one."""

REQUESTS, TOKENS = 100, 20
DISTINCT = (10, 10_000)
ROWS = (1, 4, 16)
KL = {8: 1e-5, 6: 2e-4, 4: 2.5e-3}
"""Nats of a layer at a width."""

NAMES = [f"layer{i}" for i in range(LAYERS)]


def record() -> CalibrationRecord:
    """Layers one after another down to 6 bits and then to 4."""
    steps = [StepRecord(unit=unit, width=width) for width in (6, 4) for unit in range(LAYERS)]
    widths, rungs = [8] * LAYERS, []
    for n in range(len(steps) + 1):
        if n:
            widths[steps[n - 1].unit] = steps[n - 1].width
        rungs.append(
            RungRecord(
                steps=n,
                mean_bits=sum(widths) / LAYERS,
                bytes_read=sum(bytes_read(64, HIDDEN, 64, w) for w in widths),
                kl_nats=sum(KL[w] for w in widths),
                measured=True,
            )
        )
    sensitivity = {width: (kl, 0.0) for width, kl in KL.items()}
    units = [UnitRecord(layers=(name,), weights=1, sensitivity=sensitivity) for name in NAMES]
    probe = ProbeRecord(
        layer=NAMES[PROBE_LAYER],
        weight=(1.0, *(0.0,) * (HIDDEN - 1)),
        bias=0.0,
        levels=(0, 1),
        relative_kl=1.0,
        correlation=0.0,
    )
    return CalibrationRecord(
        units=units,
        uniform_kl={width: (LAYERS * kl, 0.0) for width, kl in KL.items()},
        ladder=LadderRecord(search="greedy", steps=steps, rungs=rungs),
        probe=probe,
        need=NeedRecord(bin_nats=1.0, by_entropy=(1.0,), by_average=(1.0,)),
    )


class Made:
    """A planner with its telemetry, stepped by hand."""

    def __init__(self, slots: int = 16) -> None:
        options = FlexQuantOptions(up_for_free=False)
        best = LAYERS * KL[8]
        terms = Terms.of(options, options.layout.widths, Kept(best))
        self.planner = Planner(options, terms)
        self.planner.allocate(torch.device("cpu"), slots, slots)
        assert self.planner.table is not None
        layout = options.layout
        for name in NAMES:
            index, _ = self.planner.table.reserve()
            error = WeightError(1, 1.0, {})
            described = LayerRecord(
                name, 64, HIDDEN, 64, layout, layout.widths, "none", "described", error
            )
            self.planner.table.describe(index, described)
        self.planner.start(calibration=record())
        self.snapshots = Snapshots(self.planner, Sums(self.planner), None)

    def ask(self, slot: int, **wishes: Any) -> None:
        """A request takes a slot."""
        asked = {f"flexquant_{name}": value for name, value in wishes.items()}
        self.planner.started(slot, self.planner.terms.grant(asked))

    def step(self, batch: Batch, x: torch.Tensor, logits: torch.Tensor) -> None:
        """One step of the engine, without its model."""
        self.planner.step(batch)
        self.planner.probe(x)
        self.planner.logits(logits)


def batch_of(slots: Sequence[int], prompt: bool = False) -> Batch:
    """One row for each slot."""
    n = len(slots)
    names = [f"r{slot}" for slot in slots]
    return Batch(names, list(slots), [prompt] * n, [False] * n, list(range(n)), [0] * n)


def serial(**wishes: Any) -> float:
    """Mean nats per token booked of requests one after another, over what they asked."""
    made = Made()
    x = torch.zeros(1, HIDDEN)
    x[0, 0] = NEED
    logits = torch.linspace(0, 8, 50)[None]
    for _ in range(REQUESTS):
        made.ask(0, **wishes)
        account = made.planner.grants[0].account
        made.step(batch_of([0], prompt=True), x, logits)
        for _ in range(TOKENS - 1):
            made.step(batch_of([0]), x, logits)
        made.planner.ended(0)
    state = made.planner.state
    return float(state.spent[account] / state.tokens[account]) / ASKED


def after_budgets(count: int) -> dict[str, int]:
    """What there is after so many requests that each asked for another budget."""
    made = Made()
    logits = torch.linspace(0, 8, 50)[None]
    for budget in np.geomspace(0.0013, 9.0, count):
        made.ask(0, budget=float(budget))
        made.step(batch_of([0]), torch.zeros(1, HIDDEN), logits)
        made.planner.ended(0)
    found = made.snapshots.take(fresh=True)
    series = len(found["gauges"]) + len(found["counters"])
    series += sum(len(kind) for account in found["accounts"].values() for kind in account.values())
    return {"series": series, "accounts": len(made.planner.state.tokens)}


def snapshot_seconds(counts: Sequence[int], times: int = 40) -> dict[str, float]:
    """Median seconds of a snapshot after steps that ran at so many distinct bounds and levels."""
    mades = {count: Made() for count in counts}
    for count, made in mades.items():
        pick = np.random.default_rng(0)
        top = len(made.planner.model.ladder)
        for _ in range(count):
            low, high = sorted(pick.choice((4, 6, 8), size=2).tolist())
            first, later = pick.integers(top, size=2).tolist()
            for tell in made.planner.watchers.ran:
                tell(RanAt(low, high, first, later))
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(times):
        for count, made in mades.items():
            began = time.perf_counter()
            made.snapshots.take(fresh=True)
            seconds[count].append(time.perf_counter() - began)
    return {str(count): median(found) for count, found in seconds.items()}


def step_seconds(rows: int, times: int = 2000) -> float:
    """Median seconds of the bookkeeping of a step, but for what reading the logits takes."""
    made = Made()
    for slot in range(rows):
        made.ask(slot)
    x, batch = torch.randn(rows, HIDDEN), batch_of(range(rows))
    logits = torch.randn(rows, 8)  # few, so that what is timed is not the reading
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        made.step(batch, x, logits)
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(RESULTS) / "bookkeeping.json")
    options = parser.parse_args()
    status = load_native()
    snapshots = snapshot_seconds(DISTINCT)
    few, many = (snapshots[str(count)] for count in DISTINCT)
    found = {
        "serial": {
            "asked_nats": ASKED,
            "need": float(np.exp(NEED)),
            "requests": REQUESTS,
            "tokens": TOKENS,
            "own_booked_over_asked": serial(budget=ASKED),
        },
        "budgets": {str(count): after_budgets(count) for count in DISTINCT},
        "snapshot": {"seconds": snapshots, "many_over_few": many / few},
        "step": {
            "kernels": status.isa,
            "seconds": {str(rows): step_seconds(rows) for rows in ROWS},
        },
    }
    write_json(options.out, found, provenance())
    print(found)


if __name__ == "__main__":
    main()
