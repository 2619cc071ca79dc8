# SPDX-License-Identifier: Apache-2.0
"""What policy `budget` is told of this rank: the ladder's KL and cost, the probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_flexquant.format.checkpoint import parts_of
from vllm_flexquant.format.layout import PARENT_BITS, width_at_least
from vllm_flexquant.format.record import CalibrationRecord, NeedRecord
from vllm_flexquant.planner.ladder import Ladder, bytes_read
from vllm_flexquant.planner.table import LayerRecord

Figures = dict[str, Any]
"""Fields of the `State` that calibration fills, as numbers and lists of them."""

_NO_NEED = NeedRecord(bin_nats=1.0, by_entropy=(1.0,), by_average=(1.0,))
"""Without figures of calibration, every token is taken for an average one."""


@dataclass(frozen=True)
class Probe:
    """score = exp(x · weight + bias), of what the layer with index `layer` in the table is given.

    weight: fp32 [H].
    """

    name: str
    layer: int
    weight: torch.Tensor
    bias: float


def read_figures(
    layers: Sequence[LayerRecord],
    ladder: Ladder,
    record: CalibrationRecord,
    probe_layer: int | None,
    fused: Mapping[str, Sequence[str]],
) -> Figures:
    """What the policy is told of this rank's ladder, from what calibration wrote."""
    assert ladder.kl_nats is not None
    need = record.need or _NO_NEED
    weights_kl = np.array(ladder.kl_nats)
    rounding = _activations_kl(layers, record)
    early_kl = weights_kl * _early_share(layers, ladder, record, probe_layer, fused)
    early = layers[:probe_layer]
    early_bytes = [bytes_read(early, w[: len(early)]) for w in ladder.widths.tolist()]
    top = ladder.bytes_read[-1]
    uniform = {width: kl for width, (kl, _) in record.uniform_kl.items()}
    known = sorted(uniform)
    # no layer runs at widths that the layout lacks, but at the next one up
    width_kl = [
        uniform[width_at_least(known, bits)] if known else 0.0 for bits in range(PARENT_BITS + 1)
    ]
    return {
        "kl": (weights_kl + rounding).tolist(),
        "cost": list(ladder.cost),
        "early_kl": early_kl.tolist(),
        "early_cost": [n / top for n in early_bytes],
        "width_kl": [kl + rounding for kl in width_kl],
        "need_by_entropy": list(need.by_entropy),
        "need_by_average": list(need.by_average),
        "bin_nats": need.bin_nats,
    }


def without_calibration(cost: Sequence[float]) -> Figures:
    """The same where no KL is known: `cost` of each level, and every token an average one."""
    none = [0.0] * len(cost)
    return {
        "kl": none,
        "cost": list(cost),
        "early_kl": none,
        "early_cost": list(cost),
        "width_kl": [0.0] * (PARENT_BITS + 1),
        "need_by_entropy": [1.0],
        "need_by_average": [1.0],
        "bin_nats": 1.0,
    }


def listen(
    device: torch.device,
    layers: Sequence[LayerRecord],
    record: CalibrationRecord,
    fused: Mapping[str, Sequence[str]],
) -> Probe | None:
    """The checkpoint's probe, None if it has none or listens to a layer on another rank."""
    if record.probe is None:
        return None
    for index, layer in enumerate(layers):
        if record.probe.layer in parts_of(layer.name, fused):
            weight = torch.tensor(record.probe.weight, device=device)
            return Probe(record.probe.layer, index, weight, record.probe.bias)
    return None


def _activations_kl(layers: Sequence[LayerRecord], record: CalibrationRecord) -> float:
    """Nats per token that the kernels add to what the weights cost, at any width."""
    from flexquant_kernels import ops

    int8 = any(layer.kernel.startswith(ops.INT8_KERNELS) for layer in layers)
    return record.int8_activations[0] if int8 and record.int8_activations else 0.0


def _early_share(
    layers: Sequence[LayerRecord],
    ladder: Ladder,
    record: CalibrationRecord,
    probe_layer: int | None,
    fused: Mapping[str, Sequence[str]],
) -> np.ndarray:
    """Of the KL at each level, fp64 [levels], the part of layers before the probe: sensitivities
    add up nearly (design, section 5)."""
    if probe_layer is None:
        return np.ones(len(ladder))
    unit_of = {name: unit for unit in record.units for name in unit.layers}
    sums = np.zeros((2, len(ladder)))
    for index, layer in enumerate(layers):
        unit = unit_of.get(parts_of(layer.name, fused)[0])
        costs = {w: kl for w, (kl, _) in unit.sensitivity.items()} if unit else {}
        of_width = np.array([costs.get(width, 0.0) for width in range(PARENT_BITS + 1)])
        sums[int(index >= probe_layer)] += of_width[ladder.widths[:, index].numpy()]
    return sums[0] / np.maximum(sums.sum(0), 1e-12)
