# SPDX-License-Identifier: Apache-2.0
"""A controller of hand-made layers, and batches for it."""

import torch

from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner.planner import Controller
from vllm_flexquant.planner.step import Batch
from vllm_flexquant.planner.table import LayerRecord, WeightError

LAYERS = 5


def controller(tops=(8,) * LAYERS, **options):
    made = Controller(FlexQuantOptions(**options))
    made.allocate(torch.device("cpu"), slots=8)
    layout = made.options.layout
    for i in range(LAYERS):
        index, _ = made.table.reserve()
        kept = tuple(w for w in layout.widths if w <= tops[i])
        errors = {w: (kept[-1] - w) * (i + 1.0) for w in kept}
        made.table.describe(
            index,
            LayerRecord(
                f"layer{i}",
                32,
                64,
                64,
                layout,
                kept,
                "reference",
                "test",
                WeightError(2048, 1.0, errors),
            ),
        )
    made.start()
    return made


def batch(ids="a", prompt=None, discarded=None):
    n = len(ids)
    return Batch(
        list(ids),
        [ord(i) - ord("a") for i in ids],
        prompt or [False] * n,
        discarded or [False] * n,
        list(range(n)),
        [0] * n,
    )


def widths(made):
    return made.table.widths.tolist()
