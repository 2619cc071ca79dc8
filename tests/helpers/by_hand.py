# SPDX-License-Identifier: Apache-2.0
"""A planner of hand-made layers with its telemetry, and batches for it."""

from dataclasses import dataclass

import torch

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
from vllm_flexquant.planner.step import Batch
from vllm_flexquant.planner.table import LayerRecord, WeightError
from vllm_flexquant.requests.grant import Kept, Terms
from vllm_flexquant.telemetry.snapshot import Snapshots
from vllm_flexquant.telemetry.steps import Recorder
from vllm_flexquant.telemetry.sums import Sums

LAYERS = 5


def terms(options, lowest=None, why="this checkpoint is not calibrated"):
    return Terms.of(options, options.layout.widths, Kept(lowest, why))


def layered(options, tops=(8,) * LAYERS, rows=32, columns=64, kernel="reference", slots=8):
    """A planner with layers that has not started."""
    made = Planner(options, terms(options, lowest=1e-4))
    made.allocate(torch.device("cpu"), slots=slots, tokens=64)
    for i, top in enumerate(tops):
        index, _ = made.table.reserve()
        kept = tuple(w for w in options.layout.widths if w <= top)
        errors = {w: (kept[-1] - w) * (i + 1.0) for w in kept}
        record = LayerRecord(
            f"layer{i}",
            rows,
            columns,
            64,
            options.layout,
            kept,
            kernel,
            "test",
            WeightError(rows * columns, 1.0, errors),
        )
        made.table.describe(index, record)
    return made


def planner(tops=(8,) * LAYERS, **options):
    made = layered(FlexQuantOptions(**options), tops)
    made.start()
    return made


CALIBRATED, PROBE_LAYER, HIDDEN = 6, 2, 4
"""Of the calibrated planner: its layers, the one that the probe listens to, inputs of the probe."""
BEST = 0.00165
"""Its KL at all bits."""
NAMES = [f"model.layers.{i}.o_proj" for i in range(CALIBRATED)]


def kl_of(unit, width):
    """Nats that a layer costs at a width."""
    return {4: 0.01, 6: 0.0008, 8: 0.00005}[width] * (3 + unit)


def record(with_probe=True):
    steps = [StepRecord(unit=u, width=w) for w in (6, 4) for u in range(CALIBRATED)]
    widths = [8] * CALIBRATED
    rungs = []
    for n in range(len(steps) + 1):
        if n:
            widths[steps[n - 1].unit] = steps[n - 1].width
        rungs.append(
            RungRecord(
                steps=n,
                mean_bits=sum(widths) / CALIBRATED,
                bytes_read=sum(widths) * 1000,
                kl_nats=sum(map(kl_of, range(CALIBRATED), widths)),
                measured=True,
            )
        )
    return CalibrationRecord(
        units=[
            UnitRecord(
                layers=(name,),
                weights=2048,
                sensitivity={w: (kl_of(i, w), 0.0) for w in (4, 6, 8)},
            )
            for i, name in enumerate(NAMES)
        ],
        uniform_kl={w: (sum(kl_of(i, w) for i in range(CALIBRATED)), 0.0) for w in (4, 6, 8)},
        ladder=LadderRecord(search="greedy", steps=steps, rungs=rungs),
        probe=ProbeRecord(
            layer=NAMES[PROBE_LAYER],
            weight=(1.0, 0.0, 0.0, 0.0),
            bias=0.0,
            levels=(0, 1),
            relative_kl=0.7,
            correlation=0.4,
        )
        if with_probe
        else None,
        need=NeedRecord(bin_nats=1.0, by_entropy=(0.2, 1.0, 2.0), by_average=(0.5, 1.0, 1.5)),
    )


def calibrated(calibration=None, layers=range(CALIBRATED), agree=None, **changes):
    """A planner of a calibrated checkpoint, policy budget unless `changes` say other options."""
    given = {"hysteresis": 0.0, "budget": 0.03, "up_for_free": False} | changes
    options = FlexQuantOptions(**given)
    made = Planner(options, terms(options, lowest=BEST))
    made.allocate(torch.device("cpu"), slots=8, tokens=16)
    for i in layers:
        index, _ = made.table.reserve()
        layout = options.layout
        error = WeightError(1, 1, {})
        described = LayerRecord(NAMES[i], 32, 64, 64, layout, layout.widths, "any", "test", error)
        made.table.describe(index, described)
    made.start(calibration=calibration or record(), agree=agree)
    return made


def step(made, ids="a", logs=None, entropy=1.5, positions=0, **changes):
    """One step of the calibrated planner; `logs` are the logarithms of the scores of the rows that
    the probe sees. Returns the widths before and after the probe."""
    made.step(batch(ids, **changes)._replace(positions=[positions] * len(ids)))
    before = widths(made)
    logs = [0.0] * len(ids) if logs is None else logs
    made.probe(torch.tensor([[v, 9.0, 9.0, 9.0] for v in logs]))
    after = widths(made)
    temperature = torch.as_tensor(entropy, dtype=torch.float32).expand(len(ids))[:, None]
    made.logits(torch.linspace(0, 8, 50) / temperature)
    return before, after


@dataclass
class Told:
    """What a worker has beside its planner."""

    sums: Sums
    recorder: Recorder | None
    snapshots: Snapshots

    def now(self):
        return self.snapshots.take(fresh=True)


def telemetry(made, speculation=None):
    sums = Sums(made)
    steps = made.options.trace_steps
    return Told(sums, Recorder(made, steps) if steps else None, Snapshots(made, sums, speculation))


def batch(ids="a", prompt=None, discarded=None, rows=None):
    n = len(ids)
    return Batch(
        list(ids),
        [ord(i) - ord("a") for i in ids],
        prompt or [False] * n,
        discarded or [False] * n,
        rows or list(range(n)),
        [0] * n,
    )


def start(made, slot, args=None):
    """A request with these extra arguments takes a slot."""
    made.started(slot, made.terms.grant(args))


def widths(made):
    return made.table.widths.tolist()
