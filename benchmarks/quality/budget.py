# SPDX-License-Identifier: Apache-2.0
"""What policy budget spends of what it is asked to, and what it saves over a static level.

    python -m benchmarks.quality.budget --model FOLDER --checkpoint FOLDER
        --text prose=FILE --text code=FILE --text chat=FILE.jsonl [--rows 1 4 16]

One vLLM engine decodes the same teacher-forced text at levels of the ladder and under policies, at
each number of sequences at a time, policy budget by several signals. KL is to the unquantized
checkpoint (for the demo's model, the dequantized GGUF), measured in the engine at every step.

*Change of text*: the texts one after another, twice as long, under one account; what is spent in
the first 1,000 tokens of each, and in those after them.

A policy is compared with a static level of the same mean bits, and of the same KL, both between the
levels that were measured (log KL taken for linear in bits). Tail: 99th percentile of KL, and how
often the first choice is another one where the reference gives its own at least 0.9.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import trace
from benchmarks.provenance import write_json
from benchmarks.quality.calibrated import RESULTS
from benchmarks.quality.engine import TRACE_STEPS, compute_references, decode, start_engine
from benchmarks.quality.probe import bits_at
from benchmarks.quality.sequences import (
    FIRST_SCORED,
    TokenSequence,
    mean_and_error,
    read_records,
    scored,
    summarise,
)
from benchmarks.quality.texts import add_options, facts_of, text_files
from vllm_flexquant.quantize.calibration import cut_tokens, load_tokenizer, read_text

PROMPT, FORCED = 16, 112
LEVEL_KL = (0.15, 0.07, 0.045, 0.03, 0.0175, 0.0105, 0.0045, 0.0015)
"""Static levels measured: those whose calibrated KL is nearest."""

ASKED = (0.01, 0.03, 0.1)
OTHERS: dict[str, dict[str, Any]] = {
    "entropy": {"policy": "entropy"},
    "progressive": {"policy": "progressive"},
}
"""Policies that promise nothing."""

CHANGE_ASKED, SETTLED = 0.03, 1000
"""Budget across a change of text, and tokens after which it is to be met again."""

SIGNALS = ("probe", "none", "entropy", "both")
WITHIN = 0.15
SURE = 0.9


def sequences_of(file: Path, tokenizer: Any, count: int, name: str) -> list[TokenSequence]:
    """`count` sequences out of a text or of dialogues, evenly spaced."""
    found = cut_tokens(read_text(str(file)), tokenizer, count, PROMPT + FORCED).fit[:count]
    return [
        TokenSequence(f"{name}-{i}", row[:PROMPT], row[PROMPT:])
        for i, row in enumerate(found.tolist())
    ]


def nearest_level(ladder: Sequence[float], kl: float) -> int:
    """The level whose calibrated KL is nearest to `kl`, by their ratio."""
    return min(range(len(ladder)), key=lambda i: abs(math.log(ladder[i] / kl)))


def kl_at(bits: float, static: Sequence[tuple[float, float]]) -> float:
    """KL of a static level of so many mean bits, between (bits, KL) ascending in bits."""
    for (below, low), (above, high) in itertools.pairwise(static):
        if below <= bits <= above:
            share = (bits - below) / (above - below)
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return math.nan


def tail(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """99th percentile of KL, and the share of other first choices where the reference is sure."""
    kl = sorted(r["kl"] for r in records)
    sure = [r for r in records if r["reference_top"] >= SURE]
    return {
        "kl_99": kl[round(0.99 * (len(kl) - 1))],
        "flips_where_sure": sum(not r["top1"] for r in sure) / max(len(sure), 1),
        "sure": len(sure),
    }


class Measured:
    """An engine, the texts that it decodes, and what comes of it."""

    def __init__(
        self, llm: Any, folder: Path, texts: dict[str, list[TokenSequence]], console: Console
    ) -> None:
        self.llm, self.folder, self.texts, self.console = llm, folder, texts, console

    def call(self, method: str, *arguments: Any) -> Any:
        return self.llm.collective_rpc(method, args=arguments)[-1]

    def adopt(self, changes: dict[str, Any]) -> None:
        """Take up a policy, with an account of its own."""
        for change in ({"policy": "budget", "budget": 1.0}, changes):
            if reason := self.call("flexquant_change", change):
                raise SystemExit(f"the engine refused {change}: {reason}")

    def change_of_text(self, everything: Sequence[TokenSequence], rows: int) -> dict[str, Any]:
        """Decode all texts under one account; spent over asked of each, at first and later on."""
        self.adopt({"policy": "budget", "signal": "probe", "budget": CHANGE_ASKED})
        name = f"change of text {rows}"
        seconds = decode(self.llm, name, everything, rows)
        # a record is written by each step: they lie in the order in which tokens were decoded
        records = list(read_records(self.folder / "records.jsonl", name).values())
        found: dict[str, dict[str, Any]] = {}
        for text in self.texts:
            own = [r for r in records if r["id"].rpartition("-")[0] == text]
            kl = [r["kl"] for r in own if r["position"] >= FIRST_SCORED]
            parts = {"first": kl[:SETTLED], "later": kl[SETTLED:]}
            found[text] = {"first_tokens": SETTLED, "later_tokens": len(parts["later"])}
            for part, values in parts.items():
                mean, error = mean_and_error(values)
                found[text][f"{part}_over_asked"] = mean / CHANGE_ASKED
                found[text][f"{part}_standard_error"] = error / CHANGE_ASKED
            found[text]["within"] = abs(found[text]["later_over_asked"] - 1) <= WITHIN
        self.console.print(f"  change of text, {rows} at a time ({seconds:.0f} s)")
        return {"asked_nats": CHANGE_ASKED, "texts": found}

    def run(self, changes: dict[str, Any], name: str, text: str, rows: int) -> dict[str, Any]:
        """Decode one text under a policy."""
        self.adopt(changes)
        self.call("flexquant_records", True)
        sequences = self.texts[text]
        if rows == 1:
            sequences = sequences[: -(-len(sequences) // 2)]  # one at a time takes long
        seconds = decode(self.llm, f"{name} {text} {rows}", sequences, rows)
        steps, status = self.call("flexquant_records", True), self.call("flexquant_snapshot", True)
        if len(steps) >= TRACE_STEPS:
            raise SystemExit(f"more than {TRACE_STEPS} steps; use fewer --sequences")
        records = read_records(self.folder / "records.jsonl", f"{name} {text} {rows}")
        kept = scored(records, sequences)
        summary = summarise(kept) | tail(kept)
        figures = trace.summarise(status["layers"], steps)
        account = status["budget"]["classes"]["balanced"]
        self.console.print(
            f"  {text}, {rows} at a time, {name}: KL {summary['kl']:.4f} at "
            f"{figures['mean_bits']:.2f} bits ({seconds:.0f} s)"
        )
        return {
            "summary": summary,
            "steps": figures,
            "booked_nats": account["booked_nats"],
            "correction": account["correction"],
        }


def compare(static: Sequence[dict[str, Any]], result: dict[str, Any]) -> None:
    """Add to a policy's result what a static level would have cost or needed."""
    points = sorted((s["steps"]["mean_bits"], s["summary"]["kl"]) for s in static)
    kl, bits = result["summary"]["kl"], result["steps"]["mean_bits"]
    result["static_level"] = {
        "kl_at_equal_bits": kl_at(bits, points),
        "kl_over_it": kl / kl_at(bits, points),
        "bits_saved_at_equal_kl": bits_at(kl, points) - bits,
    }


