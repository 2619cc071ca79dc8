# SPDX-License-Identifier: Apache-2.0
"""What policies cost and save in time, on a calibrated checkpoint, in one engine.

    python -m benchmarks.serving.policies --checkpoint FOLDER [--batches 1 16] [--rounds N]

Three parts. *Steps*: policies and static widths take turns, round by round; times are ratios to
static 8 bit of the same round, and their medians. `budget at 8 bit` runs the same widths as static
8 bit with all of the machinery; *owners* says what that takes of a step, by the clock of
`owners.py`. *Load*: requests come and go under policy load; step by step, the time, the rows and
the bits. KL of the same policies and levels: `benchmarks.quality.budget`.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import provenance, write_json
from benchmarks.quality.sequences import TEXT
from benchmarks.serving import owners
from benchmarks.serving.engine import ENVIRON, MAX_ROWS, Engine, EngineSpec
from benchmarks.serving.run import PROMPT, RESULTS
from vllm_flexquant.runtime import ladder

BASE = "static 8 bit"
MACHINERY = "budget at 8 bit"
POLICIES: dict[str, dict[str, Any]] = {
    BASE: {"policy": "static", "width": 8},
    "static 6 bit": {"policy": "static", "width": 6},
    "static 4 bit": {"policy": "static", "width": 4},
    MACHINERY: {"policy": "budget", "min_bits": 8, "budget": 0.03},
    "budget 0.01": {"policy": "budget", "min_bits": 2, "budget": 0.01},
    "budget 0.03": {"policy": "budget", "min_bits": 2, "budget": 0.03},
    "budget 0.1": {"policy": "budget", "min_bits": 2, "budget": 0.1},
    "budget 0.03, no signal": {
        "policy": "budget",
        "min_bits": 2,
        "budget": 0.03,
        "signal": "none",
    },
}
SHARE_BOUND = 0.015
"""Of a decode step, what the machinery may take at most."""

LOAD_TARGET = 0.7
"""Of a full step of all rows, what policy load is asked for."""

CALM, BUSY = 60, 200
"""Steps of one request before the load and after it, and tokens of each request in it."""

TRACED = 12


def measure_steps(
    engine: Engine, prompts: Sequence[Sequence[int]], rounds: int, tokens: int, console: Console
) -> dict[str, Any]:
    """Median seconds of a decode step by policy, each round in another order."""
    found: dict[str, list[float]] = {name: [] for name in POLICIES}
    bits = {name: mean_bits(engine, prompts, name, tokens) for name in POLICIES}
    for number in range(rounds):
        order = list(POLICIES)
        random.Random(number).shuffle(order)
        for name in order:
            use(engine, name)
            list(engine.steps(prompts, 4))
            found[name].append(median(list(engine.steps(prompts, tokens))[1:]))
        console.print(f"  batch {len(prompts)}: round {number + 1} of {rounds}")
    return {
        name: {
            "mean_bits": bits[name],
            "ratios": [own / base for own, base in zip(times, found[BASE], strict=True)],
            "time_over_8_bit": median(
                own / base for own, base in zip(times, found[BASE], strict=True)
            ),
            "step_seconds": times,
        }
        for name, times in found.items()
    }


def use(engine: Engine, name: str) -> None:
    """Take up a policy, with an account of its own."""
    engine.set_policy({"policy": "budget", "budget": 1.0, "signal": "probe"})
    engine.set_policy(POLICIES[name])


def mean_bits(engine: Engine, prompts: Sequence[Sequence[int]], name: str, tokens: int) -> float:
    """Mean over decode steps, in a pass that is not timed."""
    use(engine, name)
    found = [bits_now(engine) for _ in engine.steps(prompts, tokens)]
    return sum(found[1:]) / len(found[1:])


def bits_now(engine: Engine) -> float:
    """Mean bits of the step that ran last."""
    table = controller(engine).table
    return ladder.mean_bits(table.layers, table.widths.tolist())


def controller(engine: Engine) -> Any:
    """Of the engine's worker, which is in this process."""
    return engine.runner.vllm_config.quant_config.controller


