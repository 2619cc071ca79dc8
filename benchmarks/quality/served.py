# SPDX-License-Identifier: Apache-2.0
"""Quality of every configuration while the real engine decodes, on any texts.

    python -m benchmarks.quality.served [--model FOLDER] [--calibrated FOLDER]
        [--text NAME=FILE ...] [--tokens N] [--quick] [--out FILE]

Each engine decodes the same teacher-forced tokens through its scheduler and KV cache, at the
precision that each step has; engines run one after another, for nothing is timed. KL, top-1
agreement and perplexity are to the unquantized checkpoint in fp32 (for the demo's model, the
dequantized GGUF). The perplexity's ratio to the reference's has a 95 % interval, over sequences.

A policy that changes widths is compared with static levels of the ladder: with the KL that one of
the same mean bits has, and the bits that one of the same KL takes (log KL taken for linear in bits
between the levels that were measured).

By default the text that ships with the benchmarks, which no checkpoint was calibrated on, and the
code and chat of the calibration mix, which the calibrated checkpoint has seen.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import ROOT, machine, write_json
from benchmarks.quality.budget import FORCED, PROMPT, kl_at, nearest_level, sequences_of
from benchmarks.quality.engine import compute_references
from benchmarks.quality.probe import bits_at
from benchmarks.quality.sequences import TokenSequence, read_records, scored, summarise
from benchmarks.quality.statistics import mean_interval, percentile
from benchmarks.quality.texts import facts_of, text_files
from benchmarks.report.text import nats
from benchmarks.serving.configurations import (
    CALIBRATED_ENGINE,
    CONFIGURATIONS,
    LLAMA,
    Configuration,
    default_names,
    engine_specs,
)
from benchmarks.serving.kinds import FILES
from benchmarks.serving.process import EngineError, EngineProcess, reason, running
from demo.get_model import ModelError, get_model
from vllm_flexquant.format.record import read_calibration
from vllm_flexquant.quantize.calibration import load_tokenizer

LEVEL_KL = (0.07, 0.03, 0.0105, 0.0045)
"""Static levels that are measured, beside uniform widths: those of the nearest calibrated KL."""

POLICIES = ("entropy", "progressive")
"""Of the calibrated checkpoint, beside budgets."""

FULL_BITS = {"bf16": 16.0, "fp32": 32.0, "w8a8": 8.0, "w4a16": 4.0}
ROWS = 8


def calibrated_configurations(checkpoint: Path) -> list[Configuration]:
    """Levels of the checkpoint's ladder, and policies.

    Raises:
        SystemExit: it is not calibrated.
    """
    record = read_calibration(json.loads((checkpoint / "flexquant.json").read_text()))
    if record is None or record.ladder is None:
        raise SystemExit(f"{checkpoint} is not calibrated; make it with `flexquant quantize`")
    ladder = [rung.kl_nats for rung in reversed(record.ladder.rungs)]
    levels = sorted({nearest_level(ladder, kl) for kl in LEVEL_KL})
    found = [
        Configuration(
            f"level-{n}",
            f"flexquant level {n}",
            CALIBRATED_ENGINE,
            change={"policy": "manual", "level": n},
        )
        for n in levels
    ]
    return found + [
        Configuration(name, f"flexquant {name}", CALIBRATED_ENGINE, change={"policy": name})
        for name in POLICIES
    ]


def quality_of(
    records: Sequence[dict[str, Any]], sequences: Sequence[TokenSequence]
) -> dict[str, Any]:
    """Of one configuration on one text.

    Returns:
        as `summarise`, and kl_99, the 99th percentile of KL in nats; perplexity, of the text;
        perplexity_ratio to the reference's, with a 95 % interval over sequences.
    """
    found = summarise(records)
    differences = defaultdict(list)
    for record in records:
        differences[record["id"]].append(record["nll"] - record["nll_reference"])
    means = [math.fsum(v) / len(v) for v in differences.values()]
    if len(means) != len(sequences):
        raise ValueError(f"{len(means)} of {len(sequences)} sequences were recorded")
    return found | {
        "kl_99": percentile([record["kl"] for record in records], 0.99),
        "perplexity": math.exp(found["nll"]),
        "perplexity_ratio": [math.exp(value) for value in mean_interval(means)],
    }


def measure(
    engine: EngineProcess,
    configurations: Sequence[Configuration],
    texts: Mapping[str, tuple[Path, list[TokenSequence]]],
    console: Console,
) -> dict[str, dict[str, Any]]:
    """By configuration and text, `quality_of` and the mean bits of the decode steps."""
    results: dict[str, dict[str, Any]] = {}
    for configuration in configurations:
        entry: dict[str, Any] = {"label": configuration.label, "texts": {}}
        for text, (folder, sequences) in texts.items():
            answer = engine.ask(
                "force",
                run=configuration.name,
                sequences=str(folder / "sequences.json"),
                reference=str(folder / "reference.npy"),
                record=str(folder / "records.jsonl"),
                rows=ROWS,
                change=configuration.change,
            )
            records = read_records(folder / "records.jsonl", configuration.name)
            quality = quality_of(scored(records, sequences), sequences)
            quality["mean_bits"] = answer.get("mean_bits", FULL_BITS.get(configuration.name))
            entry["texts"][text] = quality
            console.print(
                f"  {configuration.label}, {text}: KL "
                f"{nats(quality['kl'], quality['kl_standard_error'])} "
                f"({answer['seconds']:.0f} s)",
                highlight=False,
            )
        results[configuration.name] = entry
    return results


def compare_with_levels(results: Mapping[str, Any], texts: Sequence[str]) -> None:
    """Add to each policy's result what a static level of equal bits, or of equal KL, has."""
    static = [n for n in results if n.startswith(("level-", "calibrated-"))]
    if not static:
        return
    for text in texts:
        points = sorted(
            (results[n]["texts"][text]["mean_bits"], results[n]["texts"][text]["kl"])
            for n in static
        )
        for name, entry in results.items():
            if name in POLICIES or name.startswith("budget-"):
                quality = entry["texts"][text]
                kl, bits = quality["kl"], quality["mean_bits"]
                saved = bits_at(kl, points) - bits
                quality["static_level"] = {
                    "kl_at_equal_bits": kl_at(bits, points),
                    "kl_over_it": kl / kl_at(bits, points),
                    "bits_saved_at_equal_kl": None if math.isnan(saved) else saved,
                }


