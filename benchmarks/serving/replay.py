# SPDX-License-Identifier: Apache-2.0
"""Requests that arrive as in a trace, against `vllm serve`: latencies, and KL meanwhile.

    python -m benchmarks.serving.replay [--model FOLDER] [--calibrated FOLDER] [--trace FILE]
        [--text FILE] [--seconds N] [--rounds N] [--quick] [--out FILE]

Arrival times and lengths come from a file (`replay_trace.py` says of which form); without one a
trace is made up, and the results say so. Lengths are divided to fit the machine; times are
stretched so that what arrives is a share of the machine's *capacity*, the tokens per second at
static 8 bit while 16 requests are under way. Loads: `steady`, 0.7 of it; `burst`, the same but for
a stretch of 3 times capacity. Requests are sent at their times, whatever the server does, and a run
ends when the last one is answered, so that percentiles are of all of them.

Every request decodes a given text (teacher-forced), so that answers have the trace's lengths and
one token of eight can be compared with the unquantized model while the server is under load. All
configurations get the same requests at the same times, on servers that take turns. The targets are
stated once: the time per token that static 8 bit has at capacity, and three times its time to the
first token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.request import urlopen

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import ROOT, hash_file, machine, provenance, write_json
from benchmarks.quality import teacher_forcing
from benchmarks.quality.engine import compute_references
from benchmarks.quality.sequences import TEXT, TokenSequence, summarise
from benchmarks.quality.statistics import percentile
from benchmarks.serving import servers
from benchmarks.serving.configurations import (
    CALIBRATED_ENGINE,
    CONFIGURATIONS,
    FLEX_ENGINE,
    Configuration,
    engine_specs,
    unquantized,
)
from benchmarks.serving.replay_client import (
    SAMPLE,
    Outcome,
    Planned,
    bits_along,
    bits_of,
    replay,
    series,
    steady_speed,
)
from benchmarks.serving.replay_client import summary as summary_of
from benchmarks.serving.replay_trace import (
    ANSWERS,
    PROMPTS,
    SHORTER,
    Arrival,
    Stretch,
    like_some,
    made_trace,
    read_trace,
    shorter,
    spread_over,
    work,
)
from demo.get_model import ModelError, get_model
from demo.server import ServerError, VllmServer

STEADY, BURST = 0.7, 3.0
"""Shares of capacity."""

TOGETHER = 16
"""Requests at a time while capacity is measured."""

NAMES = 64
"""Of each text, for the requests that decode it."""

STAND_INS = 24
"""Texts that serve all requests."""

PATIENT = 3.0
"""The target of the time to the first token is so many times that at capacity."""

CAPACITY_REQUESTS = 48
QUICKLY_LEFT_OUT = ("w8a8", "w4a16", "budget-0.03", "calibrated-4", "flexquant-4")
MADE_REQUESTS = 4000
COUNTERS = {"steps": "decode_steps", "bits": "decode_step_bits"}

Reading = tuple[float, dict[str, float]]
"""Seconds from the start of a run, and the server's counters then."""


def loads(seconds: float) -> dict[str, list[Stretch]]:
    """The loads, by name; the burst is so short that the rest of the run has room for it."""
    burst = seconds * 0.08
    rest = seconds - burst
    return {
        "steady": [Stretch(seconds, STEADY)],
        "burst": [Stretch(0.3 * rest, STEADY), Stretch(burst, BURST), Stretch(0.7 * rest, STEADY)],
    }


def texts_of(stand_ins: Sequence[Arrival], tokens: Sequence[int]) -> list[TokenSequence]:
    """A text for each: prompt and answer one after the other, from evenly spaced places."""
    sequences = []
    for i, arrival in enumerate(stand_ins):
        length = arrival.prompt + arrival.answer
        start = i * max(len(tokens) - length, 0) // max(len(stand_ins) - 1, 1)
        part = list(tokens[start : start + length])
        if len(part) < length:
            raise ValueError(f"a text of {len(tokens)} tokens is shorter than a request's {length}")
        sequences.append(TokenSequence(f"r{i}", part[: arrival.prompt], part[arrival.prompt :]))
    return sequences


def name_requests(index: Path, texts: Sequence[TokenSequence], count: int) -> None:
    """Let the reference know each text by the names of the requests that decode it.

    Which tokens of a request are compared differs by its name: so many requests of one text have
    other ones compared.
    """
    content = json.loads(index.read_text(encoding="utf-8"))
    spans = content["sequences"]
    for text in texts:
        spans |= {f"{text.id}.{n}": spans[text.id] for n in range(count)}
    index.write_text(json.dumps(content), encoding="utf-8")