def measure_load(engine: Engine, prompts: Sequence[Sequence[int]], full: float) -> dict[str, Any]:
    """One request, then all, then one again, under policy load."""
    from vllm import SamplingParams, TokensPrompt

    target = LOAD_TARGET * full
    engine.set_policy({"policy": "load", "target_ms": 1e3 * target, "min_bits": 2})
    inner = engine.llm.llm_engine
    steps: list[dict[str, Any]] = []

    def add(name: str, tokens: int, prompt: Sequence[int]) -> None:
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        inner.add_request(f"{name}", TokensPrompt(prompt_token_ids=list(prompt)), params)

    add("first", 2 * CALM + BUSY, prompts[0])
    while inner.has_unfinished_requests():
        if len(steps) == CALM:
            for i, prompt in enumerate(prompts[1:]):
                add(f"load {i}", BUSY, prompt)
        began = time.perf_counter()
        inner.step()
        ended = time.perf_counter()
        batch = controller(engine).batch
        steps.append(
            {
                "seconds": ended - began,
                "rows": len(batch.slots),
                "prompt": any(batch.prompt),
                "mean_bits": bits_now(engine),
            }
        )
    busy = [s for s in steps if s["rows"] == len(prompts) and not s["prompt"]]
    after_a_second, spent = [], 0.0
    for step in busy:
        if spent >= 1.0:
            after_a_second.append(step)
        spent += step["seconds"]
    last_busy = max((i for i, s in enumerate(steps) if s["rows"] == len(prompts)), default=0)
    back, seconds = None, 0.0
    for step in steps[last_busy + 1 :]:
        seconds += step["seconds"]
        if step["mean_bits"] == 8:
            back = seconds
            break
    return {
        "target_seconds": target,
        "full_seconds": full,
        "cheapest_over_full": None,
        "steps": steps,
        "kept_after_a_second": sum(s["seconds"] <= target for s in after_a_second)
        / max(len(after_a_second), 1),
        "bits_under_load": sum(s["mean_bits"] for s in busy) / max(len(busy), 1),
        "seconds_until_all_bits": back,
    }


def show(results: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    table = Table(box=box.SIMPLE_HEAD, title="time of a decode step over static 8 bit")
    table.add_column("policy")
    for batch in results["steps"]:
        table.add_column(f"batch {batch}", justify="right")
        table.add_column("bits", justify="right")
    for name in POLICIES:
        cells = []
        for found in results["steps"].values():
            cells += [f"{found[name]['time_over_8_bit']:.3f}", f"{found[name]['mean_bits']:.2f}"]
        table.add_row(name, *cells)
    console.print(table)
    for batch, found in results["owners"].items():
        share = found["machinery_share"]
        verdict = "met" if share <= SHARE_BOUND else "NOT MET"
        console.print(f"machinery at batch {batch}: {share:.2%} of a step ({verdict})")
    load = results["load"]
    console.print(
        f"load: {load['kept_after_a_second']:.0%} of steps within the target after a second, "
        f"{load['bits_under_load']:.2f} bits, all bits again after "
        f"{load['seconds_until_all_bits']} s"
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="What policies cost and save in time.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="calibrated checkpoint")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, MAX_ROWS])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS / "policies-cpu.json")
    options = parser.parse_args()
    os.environ |= ENVIRON
    facts = provenance(str(options.checkpoint), TEXT)
    console = Console()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    text = TEXT.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    prompts = [ids[i * PROMPT : (i + 1) * PROMPT] for i in range(MAX_ROWS)]
    engine = Engine(EngineSpec("flexquant", str(options.checkpoint), "bfloat16"))
    steps, shares = {}, {}
    for batch in options.batches:
        steps[str(batch)] = measure_steps(
            engine, prompts[:batch], options.rounds, options.tokens, console
        )
        use(engine, "budget 0.03")
        found = owners.profile(engine, prompts[:batch], options.tokens, TRACED)
        found["machinery_share"] = sum(
            entry["share"]
            for name, entry in found["owners"].items()
            if name.startswith(owners.OURS)
        )
        shares[str(batch)] = found
    widest = str(max(options.batches))
    base = steps[widest]
    load = measure_load(engine, prompts[: int(widest)], median(base[BASE]["step_seconds"]))
    load["cheapest_over_full"] = base["static 4 bit"]["time_over_8_bit"]
    results = {
        "settings": {"prompt_tokens": PROMPT, "tokens": options.tokens, "rounds": options.rounds},
        "engine": engine.facts(),
        "policies": POLICIES,
        "steps": steps,
        "owners": shares,
        "share_bound": SHARE_BOUND,
        "load": load,
    }
    write_json(options.out, results, facts)
    show(results, console)
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