def measure(
    measured: Measured, status: dict[str, Any], rows: int, signals: Sequence[str]
) -> dict[str, Any]:
    """Every text at static levels and under budgets, `rows` sequences at a time."""
    ladder = status["ladder"]["kl_nats"]
    levels = [nearest_level(ladder, kl) for kl in LEVEL_KL]
    found: dict[str, Any] = {}
    for text in measured.texts:
        static = [
            measured.run({"policy": "manual", "level": n}, f"level {n}", text, rows) | {"level": n}
            for n in sorted(set(levels))
        ]
        eight = measured.run({"policy": "static", "width": 8}, "static 8 bit", text, rows)
        others = {name: measured.run(changes, name, text, rows) for name, changes in OTHERS.items()}
        for result in others.values():
            compare(static, result)
        policies = []
        for signal in signals:
            for asked in ASKED:
                changes = {"policy": "budget", "signal": signal, "budget": asked}
                result = measured.run(changes, f"{signal} {asked}", text, rows)
                ratio = result["summary"]["kl"] / asked
                result |= {
                    "signal": signal,
                    "asked_nats": asked,
                    "spent_over_asked": ratio,
                    "within": abs(ratio - 1) <= WITHIN,
                    "not_above": ratio <= 1 + WITHIN,
                }
                compare(static, result)
                policies.append(result)
        found[text] = {"static": static, "8 bit": eight, "others": others, "policies": policies}
    return found