def plan_of(
    arrivals: Sequence[Arrival],
    nearest: Sequence[int],
    texts: Sequence[TokenSequence],
    stretches: Sequence[Stretch],
    capacity: float,
) -> list[Planned]:
    """As many requests as the stretches have work for at `capacity` tokens per second, each with a
    name of its own (`name_requests`)."""
    wanted, total, chosen = work(stretches) * capacity, 0, []
    for place in nearest:
        if total >= wanted:
            break
        chosen.append(texts[place])
        total += len(chosen[-1].forced)
    offsets = [arrival.seconds for arrival in arrivals[: len(chosen)]]
    times = spread_over(offsets, [len(text.forced) for text in chosen], stretches)
    return [
        Planned(seconds, replace(text, id=f"{text.id}.{i % NAMES}"))
        for i, (seconds, text) in enumerate(zip(times, chosen, strict=True))
    ]


def offer(
    plan: Sequence[Planned], stretches: Sequence[Stretch], capacity: float
) -> list[dict[str, float]]:
    """What is asked for in each stretch: requests, tokens of prompts and answers, and those of the
    answers per second as a share of capacity."""
    found, start = [], 0.0
    for number, stretch in enumerate(stretches):
        end = math.inf if number == len(stretches) - 1 else start + stretch.seconds
        own = [p.sequence for p in plan if start <= p.seconds < end]
        answers = sum(len(s.forced) for s in own)
        found.append(
            {
                "requests": len(own),
                "prompt_tokens": sum(len(s.prompt) for s in own),
                "answer_tokens": answers,
                "share": answers / stretch.seconds / capacity,
            }
        )
        start = end
    return found


