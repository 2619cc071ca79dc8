# SPDX-License-Identifier: Apache-2.0
"""Quality against speed on a CPU: flexquant beside vLLM's static choices and llama.cpp.

    python -m benchmarks.serving.run [--model FOLDER] [--calibrated FOLDER] [--quick] [--compiled]
        [--rounds N] [--batches 1 4 16 32] [--configurations ...] [--out FILE]

All engines are up at the same time and stopped while another is measured. First each decodes a
given text, and its KL to the fp32 reference must be what it should be; then, round after round and
in an order that changes, each generates 32 tokens after 32 at every batch size, which gives the
decode speed, and takes in 256 tokens, which gives the time to the first token. Speeds are compared
within a round. An engine that cannot be had or started is left out, and its reason is written down.
Without `--calibrated` there is nothing under policy budget. Writes JSON and pictures.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.peers import llama
from benchmarks.provenance import ROOT, machine, provenance, write_json
from benchmarks.quality.sequences import TEXT, cut_text
from benchmarks.serving import gate
from benchmarks.serving.configurations import (
    CONFIGURATIONS,
    NOTES,
    Configuration,
    default_names,
    engine_specs,
    stored_bytes,
)
from benchmarks.serving.engine import MAX_SEQS
from benchmarks.serving.load import Watch
from benchmarks.serving.plot import plot_speeds
from benchmarks.serving.process import EngineError, EngineProcess, running
from benchmarks.serving.summary import (
    BASELINES,
    check_targets,
    spread,
    summarise_speeds,
    tokens_per_second,
)
from demo.get_model import ModelError, get_model

BATCHES = (1, 4, 16, MAX_SEQS)
QUICK_BATCHES = (1, 16)
PROMPT, TOKENS, PREFILL = 32, 32, 256
SCORED_PROMPT, SCORED_TOKENS = 16, 97
RESULTS = ROOT / "benchmarks" / "results"
BUSY = 0.05
"""Share of the cores that other processes may use without a word about it."""


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Tokens per second in vLLM on a CPU.")
    parser.add_argument("--model", help="unquantized checkpoint folder (default: the demo's model)")
    parser.add_argument("--calibrated", type=Path, help="calibrated checkpoint of it")
    parser.add_argument("--quick", action="store_true", help="1 round, fewer configurations")
    parser.add_argument("--compiled", action="store_true", help="torch.compile in every engine")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, metavar="NAME")
    parser.add_argument("--checkpoints", type=Path, help="keep the quantized checkpoints here")
    parser.add_argument(
        "--out",
        type=Path,
        help="default: benchmarks/results/serving-cpu.json; not for a part of the measurement",
    )
    options = parser.parse_args(arguments)
    parts = (options.quick, options.configurations, options.batches, options.rounds is not None)
    options.batches = options.batches or list(QUICK_BATCHES if options.quick else BATCHES)
    if min(options.batches) < 1 or max(options.batches) > MAX_SEQS:
        parser.error(f"--batches: {options.batches} are not all from 1 to {MAX_SEQS}")
    if options.out is None:
        folder = ROOT / "benchmarks" / "out" if any(parts) else RESULTS
        options.out = folder / f"serving-cpu{'-compiled' if options.compiled else ''}.json"
    names = options.configurations or default_names(
        machine()["flags"], options.calibrated is not None, options.quick
    )
    # everything is compared with bf16
    options.configurations = list(dict.fromkeys(["bf16", *names]))
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def measure(
    engines: Mapping[str, EngineProcess],
    configurations: Sequence[Configuration],
    options: argparse.Namespace,
    tokens: Sequence[int],
    console: Console,
) -> tuple[
    dict[int, dict[str, list[list[float]]]],
    dict[str, list[float]],
    dict[int, dict[str, float]],
    dict[str, Any],
]:
    """Seconds of everything that is timed.

    Args:
        tokens: of the text that prompts are cut from.

    Returns:
        By batch and configuration, the decode steps of each round; by configuration, the seconds
        to the first token of each round; by batch and configuration, mean bits of the last round's
        decode steps, where an engine tells; who else used the CPU.
    """
    prompts = [list(tokens[i * PROMPT : (i + 1) * PROMPT]) for i in range(MAX_SEQS)]
    long_prompt = list(tokens[-PREFILL:])
    names = [c.name for c in configurations]
    decode: dict[int, dict[str, list[list[float]]]] = {
        batch: {name: [] for name in names} for batch in options.batches
    }
    bits: dict[int, dict[str, float]] = {batch: {} for batch in options.batches}
    prefill: dict[str, list[float]] = {name: [] for name in names}
    watch = Watch(engines)
    for number in range(options.rounds):
        for batch in options.batches:
            for configuration in shuffled(configurations, f"{number} {batch}"):
                with watch.measuring(configuration.engine) as engine:
                    answer = engine.ask(
                        "decode",
                        prompts=prompts[:batch],
                        tokens=TOKENS,
                        change=configuration.change,
                    )
                decode[batch][configuration.name].append(answer["steps"])
                if "mean_bits" in answer:
                    bits[batch][configuration.name] = answer["mean_bits"]
        for configuration in shuffled(configurations, f"{number} prefill"):
            with watch.measuring(configuration.engine) as engine:
                answer = engine.ask("prefill", prompt=long_prompt, change=configuration.change)
            prefill[configuration.name].append(median(answer["seconds"]))
        console.print(f"  round {number + 1} of {options.rounds}")
    return decode, prefill, bits, watch.summary()


def shuffled(configurations: Sequence[Configuration], seed: str) -> list[Configuration]:
    """Another order each time, the same ones in every run."""
    order = list(configurations)
    random.Random(seed).shuffle(order)
    return order


def collect(
    configurations: Sequence[Configuration],
    quality: Mapping[str, Any],
    decode: Mapping[int, Mapping[str, Sequence[Sequence[float]]]],
    prefill: Mapping[str, Sequence[float]],
    bits: Mapping[int, Mapping[str, float]],
    stored: Mapping[str, int | None],
) -> dict[str, Any]:
    """`configurations` and `targets` as they go into the JSON."""
    speeds = {
        batch: summarise_speeds(
            {name: [tokens_per_second(batch, r) for r in rounds] for name, rounds in found.items()}
        )
        for batch, found in decode.items()
    }
    prefills = summarise_speeds(
        {name: [PREFILL / seconds for seconds in found] for name, found in prefill.items()}
    )
    results = {}
    for configuration in configurations:
        name = configuration.name
        results[name] = {
            "label": configuration.label,
            "engine": configuration.engine,
            "width": configuration.width,
            "quality": quality[name],
            "stored_bytes": stored[configuration.engine],
            "decode_tokens_per_second": {
                str(batch): speeds[batch][name]
                | {"step_ms": spread([1e3 * median(steps) for steps in decode[batch][name]])}
                | ({"mean_bits": bits[batch][name]} if name in bits[batch] else {})
                for batch in decode
            },
            "prefill_tokens_per_second": prefills[name]
            | {"first_token_ms": spread([1e3 * seconds for seconds in prefill[name]])},
        }
    return {"configurations": results, "targets": check_targets(speeds)}


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print a table for each batch, one for prompts, and the targets."""
    entries = results["configurations"]
    for batch in next(iter(entries.values()))["decode_tokens_per_second"]:
        speeds = {name: e["decode_tokens_per_second"][batch] for name, e in entries.items()}
        console.print(speed_table(f"batch {batch}", entries, speeds))
    speeds = {name: e["prefill_tokens_per_second"] for name, e in entries.items()}
    title = f"prompt of {results['settings']['prefill_tokens']} tokens"
    console.print(speed_table(title, entries, speeds, "first_token_ms"))
    console.print(
        "Speed, and how often bf16's and W8A8's of the same round: median and quartiles. KL in "
        "nats per token to the fp32 reference.",
        highlight=False,
    )
    for row in results["targets"]:
        what = f"{row['configuration']} against {row['baseline']}, batch {row['batch']}"
        if row["met"] is None:
            console.print(f"- {what}: not measured (to reach: {row['least']:g})", highlight=False)
            continue
        low, high = row["quartiles"]
        console.print(
            f"- {what}: {row['median']:.2f} ({low:.2f} to {high:.2f}), to reach {row['least']:g}: "
            f"{'met' if row['met'] else 'not met'}",
            highlight=False,
        )
    others = results["cpu_while_measuring"]["other_processes"]
    if others > BUSY:
        console.print(
            f"Other processes used {others:.0%} of the cores meanwhile; measure again without them."
        )


