# SPDX-License-Identifier: Apache-2.0
"""Tasks at each precision, while the real engine decodes, against the same engine in fp32.

    python -m benchmarks.quality.tasks [--model FOLDER] [--calibrated FOLDER] [--execute]
        [--tasks hellaswag truthfulqa gsm8k humaneval] [--limit N] [--quick] [--out FILE]

HellaSwag and TruthfulQA: the answer of the highest log-likelihood, by its sum and by the sum over
the answer's bytes. Answers are teacher-forced token by token, so that their likelihoods come out of
decode steps (flexquant takes in prompts at all bits). GSM8K: the last number of a greedy answer;
also how many answers are the reference's, word for word. HumanEval: pass@1, greedy; model-written
programs are executed, so only with `--execute`.

Subsets of 100 items and decode steps: the figures are not those that lm-eval gives for the whole
sets. Shares have 95 % intervals (Wilson), and a paired test against the reference on the same items
(exact McNemar). Engines run one after another; nothing is timed.
"""

from __future__ import annotations

import argparse
import itertools
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import ROOT, provenance, write_json
from benchmarks.quality import task_data
from benchmarks.quality.humaneval import STOP, passes
from benchmarks.quality.sequences import TokenSequence, read_records, save_sequences
from benchmarks.quality.statistics import mcnemar, wilson
from benchmarks.quality.task_data import Choice, TaskError
from benchmarks.serving.configurations import (
    CALIBRATED_ENGINE,
    CONFIGURATIONS,
    Configuration,
    engine_specs,
)
from benchmarks.serving.process import EngineError, EngineProcess, reason, running
from demo.get_model import ModelError, get_model

REFERENCE = "fp32"
CHOICES = ("hellaswag", "truthfulqa")
TASKS = (*CHOICES, "gsm8k", "humaneval")
LIMITS = {"hellaswag": 40, "truthfulqa": 40, "gsm8k": 16, "humaneval": 32}
QUICK = {"hellaswag": 12}
ROWS = 32
ANSWER, PROGRAM = 96, 128
"""Tokens of an answer to GSM8K and of a program, at most."""

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def sequences_of(task: str, questions: Sequence[Choice], tokenizer: Any) -> list[TokenSequence]:
    """One for each answer; what comes out of the prompt's step is the last token of the context."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    first = list(tokenizer("")["input_ids"])
    found = []
    for i, question in enumerate(questions):
        context = first + ids(question.context)
        for j, answer in enumerate(question.answers):
            forced = [context[-1], *ids(answer)]
            found.append(TokenSequence(f"{task}-{i}-{j}", context[:-1], forced))
    return found


def chosen(
    task: str, questions: Sequence[Choice], records: Mapping[tuple[str, int], dict[str, Any]]
) -> dict[str, list[bool]]:
    """Whether the likeliest answer of each question is right, by sum and over its bytes."""
    nll: dict[str, float] = defaultdict(float)
    for (name, position), record in records.items():
        if position:
            nll[name] += record["nll"]
    by_sum, by_bytes = [], []
    for i, question in enumerate(questions):
        values = [nll[f"{task}-{i}-{j}"] for j in range(len(question.answers))]
        lengths = [len(answer.strip().encode()) for answer in question.answers]
        over = [value / length for value, length in zip(values, lengths, strict=True)]
        by_sum.append(values.index(min(values)) == question.right)
        by_bytes.append(over.index(min(over)) == question.right)
    return {"accuracy": by_sum, "accuracy_by_bytes": by_bytes}


def last_number(text: str) -> str | None:
    """The last number of an answer, without commas; None where there is none."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "").rstrip(".") if found else None


def prompt_of(tokenizer: Any, text: str, start: str = "") -> list[int]:
    """What a user asked, as the model's template has it, and the beginning of an answer."""
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text + start, add_special_tokens=False)["input_ids"])
    return list(tokenizer(f"{text}\n{start}")["input_ids"])