def show(results: dict[str, Any], console: Console) -> None:
    """Print a line per policy."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in (
        "text",
        "rows",
        "signal",
        "asked",
        "spent",
        "ratio",
        "bits",
        "saved",
        "KL/level",
    ):
        table.add_column(heading, justify="left" if heading == "text" else "right")
    for rows, texts in results.items():
        for text, entry in texts.items():
            for result in entry["policies"]:
                level = result["static_level"]
                table.add_row(
                    text,
                    rows,
                    result["signal"],
                    f"{result['asked_nats']:g}",
                    f"{result['summary']['kl']:.4f}",
                    f"{result['spent_over_asked']:.2f}{'' if result['within'] else ' !'}",
                    f"{result['steps']['mean_bits']:.2f}",
                    f"{level['bits_saved_at_equal_kl']:+.2f}",
                    f"{level['kl_over_it']:.2f}",
                )
    console.print(table)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Asked and spent, in the engine.")
    add_options(parser)
    parser.add_argument("--sequences", type=int, default=16, help=f"of {FORCED} tokens each")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=SIGNALS)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--out", type=Path, default=RESULTS / "budget.json")
    options = parser.parse_args()
    files = text_files(options.text)
    facts = facts_of(options.model, files)
    tokenizer, console = load_tokenizer(options.model), Console()
    long = {n: sequences_of(f, tokenizer, 2 * options.sequences, n) for n, f in files.items()}
    texts = {name: sequences[::2] for name, sequences in long.items()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        everything = [sequence for part in long.values() for sequence in part]
        compute_references(str(options.model), everything, folder, [8], "float32")
        llm = start_engine(str(options.checkpoint), folder, options.dtype, max(options.rows))
        measured = Measured(llm, folder, texts, console)
        status = measured.call("flexquant_snapshot", True)
        results = {
            str(rows): measure(measured, status, rows, options.signals) for rows in options.rows
        }
        changes = {
            str(rows): measured.change_of_text(everything, rows)
            for rows in sorted({min(options.rows), max(options.rows)})
        }
    facts |= {
        "probe": status["budget"]["probe"],
        "best_nats": status["budget"]["best_nats"],
        "kernels": sorted({layer["kernel"] for layer in status["layers"]}),
        "dtype": options.dtype,
        "checkpoint": json.loads((options.checkpoint / "flexquant.json").read_text())["files"],
    }
    found = {"within": WITHIN, "sure": SURE, "rows": results, "change_of_text": changes}
    write_json(options.out, found, facts)
    show(results, console)
    for rows, change in changes.items():
        for text, part in change["texts"].items():
            console.print(
                f"change to {text}, {rows} at a time: {part['first_over_asked']:.2f} of what is "
                f"asked in the first {SETTLED} tokens, then {part['later_over_asked']:.2f} ± "
                f"{part['later_standard_error']:.2f}"
            )
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
