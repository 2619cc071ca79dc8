# SPDX-License-Identifier: Apache-2.0
"""Where the time of one decode step goes: flexquant at 4 bit, and bf16.

    python -m benchmarks.serving.profile_step [--model FOLDER] [--batches 1 16] [--tokens N]
        [--configurations bf16 flexquant-4] [--out FILE]

Eager engines, profiled one at a time by `benchmarks.serving.owners`. Writes JSON, and the table
beside it as text.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import provenance, write_json
from benchmarks.quality.sequences import TEXT
from benchmarks.serving.configurations import CONFIGURATIONS, engine_specs
from benchmarks.serving.engine import MAX_ROWS
from benchmarks.serving.owners import OURS, OWNERS
from benchmarks.serving.process import EngineError, running
from benchmarks.serving.run import PROMPT, RESULTS
from demo.get_model import ModelError, get_model

TRACE_TOKENS = 12
SHOWN_OPERATORS = 12


def tables(results: Mapping[str, Any]) -> list[Table]:
    """One table of owners, and one of operators for each profile.

    Args:
        results: by configuration and batch, as `benchmarks.serving.owners.profile`.
    """
    columns = [(name, batch) for name, found in results.items() for batch in found]
    owners = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="µs per decode step, share")
    owners.add_column("owner", no_wrap=True)
    for name, batch in columns:
        words = CONFIGURATIONS[name].label.split(" ", 1)
        owners.add_column("\n".join([*words, f"batch {batch}"]), justify="right", no_wrap=True)
    profiles = [results[name][batch] for name, batch in columns]

    def row(heading: str, members: list[str]) -> None:
        cells = []
        for profile in profiles:
            entries = [profile["owners"][m] for m in members if m in profile["owners"]]
            spent = sum(e["us"] for e in entries)
            share = sum(e["share"] for e in entries)
            cells.append(f"{spent:.0f} {share:5.1%}" if entries else "")
        owners.add_row(heading, *cells)

    for owner in OWNERS:
        if any(owner in profile["owners"] for profile in profiles):
            row(owner, [owner])
    row("flexquant, not linear", [o for o in OWNERS if o.startswith(OURS)])
    owners.add_row("step", *(f"{p['clocked_us']:.0f}  100%" for p in profiles))
    owners.add_row("step without the clock", *(f"{p['plain_us']:.0f}      " for p in profiles))
    found = [owners]
    for (name, batch), profile in zip(columns, profiles, strict=True):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.title = f"{CONFIGURATIONS[name].label}, batch {batch}: operators, slowed by the trace"
        for heading in ("owner", "operator"):
            table.add_column(heading, no_wrap=True, max_width=50)
        for heading in ("µs per step", "calls"):
            table.add_column(heading, justify="right", no_wrap=True)
        for entry in profile["operators"][:SHOWN_OPERATORS]:
            numbers = (f"{entry['us']:.0f}", f"{entry['calls']:g}")
            table.add_row(entry["owner"], entry["operator"], *numbers)
        found.append(table)
    return found


def main() -> None:
    """Profile, print and write."""
    parser = argparse.ArgumentParser(description="Where the time of one decode step goes.")
    parser.add_argument("--model", help="unquantized checkpoint folder (default: the demo's model)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, MAX_ROWS])
    parser.add_argument("--tokens", type=int, default=96, help="steps of each profile")
    parser.add_argument(
        "--configurations",
        nargs="+",
        choices=CONFIGURATIONS,
        metavar="NAME",
        default=["flexquant-4", "bf16"],
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "decode-step.json")
    options = parser.parse_args()
    if min(options.batches) < 1 or max(options.batches) > MAX_ROWS:
        parser.error(f"--batches: {options.batches} are not all from 1 to {MAX_ROWS}")
    console = Console()
    try:
        model = options.model or str(get_model())
    except ModelError as error:
        raise SystemExit(str(error)) from None
    from transformers import AutoTokenizer

    facts = provenance(model, TEXT)
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = TEXT.read_text(encoding="utf-8")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    prompts = [tokens[i * PROMPT : (i + 1) * PROMPT] for i in range(MAX_ROWS)]
    results: dict[str, dict[str, Any]] = {name: {} for name in options.configurations}
    with tempfile.TemporaryDirectory(prefix="flexquant-bench-") as temporary:
        folder = Path(temporary)
        specs = engine_specs(model, options.configurations, folder, compiled=False)
        console.print(f"engines: {', '.join(specs)}")
        try:
            with running(list(specs.values()), folder) as engines:
                engine_facts = {name: engine.facts for name, engine in engines.items()}
                for batch in options.batches:
                    for name in options.configurations:
                        configuration = CONFIGURATIONS[name]
                        results[name][str(batch)] = engines[configuration.engine].ask(
                            "profile",
                            prompts=prompts[:batch],
                            tokens=options.tokens,
                            trace_tokens=TRACE_TOKENS,
                            change=configuration.change,
                        )
        except EngineError as error:
            raise SystemExit(str(error)) from None
    settings = {"prompt_tokens": PROMPT, "tokens": options.tokens, "trace_tokens": TRACE_TOKENS}
    content = {"settings": settings, "owners": OWNERS, "engines": engine_facts, "steps": results}
    write_json(options.out, content, facts)
    written = io.StringIO()
    paper = Console(file=written, width=120)
    for table in tables(results):
        console.print(table)
        paper.print(table)
    beside = options.out.with_suffix(".txt")
    lines = [line.rstrip() for line in written.getvalue().splitlines()]
    beside.write_text("\n".join(lines).strip() + "\n", encoding="utf-8")
    console.print(f"written to {options.out}, {beside}", soft_wrap=True)


if __name__ == "__main__":
    main()
