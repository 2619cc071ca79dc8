# SPDX-License-Identifier: Apache-2.0
"""A server that speculates beside one that was started without: speed, and the same answers.

    python -m benchmarks.serving.speculation_served --model CHECKPOINT [--rounds N]

Two engines of one checkpoint at all bits take turns on the same prompts, each in a process of its
own: one was started with `speculate`, gate gain, which learns as it goes and decides by itself
where drafts pay, and runs each cell with drafts and without (`speculate` 0); one was started
without. The first two say what drafts gain, the last two what being ready for them costs; two
processes of the same engine differ by some per cent, by luck. Greedy answers are compared token by
token between processes; in bf16 the best logits are often equal, and then which one wins may depend
on the number of rows.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import write_json
from benchmarks.quality.texts import facts_of
from benchmarks.serving.engine import MAX_ROWS, EngineSpec
from benchmarks.serving.kinds import FILES, Prompt, in_turn, make_prompts, of_round
from benchmarks.serving.process import EngineProcess, running
from benchmarks.serving.run import PROMPT, RESULTS
from benchmarks.serving.summary import compare, spread
from vllm_flexquant.quantize.calibration import load_tokenizer

WITH, WITHOUT, OFF = "speculating", "without", "off"
MIXED = "mixed"


def main() -> None:
    """Measure, print and write."""
    options = read_options()
    facts = facts_of(options.model, FILES)
    if options.alias:
        facts["model"]["name"] = options.alias
    console = Console()
    each = MAX_ROWS * (options.rounds + 1)
    prompts = make_prompts(FILES, load_tokenizer(options.model), each, PROMPT)
    static = {"VLLM_FLEXQUANT_POLICY": "static"}
    specs = [
        EngineSpec(WITHOUT, str(options.model), environ=static),
        EngineSpec(
            WITH,
            str(options.model),
            environ=static | {"VLLM_FLEXQUANT_SPECULATE": str(options.most)},
        ),
    ]
    with tempfile.TemporaryDirectory() as logs, running(specs, Path(logs)) as engines:
        results: dict[str, Any] = {
            "settings": {n: getattr(options, n) for n in ("most", "rounds", "tokens", "batches")},
            "engines": {name: engine.facts for name, engine in engines.items()},
        }
        cells = list(cells_of(prompts, options.batches, options.temperatures))
        results["cells"] = measure(
            engines, cells, options.rounds, options.tokens, options.most, console
        )
        results["drafts"] = engines[WITH].ask("drafts")
    write_json(options.out, results, facts)
    show(results, console)
    console.print(f"written to {options.out}")


def cells_of(
    prompts: Mapping[str, Sequence[Prompt]], batches: Sequence[int], temperatures: Sequence[float]
) -> Iterator[tuple[int, str, float, Sequence[Prompt]]]:
    """(requests at a time, kind of prompt, temperature, prompts): one request of each kind alone,
    more of all kinds side by side."""
    mixed = in_turn(prompts, sum(map(len, prompts.values())))
    for batch in batches:
        for kind, given in prompts.items() if batch == 1 else [(MIXED, mixed)]:
            for temperature in temperatures:
                yield batch, kind, temperature, given


def measure(
    engines: Mapping[str, EngineProcess],
    cells: Sequence[tuple[int, str, float, Sequence[Prompt]]],
    rounds: int,
    tokens: int,
    most: int,
    console: Console,
) -> list[dict[str, Any]]:
    """Speeds of each cell; round 0 warms up."""
    ways = {
        WITH: (WITH, {"speculate": most}),
        OFF: (WITH, {"speculate": 0}),
        WITHOUT: (WITHOUT, {}),
    }
    rates: dict[Any, list[float]] = defaultdict(list)
    same: dict[Any, list[bool]] = defaultdict(list)
    for number in range(rounds + 1):
        for batch, kind, temperature, given in cells:
            asked = of_round(given, number, batch)
            cell = batch, kind, temperature
            runs = {}
            for way in list(ways)[:: 1 if number % 2 else -1]:
                engine, change = ways[way]
                runs[way] = engines[engine].ask(
                    "answer",
                    prompts=asked,
                    tokens=tokens,
                    temperature=temperature,
                    seed=1000 * number,
                    change=change,
                )
                if number:
                    rates[way, cell].append(runs[way]["tokens"] / runs[way]["seconds"])
            pairs = zip(runs[WITH]["answers"], runs[WITHOUT]["answers"], strict=True)
            same[cell] += [one == other for one, other in pairs]
        console.print(f"round {number} of {rounds}")
    found = []
    for batch, kind, temperature, _ in cells:
        cell = batch, kind, temperature
        found.append(
            {
                "requests": batch,
                "kind": kind,
                "temperature": temperature,
                "with_over_off": compare(rates[WITH, cell], rates[OFF, cell]),
                "off_over_without": compare(rates[OFF, cell], rates[WITHOUT, cell]),
                "with_over_without": compare(rates[WITH, cell], rates[WITHOUT, cell]),
                "tokens_per_second_without": spread(rates[WITHOUT, cell]),
                "answers": len(same[cell]),
                # sampled answers differ, as they may
                "same_answers": None if temperature else sum(same[cell]),
            }
        )
    return found


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(box=box.SIMPLE_HEAD, title="tokens per second")
    ratios = ("with_over_off", "off_over_without", "with_over_without")
    for column in ("requests", "kind", "temperature", *ratios, "same answers"):
        table.add_column(column.replace("_", " "))
    for cell in results["cells"]:
        equal = cell["same_answers"]
        table.add_row(
            str(cell["requests"]),
            cell["kind"],
            str(cell["temperature"]),
            *(f"{cell[n]['median']:.3f} ({_quartiles(cell[n])})" for n in ratios),
            "" if equal is None else f"{equal} of {cell['answers']}",
        )
    console.print(table)


def _quartiles(found: Mapping[str, Any]) -> str:
    return " .. ".join(f"{value:.2f}" for value in found["quartiles"])


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A server that speculates beside one without.")
    parser.add_argument("--model", type=Path, required=True, help="flexquant checkpoint")
    parser.add_argument("--alias", help="the model's name in the results")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, MAX_ROWS])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--most", type=int, default=4, help="tokens of a draft")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--out", type=Path, default=RESULTS / "speculation-served-cpu.json")
    options = parser.parse_args()
    if wrong := [n for n in options.batches if not 1 <= n <= MAX_ROWS]:
        parser.error(f"--batches: {wrong[0]} is not 1 to {MAX_ROWS}")
    return options


if __name__ == "__main__":
    main()