def speed_table(
    title: str, entries: Mapping[str, Any], speeds: Mapping[str, Any], time: str | None = None
) -> Table:
    """One line per configuration: KL, tokens per second or the milliseconds `time`, ratios."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for heading in ("KL", "ms" if time else "tokens/s", "x bf16", "x W8A8"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, speed in speeds.items():
        cells = [entries[name]["label"], f"{entries[name]['quality']['kl']:.4f}"]
        cells.append(f"{speed[time or 'rate']['median']:.1f}")
        for baseline in BASELINES:
            ratio = speed["against"].get(baseline)
            cells.append("")
            if ratio:
                low, high = ratio["quartiles"]
                cells[-1] = f"{ratio['median']:.2f} {low:.2f}-{high:.2f}"
        table.add_row(*cells)
    return table


def show_gate(quality: Mapping[str, Any], wrong: Mapping[str, str], console: Console) -> None:
    """Print the KL of each configuration, and what is wrong with it."""
    for name, found in quality.items():
        plain = f", plain {found['plain_kl']:.4f}" if "plain_kl" in found else ""
        console.print(
            f"  {CONFIGURATIONS[name].label}: KL {found['kl']:.4f} ± "
            f"{found['kl_standard_error']:.4f}{plain}{' – ' * (name in wrong)}"
            f"{wrong.get(name, '')}",
            highlight=False,
        )


def main() -> None:
    """Measure, print and write."""
    options = read_options()
    console = Console()
    try:
        model = options.model or str(get_model())
    except ModelError as error:
        raise SystemExit(str(error)) from None
    from transformers import AutoTokenizer

    facts = provenance(model, TEXT)
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = TEXT.read_text(encoding="utf-8")
    count = 4 if options.quick else 8
    sequences = cut_text(tokenizer, text, count, SCORED_PROMPT, SCORED_TOKENS)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    configurations = [CONFIGURATIONS[name] for name in options.configurations]
    with tempfile.TemporaryDirectory(prefix="flexquant-bench-") as temporary:
        folder = Path(temporary)
        console.print("checkpoints and reference")
        unavailable: dict[str, str] = {}
        specs = engine_specs(
            model,
            options.configurations,
            options.checkpoints or folder,
            options.compiled,
            options.calibrated,
            unavailable,
            build=not options.quick,
        )
        stored = {name: stored_bytes(spec) for name, spec in specs.items()}
        planes = gate.references(model, configurations, sequences, folder)
        console.print(f"engines: {', '.join(specs)}")
        try:
            with running(list(specs.values()), folder, unavailable) as engines:
                engine_facts = {name: engine.facts for name, engine in engines.items()}
                if len({(f["threads"], *f["cores"]) for f in engine_facts.values()}) > 1:
                    raise SystemExit(f"engines differ in threads or cores: {engine_facts}")
                console.print("correctness gate")
                quality, wrong = gate.run_gate(
                    engines, configurations, sequences, planes, folder, unavailable
                )
                for name, reason in unavailable.items():
                    console.print(f"  without {name}: {reason}", highlight=False)
                if "bf16" not in quality:
                    raise SystemExit("bf16, with which all is compared, does not run")
                configurations = [c for c in configurations if c.name in quality]
                show_gate(quality, wrong, console)
                if wrong:
                    raise SystemExit("the gate is red: no speeds")
                console.print("speeds")
                decode, prefill, bits, load = measure(
                    engines, configurations, options, tokens, console
                )
        except EngineError as error:
            raise SystemExit(str(error)) from None
        files = {
            name: llama.describe(Path(spec.model))
            for name, spec in specs.items()
            if name in engine_facts and spec.command
        }
    results = {
        "settings": {
            "rounds": options.rounds,
            "compiled": options.compiled,
            "prompt_tokens": PROMPT,
            "new_tokens": TOKENS,
            "prefill_tokens": PREFILL,
            "scored_tokens": count * (SCORED_TOKENS - 1),
        },
        "notes": list(NOTES),
        "unavailable": unavailable,
        "llama_cpp": {"note": llama.NOTE, "package": llama.PACKAGE, "files": files},
        "engines": engine_facts,
        "cpu_while_measuring": load,
        **collect(configurations, quality, decode, prefill, bits, stored),
    }
    write_json(options.out, results, facts)
    written = [options.out, *plot_speeds(results, options.out)]
    show(results, console)
    console.print(f"written to {', '.join(map(str, written))}", soft_wrap=True)


if __name__ == "__main__":
    main()
