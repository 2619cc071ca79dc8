# SPDX-License-Identifier: Apache-2.0
"""What tells how much precision a token needs, and what int8 activations cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_flexquant.format.record import NeedRecord, ProbeRecord, RungRecord
from vllm_flexquant.quantize import evaluate, probe
from vllm_flexquant.quantize.activations import int8_activations_kl
from vllm_flexquant.quantize.calibration import CalibrationTokens, take_evenly
from vllm_flexquant.quantize.need import need_of_entropy
from vllm_flexquant.quantize.parallel import Report, Workers

PROBE_FIT_SHARE = 0.5
"""Share of the calibrating sequences that the probe is fitted to. All held back judge it."""

INT8_SHARE = 0.25
"""Share of the held-back sequences on which the cost of int8 activations is measured."""

PROBE_LEVEL = 0.25
"""The lower of the two levels that the probe is fitted on and judged by, as a share of the way from
the lowest bits up; the upper is the best."""


@dataclass(frozen=True)
class Signals:
    """Fields of the calibration's record."""

    probe: ProbeRecord
    need: NeedRecord
    int8_activations: tuple[float, float]

    def dump(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "probe": self.probe.model_dump(mode="json"),
            "need": self.need.model_dump(mode="json"),
            "int8_activations": self.int8_activations,
        }

    @classmethod
    def load(cls, stored: Mapping[str, Any]) -> Signals:
        """Inverse of `dump`."""
        return cls(
            ProbeRecord.model_validate(stored["probe"]),
            NeedRecord.model_validate(stored["need"]),
            tuple(stored["int8_activations"]),
        )


def probe_blocks(nested: evaluate.NestedModel) -> list[int]:
    """Blocks that may bear the probe, ascending."""
    return [i for i in probe.candidates(len(nested.model)) if nested.units[i]]


def measure_signals(
    nested: evaluate.NestedModel,
    workers: Workers,
    tokens: CalibrationTokens,
    rungs: Sequence[RungRecord],
    levels: Sequence[evaluate.Widths],
    group_size: int,
    report: Report,
) -> Signals:
    """The probe of one of `probe_blocks`, need by entropy, and the KL of int8 activations.

    Args:
        rungs, levels: of the ladder, and widths of units at them, best first.
        group_size: as `int8_activations_kl`.
    """
    bits = [rung.mean_bits for rung in rungs]
    wanted = bits[-1] + PROBE_LEVEL * (bits[0] - bits[-1])
    number = min(range(len(bits)), key=lambda i: abs(bits[i] - wanted))
    low, high = levels[number], levels[0]
    fitted = take_evenly(tokens.fit, PROBE_FIT_SHARE)
    text = torch.cat([fitted, tokens.held_back])
    kl, entropy = workers.compare(
        nested, text, [low, high], lambda share: report(share * 0.7), evaluate.kl_and_entropy
    )
    found = probe.ProbeFit(kl[0], kl[1], torch.arange(text.numel()) < fitted.numel())
    blocks = probe_blocks(nested)
    probes, best = [], None
    for index, given in probe.inputs_of_blocks(nested, text, low, blocks):
        probes.append(found.probe(index, given))
        if best is None or probes[-1].relative_kl < best.relative_kl:
            best = found.tempered(probes[-1], given)
        report(0.7 + 0.3 * len(probes) / len(blocks))
    assert best is not None
    names = {i: nested.units[i][0].name for i in blocks}
    top = len(rungs) - 1
    return Signals(
        ProbeRecord(
            layer=names[best.block],
            weight=tuple(best.weight.tolist()),
            bias=best.bias,
            levels=(top - number, top),
            relative_kl=best.relative_kl,
            correlation=best.correlation,
            candidates={names[p.block]: p.relative_kl for p in probes},
        ),
        need_of_entropy(kl[0], entropy[0], text.shape[1]),
        int8_activations_kl(nested, take_evenly(tokens.held_back, INT8_SHARE), high, group_size),
    )
