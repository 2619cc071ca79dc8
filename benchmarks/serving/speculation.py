# SPDX-License-Identifier: Apache-2.0
"""What self-speculation gains in time, after a check that it changes no answer.

    python -m benchmarks.serving.speculation --model CHECKPOINT [--batches 1 4 16] [--rounds N]

One engine; everything takes turns, and a speed is a ratio to plain steps of the same engine in the
same round, on the same prompts. Four parts. *Equality*: greedy answers with drafts and without are
the same tokens, and sampled ones as likely, or nothing else is measured and nothing is written
(`equality.py`). *Acceptance*: for levels and widths to draft at, with drafts of a fixed length, the
share that is kept by position, and the speed beside what the policy's model expects of the times
measured. *Gates*: at the level that the engine picks, each way to end a draft. *Load*: requests
come and go under gate gain. One answer, draft by draft, is in `speculation_answer.py`.

From `--mixed-from` requests at a time on, requests of all kinds run side by side. Gates gain and
entropy, which also choose by measured times whether to draft at all, learn from a run of the same
kind of prompts that is not timed, each for itself. Sampled requests have seeds, the same
with drafts and without; their answers differ, as they may. `speculation_plot` makes the pictures.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import write_json
from benchmarks.quality.texts import facts_of
from benchmarks.serving import speculation_parts as parts
from benchmarks.serving.engine import ENVIRON, MAX_ROWS
from benchmarks.serving.equality import Answer, measure_equality, measure_sampled
from benchmarks.serving.kinds import FILES, Prompt, in_turn, make_prompts
from benchmarks.serving.run import PROMPT, RESULTS
from benchmarks.serving.speculating import SpeculatingEngine
from vllm_flexquant.quantize.calibration import load_tokenizer

MIXED = "mixed"

WIDE = 110
"""Columns of the tables, in a log too."""

SAMPLED = 64
"""Prompts at most of the check of sampled output."""


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print the tables."""
    found = results["equality"]
    console.print(
        f"equality: {found['equal']} of {found['prompts']} greedy answers are the same, "
        f"{found['within_noise']} differ within noise, {found['otherwise']} otherwise"
    )
    table = Table(box=box.SIMPLE_HEAD, title="drafts of a fixed length, one request")
    for column in (
        "draft",
        "bits",
        "kind",
        "temp.",
        "kept",
        "tokens a step",
        "speed",
        "expected",
    ):
        table.add_column(column)
    for entry in results["acceptance"]:
        table.add_row(
            entry["draft"],
            f"{entry['mean_bits']:.2f}",
            entry["kind"],
            str(entry["temperature"]),
            number_or_dash(entry["chance"]),
            number_or_dash(entry["accepted_length"]),
            number_or_dash(entry["speed_over_plain"]["median"]),
            number_or_dash(entry["expected_speedup"]),
        )
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD, title="speed over plain steps, by gate")
    table.add_column("requests, kind, temperature", min_width=12)
    for name in results["gate_options"]:
        table.add_column(name, justify="right")
    for entry in results["gates"]:
        table.add_row(
            f"{entry['requests']} {entry['kind']} {entry['temperature']}",
            *(
                number_or_dash(entry["gates"][name]["speed_over_plain"]["median"])
                for name in results["gate_options"]
            ),
        )
    console.print(table)
    for phase in results["load"]:
        console.print(
            f"load, {phase['requests']} at a time: {phase['drafting'] or 0:.0%} of steps drafted, "
            f"speed over plain {phase['speed_over_plain']['median']:.2f}"
        )


def number_or_dash(value: float | None) -> str:
    """With two digits."""
    return "-" if value is None else f"{value:.2f}"


def numbers(text: str) -> list[int]:
    """Of `1,4,16`."""
    return [int(part) for part in text.split(",") if part]


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="What self-speculation gains in time.")
    parser.add_argument("--model", type=Path, required=True, help="flexquant checkpoint")
    parser.add_argument("--alias", help="the model's name in the results")
    parser.add_argument("--batches", type=numbers, nargs="+", default=[[1, 4, MAX_ROWS]])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--mixed-from", type=int, default=4, help="requests at a time")
    parser.add_argument("--most", type=int, default=4, help="tokens of a draft")
    parser.add_argument("--levels", type=numbers, nargs="+", help="to draft at")
    parser.add_argument("--widths", type=numbers, nargs="+", help="to draft at")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=28, help="of a request and round")
    parser.add_argument("--prompts", type=int, default=200, help="of the check of equality")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=RESULTS / "speculation-cpu.json")
    options = parser.parse_args(arguments)
    for name in ("batches", "levels", "widths"):
        if (given := getattr(options, name)) is not None:
            setattr(options, name, sorted({n for part in given for n in part}))
    if options.batches[0] < 1 or options.batches[-1] > MAX_ROWS:
        parser.error(f"--batches: {options.batches} are not 1 to {MAX_ROWS}")
    return options


def main() -> None:
    """Check, measure, print and write."""
    options = read_options()
    os.environ |= ENVIRON
    facts = facts_of(options.model, FILES)
    if options.alias:
        facts["model"]["name"] = options.alias
    console = Console(width=WIDE)
    each = max(-(-options.prompts // len(FILES)), MAX_ROWS)
    prompts = make_prompts(FILES, load_tokenizer(options.model), each, PROMPT)
    engine = SpeculatingEngine(str(options.model), options.most, options.dtype)
    results: dict[str, Any] = {
        "settings": {
            name: getattr(options, name)
            for name in ("batches", "temperatures", "mixed_from", "most", "rounds", "tokens")
        }
        | {"prompt_tokens": PROMPT, "warm_tokens": parts.WARM_TOKENS, "crowds": parts.CROWDS},
        "engine": engine.facts(),
        "draft": engine.usual | {"mean_bits": engine.speculation.mean_bits},
    }

    def answer(batch: Sequence[Prompt], *, drafts: bool, temperature: float) -> list[Answer]:
        return engine.answers(batch, options.tokens, drafts, temperature)

    began = time.monotonic()

    def say(words: str) -> None:
        console.print(f"{time.monotonic() - began:5.0f} s {words}")

    most = max(options.batches)
    results["equality"] = measure_equality(in_turn(prompts, options.prompts), most, answer, say)
    results["sampled"] = [
        measure_sampled(in_turn(prompts, min(options.prompts, SAMPLED)), most, t, answer, say)
        for t in options.temperatures
        if t
    ]
    drafts = parts.drafts_of(engine, options.levels, options.widths)
    results["acceptance"] = parts.measure_acceptance(
        engine, drafts, prompts, options.temperatures, options.rounds, options.tokens, say
    )
    gates = parts.gates_of(options.most)
    results |= {"gate_options": gates, "gates": []}
    mixed = in_turn(prompts, sum(map(len, prompts.values())))
    for batch in options.batches:
        for kind, given in (
            {MIXED: mixed}.items() if batch >= options.mixed_from else prompts.items()
        ):
            for temperature in options.temperatures:
                found = parts.measure_gates(
                    engine, gates, given, batch, temperature, options.rounds, options.tokens
                )
                results["gates"].append(
                    {"requests": batch, "kind": kind, "temperature": temperature} | found
                )
                say(f"  gates: {batch} at a time, {kind}, temperature {temperature}")
    results["load"] = parts.measure_load(engine, mixed, options.rounds, options.tokens, say)
    write_json(options.out, results, facts)
    show(results, console)
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
