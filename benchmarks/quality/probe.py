# SPDX-License-Identifier: Apache-2.0
"""What the probe of a calibrated checkpoint is worth on texts that it was not fitted to.

    python -m benchmarks.quality.probe --model FOLDER --checkpoint FOLDER
        --text prose=FILE --text code=FILE --text chat=FILE.jsonl [--sequences N]

For each text: the KL of a policy of two levels, those that the probe was fitted on, that runs the
half of the tokens with the lowest score at the lower one; over that of running a random half there
(the static mix); and how many mean bits more a static level of the ladder needs for the KL of the
policy. One sequence at a time, plain transformers in fp32. Whole tokens run at one level: the
layers before the probe's own count as if they had known. Reference: the checkpoint as given (for
the demo's model, the dequantized GGUF).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.provenance import write_json
from benchmarks.quality.calibrated import LENGTH, RESULTS, Comparison, StoredCheckpoint
from benchmarks.quality.texts import add_options, facts_of, text_files
from vllm_flexquant.format.record import ProbeRecord
from vllm_flexquant.quantize import probe
from vllm_flexquant.quantize.blocks import BlockModel
from vllm_flexquant.quantize.calibration import cut_tokens, load_tokenizer, read_text
from vllm_flexquant.quantize.sensitivity import rank_correlation

TARGET = 0.75
"""KL of the two-level policy over that of the static mix, at most."""

_BETWEEN = 6
"""Static levels measured, the two of the policy among them."""


def bits_at(kl: float, static: Sequence[tuple[float, float]]) -> float:
    """Mean bits at which a static level has `kl`, between (bits, KL) ascending in bits.

    log KL is taken for linear in between; NaN outside of what was measured.
    """
    for (below, high), (above, low) in pairwise(static):
        if low <= kl <= high:
            share = math.log(high / kl) / math.log(high / low) if high > low else 0.0
            return below + share * (above - below)
    return math.nan


def scores(comparison: Comparison, stored: ProbeRecord, low: dict[str, int]) -> torch.Tensor:
    """The probe's score of each token, fp32 [tokens], with the blocks before it at `low`."""
    nested = comparison.nested(comparison.checkpoint.layer)
    block = next(
        i for i, units in enumerate(nested.units) if stored.layer in [u.name for u in units]
    )
    [(_, inputs)] = probe.inputs_of_blocks(nested, comparison.tokens, low, [block])
    return torch.exp(inputs @ torch.tensor(stored.weight) + stored.bias)


def measure(comparison: Comparison, progress: Progress, name: str) -> dict[str, Any]:
    """Figures of one text."""
    record = comparison.checkpoint.record
    assert record.ladder is not None
    if record.probe is None or record.probe.levels is None:
        raise SystemExit("the checkpoint has no probe, or was pruned; quantize the model again")
    top = len(record.ladder.rungs) - 1
    ends = [top - level for level in record.probe.levels]  # in steps down the ladder
    steps = [round(ends[0] + (ends[1] - ends[0]) * i / (_BETWEEN - 1)) for i in range(_BETWEEN)]
    widths = [record.widths_after(n) for n in steps]
    kl = comparison.kl(comparison.checkpoint.layer, widths, progress, name)
    low, high = kl[0], kl[-1]
    score = scores(comparison, record.probe, widths[0])
    relative = probe.two_level_kl(score, low, high)
    static = [
        (record.ladder.rungs[n].mean_bits, float(values.mean()))
        for n, values in zip(steps, kl, strict=True)
    ]
    mixed = probe.LOW_SHARE * float(low.mean()) + (1 - probe.LOW_SHARE) * float(high.mean())
    policy_bits = probe.LOW_SHARE * static[0][0] + (1 - probe.LOW_SHARE) * static[-1][0]
    return {
        "tokens": len(low),
        "static": [{"mean_bits": bits, "kl_nats": value} for bits, value in static],
        "policy_mean_bits": policy_bits,
        "static_mix_kl_nats": mixed,
        "policy_kl_nats": relative * mixed,
        "relative_kl": relative,
        "bits_gained_over_a_mix": bits_of_mix(relative * mixed, static) - policy_bits,
        "bits_gained_over_a_level": bits_at(relative * mixed, static) - policy_bits,
        "correlation": rank_correlation(score.tolist(), low.tolist()),
    }


def bits_of_mix(kl: float, static: Sequence[tuple[float, float]]) -> float:
    """Mean bits at which a random mix of the first and last static level has `kl`."""
    (low_bits, low), (high_bits, high) = static[0], static[-1]
    return low_bits + (low - kl) / (low - high) * (high_bits - low_bits)


def main() -> None:
    """Measure each text, print and write."""
    parser = argparse.ArgumentParser(description="What the probe is worth.")
    add_options(parser)
    parser.add_argument("--sequences", type=int, default=8, help="of 512 tokens, of each text")
    parser.add_argument("--out", type=Path, default=RESULTS / "probe.json")
    options = parser.parse_args()
    files = text_files(options.text)
    facts = facts_of(options.model, files)
    tokenizer = load_tokenizer(options.model)
    tokens = {
        name: cut_tokens(read_text(str(file)), tokenizer, options.sequences, LENGTH).fit
        for name, file in files.items()
    }
    checkpoint = StoredCheckpoint(options.checkpoint)
    model = BlockModel(options.model)
    with Progress() as progress:
        results = {
            name: measure(Comparison(model, part, checkpoint), progress, name)
            for name, part in tokens.items()
        }
    write_json(options.out, {"target": TARGET, "texts": results}, facts)
    table = Table(box=box.SIMPLE_HEAD)
    headings = ("KL nats", "tokens", "mix", "policy", "ratio", "bits/mix", "bits/level", "")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "KL nats" else "right")
    for name, entry in results.items():
        table.add_row(
            name,
            str(entry["tokens"]),
            f"{entry['static_mix_kl_nats']:.4f}",
            f"{entry['policy_kl_nats']:.4f}",
            f"{entry['relative_kl']:.2f}",
            f"{entry['bits_gained_over_a_mix']:+.2f}",
            f"{entry['bits_gained_over_a_level']:+.2f}",
            "met" if entry["relative_kl"] <= TARGET else "NOT MET",
        )
    console = Console()
    console.print(table)
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
