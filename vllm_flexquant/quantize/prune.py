# SPDX-License-Identifier: Apache-2.0
"""A calibrated checkpoint without the planes that its ladder needs only above some level.

The storage pruning of the elastic FlexQuant (Chai et al. 2025, section 3.3) over nested weights:
what a level needs is needed by all cheaper ones too, so the planes of the new top level are all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_flexquant.format.checkpoint import (
    StoredConfig,
    read_sidecar,
    tensor_names,
    validate_checkpoint,
)
from vllm_flexquant.format.layout import ScaleMode
from vllm_flexquant.format.record import (
    CalibrationRecord,
    DraftsRecord,
    ProbeRecord,
    UnitRecord,
    read_calibration,
)
from vllm_flexquant.quantize.card import BASE_CARD, CARD
from vllm_flexquant.quantize.pipeline import flush, new_checkpoint, write_facts


def prune_checkpoint(
    folder: Path, out: Path, top_bits: float, advance: Callable[[float], None] | None = None
) -> CalibrationRecord:
    """Write the checkpoint in `folder` into the new folder `out`, its ladder cut at `top_bits`.

    Args:
        top_bits: mean bits that no level of the new ladder exceeds.

    Returns:
        What the new checkpoint knows of its calibration.

    Raises:
        ValueError: `folder` is no whole and calibrated checkpoint, `out` is not empty, or
            `top_bits` leaves nothing out or no level over.
    """
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json; give a checkpoint folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; name a new folder")
    validate_checkpoint(folder)
    sidecar = read_sidecar(folder)
    record = read_calibration(sidecar)
    if record is None or record.ladder is None:
        raise ValueError(f"{folder} has no ladder; quantize the model with calibration")
    record = prune_record(record, top_bits)
    config = json.loads((folder / "config.json").read_text())
    before = StoredConfig.read(config["quantization_config"])
    tops = {layer: unit.highest for unit in record.units for layer in unit.layers}
    after = before.model_copy(update={"top_widths": before.top_widths | tops})
    files = sorted(folder.glob("*.safetensors"))
    with new_checkpoint(out, folder) as scratch:
        if (scratch / BASE_CARD).exists():
            (scratch / BASE_CARD).replace(scratch / CARD)  # a new card is written beside it
        else:
            (scratch / CARD).unlink(missing_ok=True)
        for number, file in enumerate(files, 1):
            flush({file: _kept_tensors(file, before, after)}, scratch)
            if advance:
                advance(number / len(files))
        origin: dict[str, Any] = dict(sidecar.get("provenance", {}))
        write_facts(
            scratch,
            config,
            after,
            {k: v for k, v in origin.items() if k not in ("command", "versions")}
            | {"pruned": {"top_bits": top_bits, "from": origin.get("command")}},
            record,
        )
        validate_checkpoint(scratch, verify=False)
    return record


def prune_record(record: CalibrationRecord, top_bits: float) -> CalibrationRecord:
    """`record` of a ladder that begins at the best level of at most `top_bits` mean bits.

    The probe stays: its score is relative, whatever the level. What is known of drafts stays as it
    was measured, against the best level before.

    Raises:
        ValueError: the best level is within `top_bits`, or the cheapest is not.
    """
    assert record.ladder is not None
    rungs = record.ladder.rungs
    first = next((rung.steps for rung in rungs if rung.mean_bits <= top_bits), None)
    if first is None:
        raise ValueError(
            f"top_bits {top_bits:g} is below the cheapest level, which has "
            f"{rungs[-1].mean_bits:g} mean bits"
        )
    if first == 0:
        raise ValueError(
            f"top_bits {top_bits:g} prunes nothing: the best level has "
            f"{rungs[0].mean_bits:g} mean bits"
        )
    highest = record.widths_after(first)
    lowest_top = min(highest.values())
    return record.model_copy(
        update={
            "units": tuple(_pruned_unit(unit, highest[unit.name]) for unit in record.units),
            "uniform_kl": {w: kl for w, kl in record.uniform_kl.items() if w <= lowest_top},
            "ladder": record.ladder.model_copy(
                update={
                    "steps": record.ladder.steps[first:],
                    "rungs": tuple(
                        rung.model_copy(update={"steps": rung.steps - first})
                        for rung in rungs[first:]
                    ),
                }
            ),
            "probe": record.probe and _pruned_probe(record.probe, len(rungs) - first),
            "drafts": record.drafts and _pruned_drafts(record.drafts, first),
        }
    )


def _pruned_probe(probe: ProbeRecord, levels: int) -> ProbeRecord:
    kept = probe.levels is not None and max(probe.levels) < levels
    return probe if kept else probe.model_copy(update={"levels": None})


def _pruned_drafts(drafts: DraftsRecord, first: int) -> DraftsRecord | None:
    kept = tuple(
        level.model_copy(update={"steps": level.steps - first})
        for level in drafts.levels
        if level.steps > first  # the new best level is no draft for itself
    )
    return drafts.model_copy(update={"levels": kept}) if kept else None


def _pruned_unit(unit: UnitRecord, highest: int) -> UnitRecord:
    kept = {width: kl for width, kl in unit.sensitivity.items() if width <= highest}
    return unit.model_copy(update={"highest": highest, "sensitivity": kept})


def _kept_tensors(file: Path, before: StoredConfig, after: StoredConfig) -> dict[str, torch.Tensor]:
    tensors = {}
    with safe_open(file, framework="pt") as reader:
        for name in reader.keys():  # noqa: SIM118 - safe_open is no mapping
            module, _, last = name.rpartition(".")
            if module not in after.top_widths:
                tensors[name] = reader.get_tensor(name)
            elif name in tensor_names(module, len(after.planes_of(module))):
                tensor = reader.get_tensor(name)
                if last == "scales" and after.scales is ScaleMode.PER_WIDTH:
                    had, has = before.widths_of(module), after.widths_of(module)
                    tensor = tensor[:, :, [had.index(width) for width in has]].contiguous()
                tensors[name] = tensor
    return tensors