def show(results: Mapping[str, Any], texts: Sequence[str], console: Console) -> None:
    """Print a line for each configuration."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for text in texts:
        for heading in (f"bits, {text}", "KL", "top-1"):
            table.add_column(heading, justify="right", no_wrap=True)
    for entry in results.values():
        cells = [entry["label"]]
        for text in texts:
            quality = entry["texts"][text]
            bits = quality["mean_bits"]
            cells += ["" if bits is None else f"{bits:.2f}", nats(quality["kl"])]
            cells.append(f"{quality['top1']:.1%}")
        table.add_row(*cells)
    console.print(table)


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Quality while the engine decodes.")
    parser.add_argument("--model", help="unquantized checkpoint folder (default: the demo's model)")
    parser.add_argument("--calibrated", type=Path, help="calibrated checkpoint of it")
    parser.add_argument("--text", action="append", metavar="NAME=FILE")
    parser.add_argument("--tokens", type=int, default=8 * FORCED, help="of each text")
    parser.add_argument("--quick", action="store_true", help="one text, few tokens")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out" / "quality.json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.tokens = 4 * FORCED
    if options.tokens < FORCED:
        parser.error(f"--tokens: {options.tokens} are not the {FORCED} of one sequence")
    return options


def main() -> None:
    """Measure, print and write."""
    options = read_options()
    console = Console()
    try:
        model = Path(options.model) if options.model else get_model()
    except ModelError as error:
        raise SystemExit(str(error)) from None
    files = text_files(options.text) if options.text else dict(FILES)
    if options.quick:
        files = dict(list(files.items())[:1])
    facts, tokenizer = facts_of(model, files), load_tokenizer(model)
    calibrated = options.calibrated
    names = default_names(machine()["flags"], calibrated is not None, options.quick)
    configurations = [CONFIGURATIONS[n] for n in names if not n.startswith(LLAMA)]
    if calibrated is not None and not options.quick:
        configurations += calibrated_configurations(calibrated)
    unavailable: dict[str, str] = {}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="flexquant-bench-") as temporary:
        texts = {}
        for name, file in files.items():
            folder = Path(temporary) / name
            folder.mkdir()
            count = options.tokens // FORCED
            sequences = sequences_of(file, tokenizer, count, name)
            compute_references(str(model), sequences, folder, [], "float32")
            texts[name] = folder, sequences
        specs = engine_specs(
            str(model), names, Path(temporary), False, calibrated, unavailable=unavailable
        )
        for name, spec in specs.items():
            if name.startswith(LLAMA):
                continue
            own = [c for c in configurations if c.engine == name]
            try:
                with running([spec], Path(temporary)) as engines:
                    results |= measure(engines[name], own, texts, console)
            except EngineError as error:
                unavailable[name] = reason(str(error))
                console.print(f"  without {name}: {unavailable[name]}", highlight=False)
    order = [c.name for c in configurations if c.name in results]
    results = {name: results[name] for name in order}
    compare_with_levels(results, list(files))
    found = {
        "settings": {"rows": ROWS, "prompt_tokens": PROMPT, "forced_tokens": FORCED},
        "texts_seen_in_calibration": [n for n in files if n in FILES and n != "prose"],
        "unavailable": {n: r for n, r in unavailable.items() if not n.startswith(LLAMA)},
        "configurations": results,
    }
    write_json(options.out, found, facts)
    show(results, list(files), console)
    console.print(f"written to {options.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
