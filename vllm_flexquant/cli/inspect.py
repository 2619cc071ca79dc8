# SPDX-License-Identifier: Apache-2.0
"""What `flexquant inspect` prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from vllm_flexquant.cli.quantize import describe
from vllm_flexquant.format.checkpoint import SIDECAR, read_sidecar, validate_checkpoint
from vllm_flexquant.format.record import read_calibration


def report(checkpoint: Path, as_json: bool) -> Iterator[str]:
    """Lines about a saved checkpoint.

    Raises:
        ValueError: it is no flexquant checkpoint, or a damaged one.
    """
    if not (checkpoint / "config.json").exists():
        raise ValueError(f"{checkpoint} has no config.json; give a checkpoint folder")
    modules = validate_checkpoint(checkpoint, verify=False)
    sidecar = read_sidecar(checkpoint)
    if as_json:
        yield json.dumps(sidecar, indent=1)
        return
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    yield f"{checkpoint}: {len(modules)} layers in planes, {stored / 1e6:.1f} MB"
    yield ", ".join(
        f"{key.replace('_', ' ')} {config[key]}"
        for key in ("format_version", "layout", "group_size", "scales", "output_layer")
        if key in config
    )
    provenance = sidecar.get("provenance", {})
    if provenance:
        versions = ", ".join(f"{k} {v}" for k, v in provenance.get("versions", {}).items() if v)
        yield f"from {provenance.get('source')} by {provenance.get('method')} ({versions})"
    calibration = read_calibration(sidecar)
    if calibration is None:
        yield f"not calibrated: {SIDECAR} has no ladder, the engine orders one by weight error"
        return
    text = calibration.text
    yield (
        f"calibrated on {text.get('text')}: {text.get('tokens')} tokens, measured on "
        f"{text.get('held_back_tokens')}"
    )
    yield from describe(calibration)
    if calibration.ladder:
        every = sum(rung.bytes_read for rung in calibration.ladder.rungs)
        yield (
            f"a static checkpoint for each level would take {every / 1e9:.1f} GB for these layers "
            f"alone, {every / stored:.0f} times this one"
        )
