# SPDX-License-Identifier: Apache-2.0
"""Greedy and tree search for the ladder, on the same codes and sensitivities.

    python -m benchmarks.quality.ladders --model FOLDER --checkpoint FOLDER [--text FILE]
        [--branch N] [--stem N] [--search-tokens N] [--tokens N]

`checkpoint` is a calibrated one, whose weights and sensitivities both searches use. The tree
measures its candidates on the built-in calibration text; then both ladders are measured on another
text, at the same mean bits. Plain transformers in fp32; reference: the checkpoint as given (for the
demo's model, the dequantized GGUF).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.provenance import provenance, write_json
from benchmarks.quality.calibrated import (
    LENGTH,
    RESULTS,
    TEXT,
    Comparison,
    StoredCheckpoint,
    read_tokens,
)
from vllm_flexquant.format.layout import PARENT_BITS
from vllm_flexquant.quantize import search
from vllm_flexquant.quantize.blocks import BlockModel
from vllm_flexquant.quantize.calibration import BUILT_IN, cut_tokens, load_tokenizer, read_text
from vllm_flexquant.quantize.evaluate import mean_and_error


def largest_gap_mb(sizes: Mapping[str, int], steps: Sequence[search.Step]) -> float:
    """Most bytes that one step saves, in MB."""
    widths = dict.fromkeys(sizes, PARENT_BITS)
    gap = 0.0
    for step in steps:
        gap = max(gap, sizes[step.unit] * (widths[step.unit] - step.width) / PARENT_BITS / 1e6)
        widths[step.unit] = step.width
    return gap


def at_bits(sizes: Mapping[str, int], steps: Sequence[search.Step], bits: float) -> dict[str, int]:
    """The rung whose mean bits are nearest."""
    rungs = search.rungs(dict.fromkeys(sizes, PARENT_BITS), steps)
    return min(rungs, key=lambda widths: abs(search.mean_bits(sizes, widths) - bits))


def main() -> None:
    """Search both ways, measure, print and write."""
    parser = argparse.ArgumentParser(description="Greedy and tree search for the ladder.")
    parser.add_argument("--model", type=Path, required=True, help="unquantized checkpoint folder")
    parser.add_argument("--checkpoint", type=Path, required=True, help="calibrated checkpoint")
    parser.add_argument("--text", type=Path, default=TEXT, help="to measure both on")
    parser.add_argument("--tokens", type=int, default=4096, help="of it")
    parser.add_argument("--search-tokens", type=int, default=1024, help="of calibration text")
    parser.add_argument("--branch", type=int, default=3)
    parser.add_argument("--stem", type=int, default=1)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5, 5.0, 5.5, 6.0, 6.5, 7.0])
    parser.add_argument("--out", type=Path, default=RESULTS / "ladders.json")
    options = parser.parse_args()
    facts = provenance(options.model, options.text)
    tokenizer = load_tokenizer(options.model)
    text = read_tokens(options.text, options.model, options.tokens)
    calibration = cut_tokens(read_text(BUILT_IN), tokenizer, 96, LENGTH).held_back
    calibration = calibration[: max(1, options.search_tokens // LENGTH)]
    checkpoint = StoredCheckpoint(options.checkpoint)
    model = BlockModel(options.model)
    units = checkpoint.record.units
    sizes = {unit.name: unit.weights for unit in units}
    prices = {
        name: {width: count * width / PARENT_BITS for width in checkpoint.layout.widths}
        for name, count in sizes.items()
    }
    costs = {unit.name: {w: kl for w, (kl, _) in unit.sensitivity.items()} for unit in units}
    results: dict[str, Any] = {}
    with Progress() as progress:
        searching = Comparison(model, calibration, checkpoint)
        task = progress.add_task("tree search", total=1.0)

        def measured(choices: Sequence[Mapping[str, int]]) -> list[float]:
            return searching.kl(checkpoint.layer, choices).mean(-1).tolist()

        ladders = {}
        for name in ("greedy", "tree"):
            began = time.monotonic()
            ladders[name] = (
                search.greedy(costs, prices)
                if name == "greedy"
                else search.tree(
                    costs,
                    prices,
                    measured,
                    options.branch,
                    options.stem,
                    advance=lambda share: progress.update(task, completed=share),
                )
            )
            results[name] = {
                "search_seconds": time.monotonic() - began,
                "rungs": len(ladders[name]) + 1,
                "largest_gap_mb": largest_gap_mb(sizes, ladders[name]),
            }
        choices = [at_bits(sizes, steps, b) for steps in ladders.values() for b in options.bits]
        judging = Comparison(model, text, checkpoint)
        found = list(judging.kl(checkpoint.layer, choices, progress, "both ladders"))
    for i, name in enumerate(ladders):
        part = slice(i * len(options.bits), (i + 1) * len(options.bits))
        results[name]["kl"] = [
            {"mean_bits": search.mean_bits(sizes, widths)}
            | dict(zip(("kl_nats", "standard_error"), mean_and_error(kl), strict=True))
            for widths, kl in zip(choices[part], found[part], strict=True)
        ]
    settings = {
        "branch": options.branch,
        "stem": options.stem,
        "search_tokens": calibration.numel(),
        "tokens": text.numel(),
    }
    write_json(options.out, {"settings": settings, "ladders": results}, facts)
    console = Console()
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("KL nats at mean bits")
    for bits in options.bits:
        table.add_column(f"{bits:g}", justify="right")
    for heading in ("search s", "rungs", "largest gap MB"):
        table.add_column(heading, justify="right")
    for name, entry in results.items():
        table.add_row(
            name,
            *(f"{point['kl_nats']:.4f}" for point in entry["kl"]),
            f"{entry['search_seconds']:.1f}",
            str(entry["rungs"]),
            f"{entry['largest_gap_mb']:.2f}",
        )
    console.print(table)
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
