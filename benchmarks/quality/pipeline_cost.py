# SPDX-License-Identifier: Apache-2.0
"""What `flexquant quantize` takes on a larger model, from what it took on a small one.

    python -m benchmarks.quality.pipeline_cost --checkpoint FOLDER [--gpu-tflops 20] [--launch-us 5]
        [--read-gb-per-s 2]

`checkpoint` is a calibrated one whose record says how long each stage took. Operations of each
stage are counted from the shapes of the model (the formulas below), which gives the rate that this
machine reached. For models of 7B and 70B the same formulas give operations; a GPU's rate is an
assumption, given as option: nothing was measured on one. Three terms: operations over that rate;
launches, because columns are rounded one after another with small kernels; and reading the
checkpoint, which every sweep over the blocks does once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import provenance, write_json
from benchmarks.quality.calibrated import RESULTS
from vllm_flexquant.format.checkpoint import StoredConfig, read_sidecar
from vllm_flexquant.quantize.calibrate import (
    DRAFT_SHARE,
    ESTIMATE_SHARE,
    RUNG_SHARE,
    SAMPLE_SHARE,
)
from vllm_flexquant.quantize.drafts import LEVELS
from vllm_flexquant.quantize.gptq import GptqSettings
from vllm_flexquant.quantize.signals import PROBE_FIT_SHARE

FIT, HELD_BACK = 96 * 512, 32 * 512
"""Tokens of `flexquant quantize`'s defaults."""

MEASURED_UNITS, MEASURED_RUNGS = 24, 16
_LAUNCHES_PER_COLUMN = 30
"""Small operations per column in `gptq._round_columns`, counted in its source: 6 around the choice
of a code, 3 for each width's two candidates, 2 for each width's cost, 5 to spread the error."""


@dataclass(frozen=True)
class Shape:
    """A dense decoder: linear layers of one block as (rows, columns), by unit."""

    name: str
    blocks: int
    units: Sequence[Sequence[tuple[int, int]]]
    hidden: int
    vocabulary: int

    @property
    def block_weights(self) -> int:
        return sum(n * k for unit in self.units for n, k in unit)

    @property
    def weights(self) -> int:
        return self.blocks * self.block_weights + self.hidden * self.vocabulary


def decoder(
    name: str, blocks: int, hidden: int, inner: int, key_value: int, vocabulary: int
) -> Shape:
    """Attention of `hidden` query and `key_value` key and value rows, gated MLP of `inner` rows."""
    attention = [(hidden, hidden), (key_value, hidden), (key_value, hidden)]
    units = [attention, [(hidden, hidden)], [(inner, hidden)] * 2, [(hidden, inner)]]
    return Shape(name, blocks, units, hidden, vocabulary)


LARGE = (
    decoder("7B", 32, 4096, 11008, 4096, 32000),
    decoder("70B", 80, 8192, 28672, 1024, 32000),
)


def from_config(folder: Path) -> Shape:
    """The shape of a Llama-like checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return decoder(
        folder.name,
        config["num_hidden_layers"],
        config["hidden_size"],
        config["intermediate_size"],
        head * config["num_key_value_heads"],
        config["vocab_size"],
    )


def operations(shape: Shape, widths: int) -> dict[str, float]:
    """Floating-point operations of each stage.

    A multiply-add is two. Attention over 512 tokens and element-wise work are left out.
    """
    forward = 2.0 * shape.blocks * shape.block_weights  # of one token through all blocks
    logits = 2.0 * shape.hidden * shape.vocabulary
    rounds = GptqSettings().rounds
    gptq = hessians = 0.0
    for unit in shape.units:
        k = unit[0][1]
        n = sum(rows for rows, _ in unit)
        hessians += 2.0 * k * k * FIT
        # for each width a column's error goes to the half of the columns that are left (N K^2), and
        # codes, or the target, are multiplied with the Hessian (2 N K^2); K^3 for the factors
        gptq += rounds * 3.0 * n * k * k * widths + k**3
    estimate = HELD_BACK * ESTIMATE_SHARE * (4 * forward + 3 * logits + widths * forward)
    # a choice that differs in one unit costs the blocks after it, half on average; and a reference
    measured = (
        HELD_BACK
        * SAMPLE_SHARE
        * ((1 + MEASURED_UNITS / 2) * forward + (1 + MEASURED_UNITS + widths) * logits)
    )
    rungs = HELD_BACK * RUNG_SHARE * (1 + MEASURED_RUNGS + widths) * (forward + logits)
    return {
        "rounding": shape.blocks * (hessians + gptq) + 2 * FIT * forward,
        "sensitivity, estimated": estimate,
        "sensitivity, measured": measured,
        "ladder, measured": rungs,
        "probe": (HELD_BACK + FIT * PROBE_FIT_SHARE) * (3 * (forward + logits) + forward / 3),
        "drafts": HELD_BACK * DRAFT_SHARE * (1 + LEVELS) * (forward + logits),
    }


def launches(shape: Shape) -> float:
    """Kernel launches of rounding, which runs its columns one after another."""
    columns = sum(unit[0][1] * len(unit) for unit in shape.units) * shape.blocks
    return columns * GptqSettings().rounds * _LAUNCHES_PER_COLUMN


SWEEPS = 9
"""Times that all blocks are read: two for rounding (weights, and codes written), two for the
estimate, one each for what is measured, the probe's inputs, drafts, and writing."""