class Runner:
    """Asks one engine after another the same questions."""

    def __init__(self, tokenizer: Any, limits: Mapping[str, int], folder: Path) -> None:
        self.tokenizer, self.limits, self.folder = tokenizer, limits, folder
        self.texts: dict[str, list[str]] = {}

    def run(
        self, task: str, engine: EngineProcess, configuration: Configuration
    ) -> dict[str, list[bool]]:
        """Right or not, item by item, by each measure of the task."""
        if task in CHOICES:
            return self._choices(task, engine, configuration)
        return {"gsm8k": self._gsm8k, "humaneval": self._humaneval}[task](engine, configuration)

    def _choices(
        self, task: str, engine: EngineProcess, configuration: Configuration
    ) -> dict[str, list[bool]]:
        questions = task_data.choices(task)[: self.limits[task]]
        file, records = self.folder / f"{task}.json", self.folder / "records.jsonl"
        save_sequences(file, sequences_of(task, questions, self.tokenizer))
        run = f"{task} {configuration.name}"
        engine.ask(
            "force",
            run=run,
            sequences=str(file),
            reference="",
            record=str(records),
            rows=ROWS,
            change=configuration.change,
        )
        return chosen(task, questions, read_records(records, run))

    def _texts(
        self,
        task: str,
        prompts: list[list[int]],
        tokens: int,
        stop: list[str],
        engine: EngineProcess,
        configuration: Configuration,
    ) -> list[str]:
        answer = engine.ask(
            "generate", prompts=prompts, tokens=tokens, stop=stop, change=configuration.change
        )
        if configuration.name == REFERENCE:
            self.texts[task] = answer["texts"]
        return list(answer["texts"])

    def _gsm8k(self, engine: EngineProcess, configuration: Configuration) -> dict[str, list[bool]]:
        items = task_data.items("gsm8k")[: self.limits["gsm8k"]]
        prompts = [prompt_of(self.tokenizer, item["prompt"]) for item in items]
        texts = self._texts("gsm8k", prompts, ANSWER, [], engine, configuration)
        numbers = map(last_number, texts)
        found = {"accuracy": [n == i["expected"] for n, i in zip(numbers, items, strict=True)]}
        reference = self.texts.get("gsm8k")
        if reference:
            found["as_reference"] = [a == b for a, b in zip(texts, reference, strict=True)]
        return found

    def _humaneval(
        self, engine: EngineProcess, configuration: Configuration
    ) -> dict[str, list[bool]]:
        problems = task_data.items("humaneval")[: self.limits["humaneval"]]
        prompts = [list(self.tokenizer(p["prompt"].strip())["input_ids"]) for p in problems]
        texts = self._texts("humaneval", prompts, PROGRAM, STOP, engine, configuration)
        stripped = [p | {"prompt": p["prompt"].strip()} for p in problems]
        return {"pass_at_1": [passes(p, t) for p, t in zip(stripped, texts, strict=True)]}


