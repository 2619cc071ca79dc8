# SPDX-License-Identifier: Apache-2.0
"""vLLM's own `vllm bench serve` and `vllm bench throughput`: flexquant beside static choices.

    python -m benchmarks.serving.vllm_bench [--model FOLDER] [--calibrated FOLDER] [--quick]
        [--rounds N] [--out FILE]

*serve*: servers that take turns; the client is vLLM's, called in this process, so that it is
imported once. Random prompts of 32 tokens, 48 tokens each, 1 to 32 requests at a time.
*throughput*: the command, an engine of its own for each configuration, one after another, so its
ratios are not interleaved. Before the speeds every server decodes a given text; a KL above the
configuration's limit, or none, and there are no speeds. The KL of `throughput` is that of the same
checkpoint and policy in *serve*.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import random
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import ROOT, command_line, machine, provenance, write_json
from benchmarks.quality import teacher_forcing
from benchmarks.quality.engine import compute_references
from benchmarks.quality.sequences import TEXT, TokenSequence, cut_text, summarise
from benchmarks.serving import servers
from benchmarks.serving.configurations import (
    CALIBRATED_ENGINE,
    CONFIGURATIONS,
    FLEX_ENGINE,
    Configuration,
    engine_specs,
    unquantized,
)
from benchmarks.serving.engine import ENVIRON, EngineSpec
from benchmarks.serving.replay import records_of
from benchmarks.serving.replay_client import Planned, replay
from benchmarks.serving.summary import compare, spread
from demo.get_model import ModelError, get_model
from demo.server import ServerError, VllmServer, find_vllm

INPUT, OUTPUT = 32, 48
CONCURRENCY = {1: 2, 4: 8, 16: 16, 32: 32}
"""Requests at a time, and in all."""

QUICK = {1: 2, 16: 16}
KEPT = (
    *("request_throughput", "output_throughput", "median_ttft_ms", "p99_ttft_ms"),
    *("median_tpot_ms", "p99_tpot_ms", "median_itl_ms", "p99_itl_ms", "completed", "failed"),
)
"""Of what `vllm bench serve` returns."""

SCORED = 4
THROUGHPUT_PROMPTS = 32
OF_ENVIRONMENT = {
    "calibrated-8": {"VLLM_FLEXQUANT_POLICY": "static", "VLLM_FLEXQUANT_WIDTH": "8"},
    "calibrated-4": {"VLLM_FLEXQUANT_POLICY": "static", "VLLM_FLEXQUANT_WIDTH": "4"},
    "budget-0.03": {"VLLM_FLEXQUANT_POLICY": "budget", "VLLM_FLEXQUANT_BUDGET": "0.03"},
    "flexquant-8": {"VLLM_FLEXQUANT_POLICY": "static", "VLLM_FLEXQUANT_WIDTH": "8"},
    "flexquant-4": {"VLLM_FLEXQUANT_POLICY": "static", "VLLM_FLEXQUANT_WIDTH": "4"},
}
"""What a configuration is where nobody can tell the engine while it runs."""


def configurations_of(calibrated: bool) -> list[Configuration]:
    """What is compared, and first with what: what one would serve unquantized here."""
    ours = ["calibrated-8", "calibrated-6", "calibrated-4", "budget-0.03"]
    if not calibrated:
        ours = ["flexquant-8", "flexquant-6", "flexquant-4"]
    static = (unquantized(machine()["flags"]), "w8a8", "w4a16")
    return [CONFIGURATIONS[name] for name in (*static, *ours)]


def client_arguments(
    server: VllmServer, tokenizer: str, concurrency: int, requests: int, seed: int
) -> list[str]:
    """Of `vllm bench serve`."""
    return [
        *("--backend", "openai", "--base-url", server.url, "--endpoint", "/v1/completions"),
        *("--model", servers.MODEL, "--tokenizer", tokenizer, "--dataset-name", "random"),
        *("--random-input-len", str(INPUT), "--random-output-len", str(OUTPUT), "--ignore-eos"),
        *("--temperature", "0", "--seed", str(seed), "--request-rate", "inf"),
        *("--max-concurrency", str(concurrency), "--num-prompts", str(requests)),
        *("--disable-tqdm", "--ready-check-timeout-sec", "0"),
    ]


def bench_serve(arguments: Sequence[str]) -> dict[str, Any]:
    """What `vllm bench serve` returns, those of `KEPT`.

    Raises:
        ServerError: a request failed.
    """
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        found = asyncio.run(main_async(parser.parse_args(list(arguments))))
    if found["failed"] or not found["completed"]:
        raise ServerError(
            f"vllm bench serve: {found['failed']} requests failed\n{said.getvalue()[-600:]}"
        )
    return {name: found[name] for name in KEPT}


def quality_of(
    server: VllmServer,
    configuration: Configuration,
    sequences: Sequence[TokenSequence],
    folder: Path,
) -> dict[str, Any]:
    """KL while the server decodes a text.

    Raises:
        ServerError: the gate is red.
    """
    name = f"gate {configuration.name}"
    plan = [Planned(0.0, sequence) for sequence in sequences]
    with servers.awake(server):
        servers.use(server, configuration)
        outcomes = asyncio.run(replay(server.url, plan, name, len(plan), every=1))
    if failed := [o.error for o in outcomes if not o.done]:
        raise ServerError(f"{configuration.label}: {failed[0]}")
    found = summarise(records_of(folder, name))
    if not found["kl"] <= configuration.limit:
        raise ServerError(
            f"{configuration.label}: KL {found['kl']:.4f} is above {configuration.limit:g}; "
            "no speeds"
        )
    return found


def measure_serve(
    running: Mapping[str, VllmServer],
    configurations: Sequence[Configuration],
    tokenizer: str,
    concurrency: Mapping[int, int],
    rounds: int,
    console: Console,
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By configuration and requests at a time, what each round gave."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        c.name: {str(n): [] for n in concurrency} for c in configurations
    }
    for number in range(rounds):
        for together, requests in concurrency.items():
            order = list(configurations)
            random.Random(f"{number} {together}").shuffle(order)
            for configuration in order:
                server = running[configuration.engine]
                with servers.awake(server):
                    servers.use(server, configuration)
                    given = client_arguments(server, tokenizer, together, requests, number)
                    found[configuration.name][str(together)].append(bench_serve(given))
            console.print(f"  round {number + 1} of {rounds}, {together} at a time")
    return found


def summarise_serve(
    found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], baseline: str
) -> dict[str, dict[str, Any]]:
    """Spread of each figure, and of the output's speed over the baseline's of the same round."""
    results: dict[str, dict[str, Any]] = {}
    for name, by_concurrency in found.items():
        results[name] = {}
        for together, rounds in by_concurrency.items():
            entry: dict[str, Any] = {
                key: spread([r[key] for r in rounds])
                for key in KEPT
                if key not in ("completed", "failed")
            }
            speeds = [r["output_throughput"] for r in rounds]
            base = [r["output_throughput"] for r in found[baseline][together]]
            entry["against"] = {baseline: compare(speeds, base)}
            results[name][together] = entry
    return results


def throughput_command(spec: EngineSpec, out: Path) -> list[str]:
    """`vllm bench throughput` for an engine."""
    command = [str(find_vllm()), "bench", "throughput", "--model", spec.model]
    command += ["--dtype", spec.dtype, "--max-model-len", "1024", "--max-num-seqs", "32"]
    command += ["--enforce-eager", "--dataset-name", "random", "--random-input-len", str(INPUT)]
    command += ["--random-output-len", str(OUTPUT), "--num-prompts", str(THROUGHPUT_PROMPTS)]
    for name, value in spec.arguments.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return [*command, "--output-json", str(out)]


def measure_throughput(
    specs: Mapping[str, EngineSpec],
    configurations: Sequence[Configuration],
    folder: Path,
    console: Console,
) -> tuple[dict[str, Any], dict[str, str]]:
    """By configuration, what the command wrote; and the reason of each that failed."""
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for configuration in configurations:
        if configuration.change is not None and configuration.name not in OF_ENVIRONMENT:
            continue
        spec, out = specs[configuration.engine], folder / f"{configuration.name}.json"
        environ = os.environ | ENVIRON | servers.environ_of(spec)
        environ |= OF_ENVIRONMENT.get(configuration.name, {})
        del environ["VLLM_ENABLE_V1_MULTIPROCESSING"]  # as a user would run it
        command = throughput_command(spec, out)
        run = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        if run.returncode or not out.is_file():
            failed[configuration.name] = (run.stderr.strip().splitlines() or ["no message"])[-1]
            continue
        written = json.loads(out.read_text(encoding="utf-8"))
        results[configuration.name] = {
            key: written[key] for key in ("requests_per_second", "tokens_per_second")
        } | {"command": command_line(command)}
        speed = written["tokens_per_second"]
        console.print(f"  throughput, {configuration.label}: {speed:.0f} tokens/s in and out")
    return results, failed


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print a line for each configuration."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    entries, base = results["configurations"], results["settings"]["baseline"]
    table.add_column("", no_wrap=True)
    table.add_column("KL", justify="right")
    columns = list(next(iter(entries.values()))["serve"])
    for together in columns:
        table.add_column(f"x {base}, {together}", justify="right")
    for entry in entries.values():
        cells = [entry["label"], f"{entry['quality']['kl']:.4f}"]
        cells += [f"{entry['serve'][n]['against'][base]['median']:.2f}" for n in columns]
        table.add_row(*cells)
    console.print(table)


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="vLLM's own benchmarks.")
    parser.add_argument("--model", help="unquantized checkpoint folder (default: the demo's model)")
    parser.add_argument("--calibrated", type=Path, help="calibrated checkpoint of it")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="one round, no throughput")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out" / "vllm-bench.json")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 2)
    return options


def main() -> None:
    """Measure, print and write."""
    options = read_options()
    console = Console()
    servers.end_with_servers()
    try:
        model = options.model or str(get_model())
        facts = provenance(model, TEXT)
        with tempfile.TemporaryDirectory(prefix="flexquant-bench-") as temporary:
            results = measure(options, model, Path(temporary), console)
    except (ModelError, ServerError, ValueError) as error:
        raise SystemExit(str(error)) from None
    write_json(options.out, results, facts)
    show(results, console)
    console.print(f"written to {options.out}", soft_wrap=True)


def measure(
    options: argparse.Namespace, model: str, folder: Path, console: Console
) -> dict[str, Any]:
    """The results as they are written."""
    from transformers import AutoTokenizer

    calibrated = options.calibrated is not None
    compared = configurations_of(calibrated)
    base = compared[0].name
    unavailable: dict[str, str] = {}
    names = [c.name for c in compared]
    specs = engine_specs(model, names, folder, False, options.calibrated, unavailable)
    sequences = cut_text(
        AutoTokenizer.from_pretrained(model), TEXT.read_text(encoding="utf-8"), SCORED
    )
    compute_references(model, sequences, folder, [], "float32")
    environ = {
        teacher_forcing.REFERENCE: str(folder / "reference.npy"),
        teacher_forcing.RECORD: str(folder / "records.jsonl"),
    }
    concurrency = QUICK if options.quick else CONCURRENCY
    arguments = ("--logits-processors", teacher_forcing.NAME)
    console.print(f"servers: {', '.join(specs)}")
    with servers.serving(list(specs.values()), folder, arguments, environ, unavailable) as running:
        if missing := {base, CALIBRATED_ENGINE if calibrated else FLEX_ENGINE} - running.keys():
            raise ServerError(f"{missing.pop()} does not start")
        quality: dict[str, dict[str, Any]] = {}
        for configuration in compared:
            server = running.get(configuration.engine)
            try:
                if server is not None:
                    found = quality_of(server, configuration, sequences, folder)
                    quality[configuration.name] = found
            except ServerError as error:
                unavailable[configuration.name] = str(error)
        for name, why in unavailable.items():
            console.print(f"  without {name}: {why}", highlight=False)
        if base not in quality:
            raise ServerError(f"{base}, with which all is compared, does not run")
        compared = [c for c in compared if c.name in quality]
        rounds = measure_serve(running, compared, model, concurrency, options.rounds, console)
        some = client_arguments(running[base], model, 1, concurrency[1], 0)
    throughput: dict[str, Any] = {}
    if not options.quick:
        throughput, failed = measure_throughput(specs, compared, folder, console)
        unavailable |= {f"throughput of {name}": why for name, why in failed.items()}
    serve = summarise_serve(rounds, base)
    return {
        "settings": {
            "rounds": options.rounds,
            "input_tokens": INPUT,
            "output_tokens": OUTPUT,
            "requests": {str(n): count for n, count in concurrency.items()},
            "baseline": base,
            "scored_tokens": quality[base]["tokens"],
            "serve_command": command_line(["vllm", "bench", "serve", *some]),
        },
        "unavailable": unavailable,
        "configurations": {
            c.name: {
                "label": c.label,
                "quality": quality[c.name],
                "serve": serve[c.name],
                "throughput": throughput.get(c.name),
            }
            for c in compared
        },
    }


if __name__ == "__main__":
    main()