def main() -> None:
    """Count, divide, print and write."""
    parser = argparse.ArgumentParser(description="Time of calibration on larger models.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="calibrated checkpoint")
    parser.add_argument("--gpu-tflops", type=float, default=20.0, help="fp32, sustained: assumed")
    parser.add_argument("--launch-us", type=float, default=5.0, help="of one launch: assumed")
    parser.add_argument("--read-gb-per-s", type=float, default=2.0, help="of the disk: assumed")
    parser.add_argument("--out", type=Path, default=RESULTS / "pipeline-cost.json")
    options = parser.parse_args()
    config = json.loads((options.checkpoint / "config.json").read_text())
    widths = len(StoredConfig.read(config["quantization_config"]).widths_of(""))
    run: dict[str, Any] | None = read_sidecar(options.checkpoint).get("provenance", {}).get("run")
    if run is None:
        raise SystemExit(f"{options.checkpoint} does not say what it took; quantize it again")
    small = from_config(options.checkpoint)
    counted = operations(small, widths)
    stages = {
        name: {
            "seconds": run["seconds"][name],
            "operations": count,
            "gflops": count / run["seconds"][name] / 1e9,
        }
        for name, count in counted.items()
        if name in run["seconds"]
    }
    estimates = {}
    for shape in LARGE:
        by_stage = operations(shape, widths)
        parts = {
            "operations": sum(by_stage.values()),
            "compute_s": sum(by_stage.values()) / (options.gpu_tflops * 1e12),
            "launch_s": launches(shape) * options.launch_us * 1e-6,
            "read_s": SWEEPS * shape.weights * 2 / (options.read_gb_per_s * 1e9),
        }
        largest = max(unit[0][1] for unit in shape.units)
        block = 4 * shape.block_weights + 4 * sum(unit[0][1] ** 2 for unit in shape.units)
        estimates[shape.name] = parts | {
            "hours": (parts["compute_s"] + parts["launch_s"] + parts["read_s"]) / 3600,
            "block_and_hessians_gb": block / 1e9,
            "hidden_gb": 4 * FIT * shape.hidden / 1e9,
            "embedding_and_output_gb": 8 * shape.hidden * shape.vocabulary / 1e9,
            "factors_gb": 3 * 4 * largest**2 / 1e9,
        }
    assumed = {k: getattr(options, k) for k in ("gpu_tflops", "launch_us", "read_gb_per_s")}
    write_json(
        options.out,
        {
            "measured": {"model": small.name, "stages": stages}
            | {k: v for k, v in run.items() if k != "seconds"},
            "assumed": assumed,
            "estimates": estimates,
        },
        provenance(),
    )
    console = Console()
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("stage", "seconds", "GFLOP", "GFLOP/s"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for name, stage in stages.items():
        table.add_row(
            name,
            f"{stage['seconds']:.0f}",
            f"{stage['operations'] / 1e9:.0f}",
            f"{stage['gflops']:.0f}",
        )
    console.print(table)
    console.print(f"peak memory {run['peak_memory_bytes'] / 1e9:.2f} GB, {small.name}")
    for name, part in estimates.items():
        console.print(
            f"{name}, estimated: {part['operations'] / 1e15:.1f} PFLOP at {options.gpu_tflops:g} "
            f"TFLOP/s {part['compute_s'] / 60:.0f} min, launches {part['launch_s'] / 60:.0f} min, "
            f"reading {part['read_s'] / 60:.0f} min: {part['hours']:.1f} h; block and Hessians "
            f"{part['block_and_hessians_gb']:.1f} GB, hidden states {part['hidden_gb']:.1f} GB",
            highlight=False,
        )
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