def evaluate(
    right: Mapping[str, Mapping[str, Mapping[str, Sequence[bool]]]],
) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Shares with intervals, and p against the reference on the same items.

    Args:
        right: by task, configuration and measure, item by item.
    """
    results: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for task, configurations in right.items():
        results[task] = {}
        for name, measures in configurations.items():
            entry = {}
            for measure, items in measures.items():
                found: dict[str, Any] = {
                    "right": sum(items),
                    "items": len(items),
                    "share": sum(items) / len(items),
                    "interval": wilson(sum(items), len(items)),
                }
                reference = configurations.get(REFERENCE, {}).get(measure)
                if reference is not None and name != REFERENCE and measure != "as_reference":
                    pairs = list(zip(items, reference, strict=True))
                    found["gained"] = sum(a and not b for a, b in pairs)
                    found["lost"] = sum(b and not a for a, b in pairs)
                    found["p"] = mcnemar(reference, items)
                entry[measure] = found
            results[task][name] = entry
    return results


def configurations_of(calibrated: bool, quick: bool) -> list[Configuration]:
    """The reference first."""
    names = [REFERENCE, "w8a8", "w4a16"]
    if calibrated:
        names += ["calibrated-8", "calibrated-6", "calibrated-4", "budget-0.03"]
    else:
        names += ["flexquant-8", "flexquant-4"]
    found = [CONFIGURATIONS[name] for name in names]
    if calibrated:
        change = {"policy": "progressive"}
        label = "flexquant progressive"
        found.append(Configuration("progressive", label, CALIBRATED_ENGINE, change=change))
    if quick:
        wanted = (REFERENCE, "w8a8", "calibrated-4", "flexquant-4")
        found = [c for c in found if c.name in wanted]
    return found


def show(results: Mapping[str, Any], labels: Mapping[str, str], console: Console) -> None:
    """Print a line for each configuration."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    columns = [
        (task, measure)
        for task, entries in results.items()
        for measure in dict.fromkeys(m for entry in entries.values() for m in entry)
    ]
    for task, measure in columns:
        table.add_column(f"{task} {measure}", justify="right")
    for name, label in labels.items():
        cells = [label]
        for task, measure in columns:
            found = results[task].get(name, {}).get(measure)
            p = "" if not found or "p" not in found else f" p={found['p']:.2f}"
            cells.append(f"{found['share']:.1%}{p}" if found else "")
        table.add_row(*cells)
    console.print(table)


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Tasks while the engine decodes.")
    parser.add_argument("--model", help="unquantized checkpoint folder (default: the demo's model)")
    parser.add_argument("--calibrated", type=Path, help="calibrated checkpoint of it")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--limit", type=int, help="items of each task")
    parser.add_argument("--execute", action="store_true", help="run model-written programs")
    parser.add_argument("--quick", action="store_true", help="few items of one task")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out" / "tasks.json")
    options = parser.parse_args(arguments)
    options.limits = dict(QUICK if options.quick else LIMITS)
    if options.tasks:
        options.limits = {task: options.limits.get(task, LIMITS[task]) for task in options.tasks}
    if options.limit is not None:
        if options.limit < 1:
            parser.error(f"--limit: {options.limit} is not above 0")
        options.limits = dict.fromkeys(options.limits, options.limit)
    return options


def main() -> None:
    """Measure, print and write."""
    options = read_options()
    console = Console()
    from transformers import AutoTokenizer

    unavailable: dict[str, str] = {}
    limits = dict(options.limits)
    if not options.execute and limits.pop("humaneval", None):
        unavailable["humaneval"] = "runs model-written programs; --execute allows it"
    try:
        model = options.model or str(get_model())
        packages = task_data.sources(list(limits))
    except (ModelError, TaskError) as error:
        raise SystemExit(str(error)) from None
    facts = provenance(model) | {"packages": packages}
    configurations = configurations_of(options.calibrated is not None, options.quick)
    right: dict[str, dict[str, dict[str, list[bool]]]] = {task: {} for task in limits}
    with tempfile.TemporaryDirectory(prefix="flexquant-bench-") as temporary:
        folder = Path(temporary)
        runner = Runner(AutoTokenizer.from_pretrained(model), limits, folder)
        names = [c.name for c in configurations if c.name != "progressive"]
        specs = engine_specs(model, names, folder, False, options.calibrated, unavailable)
        for name, spec in specs.items():
            own = [c for c in configurations if c.engine == name]
            try:
                with running([spec], folder) as engines:
                    for configuration, task in itertools.product(own, limits):
                        found = runner.run(task, engines[name], configuration)
                        right[task][configuration.name] = found
                        shares = ", ".join(f"{m} {sum(v)} of {len(v)}" for m, v in found.items())
                        console.print(f"  {configuration.label}, {task}: {shares}")
            except EngineError as error:
                unavailable[name] = reason(str(error))
                console.print(f"  without {name}: {unavailable[name]}", highlight=False)
    results = evaluate(right)
    labels = {c.name: c.label for c in configurations}
    settings = {"limits": limits, "rows": ROWS, "reference": REFERENCE}
    settings |= {"answer_tokens": ANSWER, "program_tokens": PROGRAM}
    content = {"settings": settings, "unavailable": unavailable, "labels": labels}
    write_json(options.out, content | {"tasks": results}, facts)
    show(results, labels, console)
    console.print(f"written to {options.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