def counters(server: VllmServer) -> dict[str, float]:
    """Sums of decode steps and their bits, from /metrics; zeros where the server has none."""
    with urlopen(f"{server.url}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found = {}
    for name, metric in COUNTERS.items():
        values = re.findall(rf"^vllm:flexquant_{metric}_total\S* (\S+)$", text, re.MULTILINE)
        found[name] = sum(map(float, values))
    return found


def run(
    server: VllmServer,
    configuration: Configuration,
    plan: Sequence[Planned],
    name: str,
    together: int | None = None,
) -> tuple[list[Outcome], list[Reading]]:
    """Replay a plan; what came of each request, and the server's counters meanwhile."""
    with servers.awake(server):
        servers.use(server, configuration)
        with watched(server) as readings:
            outcomes = asyncio.run(replay(server.url, plan, name, together))
        return outcomes, readings


@contextmanager
def watched(server: VllmServer) -> Iterator[list[Reading]]:
    """The counters of a server each second, as seconds from now and values."""
    readings = [(0.0, counters(server))]
    start, ended = time.monotonic(), threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            with suppress(OSError):  # too busy to answer: the next reading tells
                readings.append((time.monotonic() - start, counters(server)))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield readings
    finally:
        ended.set()
        watcher.join()
    readings.append((time.monotonic() - start, counters(server)))


def configurations_of(calibrated: bool, target_ms: float) -> list[Configuration]:
    """What is compared: static choices, and policies of one flexquant server; those with a target
    may run prompts at less than all bits."""
    engine = CALIBRATED_ENGINE if calibrated else FLEX_ENGINE
    stock = (unquantized(machine()["flags"]), "w8a8", "w4a16")
    found = [CONFIGURATIONS[name] for name in stock]
    found += [CONFIGURATIONS[f"{engine}-{width}"] for width in (8, 4)]
    free = {"target_ms": None, "prefill": "full"}
    kept = {"target_ms": target_ms, "prefill": "policy"}
    found = [c if c.change is None else _also(c, free) for c in found]
    if calibrated:
        budget = CONFIGURATIONS["budget-0.03"]
        found.append(_also(budget, free))
        label = f"{budget.label}, load"
        change = (budget.change or {}) | kept
        found.append(Configuration("budget-load", label, engine, change=change))
    else:
        change = {"policy": "entropy"} | free
        found.append(Configuration("entropy", "flexquant entropy", engine, change=change))
    change = {"policy": "load"} | kept
    found.append(Configuration("load", "flexquant load", engine, change=change))
    return found


def _also(configuration: Configuration, change: Mapping[str, Any]) -> Configuration:
    merged = dict(change) | (configuration.change or {})
    return Configuration(**asdict(configuration) | {"change": merged})


def measure_capacity(
    server: VllmServer,
    static: Configuration,
    nearest: Sequence[int],
    texts: Sequence[TokenSequence],
    console: Console,
) -> dict[str, float]:
    """Tokens per second and median seconds per token at static 8 bit, `TOGETHER` at a time."""
    plan = [Planned(0.0, texts[i]) for i in nearest[:CAPACITY_REQUESTS]]
    run(server, static, plan[:4], "warm", TOGETHER)
    outcomes, _ = run(server, static, plan, "capacity", TOGETHER)
    found = summary_of(outcomes, math.inf, math.inf)
    speed = steady_speed(outcomes)
    console.print(
        f"  capacity: {speed:.1f} tokens/s, {1e3 * found['token_seconds']['p50']:.0f} ms per token"
    )
    return {
        "tokens_per_second": speed,
        "token_seconds": found["token_seconds"]["p50"],
        "first_token_seconds": found["first_token_seconds"]["p50"],
    }


def records_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """All records of a run, less those of tokens that came out of a prompt's step.

    Several requests may decode one text, each at the widths of its own steps: all of them count.
    """
    with (folder / "records.jsonl").open(encoding="utf-8") as lines:
        return [r for r in map(json.loads, lines) if r["run"] == name and r["position"]]


def quality_of(folder: Path, name: str) -> dict[str, Any]:
    """Of the sampled tokens of a run."""
    records = records_of(folder, name)
    return summarise(records) | {"kl_99": percentile([r["kl"] for r in records], 0.99)}


def merge(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over rounds of what a run's summary holds; counts are added up."""
    first = rounds[0]
    merged: dict[str, Any] = {}
    for key, value in first.items():
        values = [entry[key] for entry in rounds]
        if isinstance(value, dict):
            merged[key] = merge(values)
        elif key in ("requests", "failed", "tokens"):
            merged[key] = sum(values)
        elif isinstance(value, (int, float)):
            merged[key] = fmean(values)
        elif value is None:
            merged[key] = None
        else:
            merged[key] = sorted({item for items in values for item in items})
    return merged


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print a table for each load."""
    for load, found in results["loads"].items():
        table = Table(box=box.SIMPLE_HEAD, title=load, title_justify="left")
        table.add_column("", no_wrap=True)
        for heading in ("tokens/s", "first p95", "token p95", "all p90", "within", "bits", "KL"):
            table.add_column(heading, justify="right")
        for entry in found.values():
            bits, quality = entry["mean_bits"], entry["quality"]
            table.add_row(
                entry["label"],
                f"{entry['tokens_per_second']:.0f}",
                f"{entry['first_token_seconds']['p95']:.2f}",
                f"{entry['token_seconds']['p95']:.3f}",
                f"{entry['request_seconds']['p90']:.2f}",
                f"{entry['within_targets']:.0%}",
                "" if bits is None else f"{bits:.2f}",
                f"{quality['kl']:.4f}",
            )
        console.print(table)


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Replay a trace against vllm serve.")
    parser.add_argument("--model", help="unquantized checkpoint folder (default: the demo's model)")
    parser.add_argument("--calibrated", type=Path, help="calibrated checkpoint of it")
    parser.add_argument("--trace", type=Path, help="arrival times and lengths (default: made up)")
    parser.add_argument("--text", type=Path, default=TEXT, help="what is decoded")
    parser.add_argument("--seconds", type=float, help="of each run")
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--quick", action="store_true", help="one round of the burst, fewer systems"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out" / "replay.json")
    options = parser.parse_args(arguments)
    options.seconds = options.seconds or (16.0 if options.quick else 26.0)
    options.rounds = options.rounds or (1 if options.quick else 2)
    return options


def prepare(
    options: argparse.Namespace, model: str, folder: Path
) -> tuple[list[Arrival], list[int], list[TokenSequence], dict[str, Any]]:
    """Requests of the trace, the text of each, all texts with their reference; and facts of it."""
    from transformers import AutoTokenizer

    whole = read_trace(options.trace) if options.trace else made_trace(MADE_REQUESTS)
    arrivals = [shorter(arrival) for arrival in whole[:MADE_REQUESTS]]
    stand_ins, nearest = like_some(arrivals, STAND_INS)
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = options.text.read_text(encoding="utf-8")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    texts = texts_of(stand_ins, tokens)
    compute_references(model, texts, folder, [], "float32")
    name_requests(folder / "reference.json", texts, NAMES)
    facts: dict[str, Any] = {
        "made_up": options.trace is None,
        "requests": len(whole),
        "divided_by": SHORTER,
        "clipped": {"prompt": PROMPTS, "answer": ANSWERS},
        "stand_ins": len(stand_ins),
        "means": {
            "trace": [fmean(a.prompt for a in whole), fmean(a.answer for a in whole)],
            "replayed": [
                fmean(len(texts[i].prompt) for i in nearest),
                fmean(len(texts[i].forced) for i in nearest),
            ],
        },
    }
    if options.trace:
        facts |= {"name": options.trace.name, "sha256": hash_file(options.trace)}
    return arrivals, nearest, texts, facts


def main() -> None:
    """Measure, print and write."""
    options = read_options()
    console = Console()
    servers.end_with_servers()
    try:
        model = options.model or str(get_model())
        facts = provenance(model, options.text)
        with tempfile.TemporaryDirectory(prefix="flexquant-bench-") as temporary:
            results = measure(options, model, Path(temporary), console)
    except (ModelError, ServerError, ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    write_json(options.out, results, facts)
    show(results, console)
    console.print(f"written to {options.out}", soft_wrap=True)


def measure(
    options: argparse.Namespace, model: str, folder: Path, console: Console
) -> dict[str, Any]:
    """The results as they are written."""
    arrivals, nearest, texts, trace = prepare(options, model, folder)
    calibrated = options.calibrated is not None
    engine = CALIBRATED_ENGINE if calibrated else FLEX_ENGINE
    names = [unquantized(machine()["flags"]), "w8a8", "w4a16", f"{engine}-8"]
    if options.quick:
        names = [name for name in names if name not in QUICKLY_LEFT_OUT]
    unavailable: dict[str, str] = {}
    specs = engine_specs(model, names, folder, False, options.calibrated, unavailable)
    environ = {
        teacher_forcing.REFERENCE: str(folder / "reference.npy"),
        teacher_forcing.RECORD: str(folder / "records.jsonl"),
    }
    arguments = ("--logits-processors", teacher_forcing.NAME)
    console.print(f"servers: {', '.join(specs)}")
    with servers.serving(list(specs.values()), folder, arguments, environ, unavailable) as running:
        if engine not in running:
            raise ServerError(f"flexquant does not start: {unavailable[engine]}")
        static = _also(CONFIGURATIONS[f"{engine}-8"], {"target_ms": None})
        warm = [Planned(0.0, text) for text in texts[:4]]
        for name in [name for name in running if name != engine]:
            outcomes, _ = run(running[name], CONFIGURATIONS[name], warm, "warm", TOGETHER)
            if failed := [o.error for o in outcomes if not o.done]:
                unavailable[name] = f"its first requests failed: {failed[0]}"
                running.pop(name).stop()
        for name, reason in unavailable.items():
            console.print(f"  without {name}: {reason}", highlight=False)
        capacity = measure_capacity(running[engine], static, nearest, texts, console)
        target = capacity["token_seconds"]
        first_target = PATIENT * capacity["first_token_seconds"]
        compared = [c for c in configurations_of(calibrated, 1e3 * target) if c.engine in running]
        if options.quick:
            compared = [c for c in compared if c.name not in QUICKLY_LEFT_OUT]
        found: dict[str, Any] = {}
        offered: dict[str, Any] = {}
        for load, stretches in loads(options.seconds).items():
            if options.quick and load != "burst":
                continue
            plan = plan_of(arrivals, nearest, texts, stretches, capacity["tokens_per_second"])
            offered[load] = offer(plan, stretches, capacity["tokens_per_second"])
            console.print(f"{load}: {len(plan)} requests in {options.seconds:g} s")
            rounds: dict[str, list[dict[str, Any]]] = {c.name: [] for c in compared}
            lines: dict[str, Any] = {}
            for number in range(options.rounds):
                order = list(compared)
                random.Random(f"{load} {number}").shuffle(order)
                for configuration in order:
                    key = f"{load} {configuration.name} {number}"
                    outcomes, readings = run(
                        running[configuration.engine], configuration, plan, key
                    )
                    running[configuration.engine].check()
                    entry = summary_of(outcomes, first_target, target)
                    entry["quality"] = quality_of(folder, key)
                    entry["mean_bits"] = bits_of(readings[0][1], readings[-1][1])
                    rounds[configuration.name].append(entry)
                    lines[configuration.name] = series(outcomes) | {"bits": bits_along(readings)}
                    console.print(
                        f"  {configuration.label}: {entry['within_targets']:.0%} within targets, "
                        f"KL {entry['quality']['kl']:.4f}",
                        highlight=False,
                    )
            found[load] = {
                c.name: {"label": c.label} | merge(rounds[c.name]) | {"series": lines[c.name]}
                for c in compared
            }
    return {
        "settings": {
            "seconds": options.seconds,
            "rounds": options.rounds,
            "compared_token_of": SAMPLE,
            "targets": {"first_token_seconds": first_target, "token_seconds": target},
            "loads": {n: [asdict(s) for s in v] for n, v in loads(options.seconds).items()},
        },
        "trace": trace,
        "capacity": capacity,
        "offered": offered,
        "unavailable": unavailable,
        "loads": found,
    }


if __name__ == "__main__":
    main()
