# SPDX-License-Identifier: Apache-2.0
"""What policies cost and save in time, on a calibrated checkpoint, in one engine.

    python -m benchmarks.serving.policies --checkpoint FOLDER [--batches 1 4 16] [--rounds N]

Four parts. *Steps*: policies and static levels take turns, round by round; times are ratios to
static 8 bit of the same round, and their medians. `budget at 8 bit` runs the same widths as static
8 bit with all of the machinery; *owners* says what that takes of a step, by the clock of
`owners.py`. *Classes*: what it costs that the strictest request rules the step. *Load*: requests
come and go under policy load, asked for 0.7 of a busy step at all bits, and for what lies half way
to the cheapest level's; step by step, the time, the rows and the bits. KL of the same policies and
levels: `benchmarks.quality.budget`; `policies_plot` puts both in one picture.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import provenance, write_json
from benchmarks.quality.budget import ASKED, LEVEL_KL, OTHERS, nearest_level
from benchmarks.quality.sequences import TEXT
from benchmarks.serving import owners
from benchmarks.serving.configurations import dtype_of
from benchmarks.serving.engine import ENVIRON, FRESH, MAX_ROWS, Engine, EngineSpec
from benchmarks.serving.run import PROMPT, RESULTS
from vllm_flexquant.planner import ladder
from vllm_flexquant.requests.accounts import class_accounts

BASE = "static 8 bit"
MACHINERY = "budget at 8 bit"


def budget(signal: str, asked: float, **more: Any) -> dict[str, Any]:
    """Options of policy budget."""
    return {"policy": "budget", "min_bits": 2, "signal": signal, "budget": asked} | more


def policies_of(kl_nats: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Options by name, as `benchmarks.quality.budget` names them, for a ladder of these KL."""
    levels = sorted({nearest_level(kl_nats, kl) for kl in LEVEL_KL})
    return {
        BASE: {"policy": "static", "width": 8},
        **{f"level {n}": {"policy": "manual", "level": n} for n in levels},
        MACHINERY: budget("probe", 0.03, min_bits=8),
        **{f"{s} {asked}": budget(s, asked) for s in ("probe", "none") for asked in ASKED},
        **{name: {"min_bits": 2} | changes for name, changes in OTHERS.items()},
    }


SHARE_BOUND = 0.015
"""Of a decode step, what the machinery may take at most."""

LOAD_TARGET = 0.7
"""Of a full step of all rows, what policy load is asked for."""

CALM, BUSY = 60, 200
"""Steps of one request before the load and after it, and tokens of each request in it."""

TRACED = 12
CLASS_BUDGET = 0.02
"""Of class `balanced`, nats per token."""


def measure_steps(
    engine: Engine,
    policies: Mapping[str, dict[str, Any]],
    prompts: Sequence[Sequence[int]],
    rounds: int,
    tokens: int,
    console: Console,
) -> dict[str, Any]:
    """Median seconds of a decode step by policy, each round in another order."""
    found: dict[str, list[float]] = {name: [] for name in policies}
    bits = {name: mean_bits(engine, prompts, options, tokens) for name, options in policies.items()}
    for number in range(rounds):
        order = list(policies)
        random.Random(number).shuffle(order)
        for name in order:
            use(engine, policies[name])
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


def use(engine: Engine, options: dict[str, Any]) -> None:
    """Take up a policy, with an account of its own and without a target."""
    engine.set_policy(FRESH)
    engine.set_policy(options)


def mean_bits(
    engine: Engine, prompts: Sequence[Sequence[int]], options: dict[str, Any], tokens: int
) -> float:
    """Mean over decode steps, in a pass that is not timed."""
    use(engine, options)
    found = [bits_now(engine) for _ in engine.steps(prompts, tokens)]
    return sum(found[1:]) / len(found[1:])


def bits_now(engine: Engine) -> float:
    """Mean bits of the step that ran last."""
    table = planner(engine).table
    return ladder.mean_bits(table.layers, table.widths.tolist())


def planner(engine: Engine) -> Any:
    """Of the engine's worker, which is in this process."""
    return engine.runner.vllm_config.quant_config.planner


def measure_classes(
    engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """What it costs that the strictest request rules the step: classes alone and side by side.

    Each entry has the requests of each class, the mean bits and the median seconds of a decode
    step, and what each class was booked per token.
    """
    count = len(prompts)
    mixes = [
        {"fast": count},
        {"balanced": count},
        {"exact": count},
        {"fast": count // 2, "balanced": count - count // 2},
        {"fast": count - 1, "exact": 1},
    ]
    found: list[dict[str, Any]] = [{"requests": mix, "step_seconds": []} for mix in mixes]
    for number in range(rounds):
        order = list(range(len(mixes)))
        random.Random(number).shuffle(order)
        for index in order:
            use(engine, budget("probe", CLASS_BUDGET))
            wanted = [name for name, n in mixes[index].items() for _ in range(n)]
            seconds, bits = run_classes(engine, prompts, wanted, tokens)
            options = planner(engine).options
            accounts = planner(engine).ledger.view(class_accounts(options.classes))["classes"]
            found[index]["step_seconds"].append(median(seconds))
            found[index] |= {
                "mean_bits": sum(bits) / len(bits),
                "booked_nats": {name: accounts[name]["booked_nats"] for name in mixes[index]},
            }
    return found


def run_classes(
    engine: Engine, prompts: Sequence[Sequence[int]], classes: Sequence[str], tokens: int
) -> tuple[list[float], list[float]]:
    """Seconds and mean bits of the decode steps of requests of these classes."""
    from vllm import SamplingParams, TokensPrompt

    inner = engine.llm.llm_engine
    for i, (prompt, name) in enumerate(zip(prompts, classes, strict=True)):
        params = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={"flexquant_class": name},
        )
        inner.add_request(f"class {i}", TokensPrompt(prompt_token_ids=list(prompt)), params)
    seconds, bits = [], []
    while inner.has_unfinished_requests():
        began = time.perf_counter()
        inner.step()
        if not any(planner(engine).batch.prompt):
            seconds.append(time.perf_counter() - began)
            bits.append(bits_now(engine))
    return seconds, bits


def measure_load(engine: Engine, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """One request, then all, then one again: at all bits, at the cheapest level, and under policy
    load, asked for 0.7 of what a busy step takes at all bits and for half way to the cheapest."""
    pinned = {
        name: run_load(engine, prompts, options)
        for name, options in (
            (BASE, {"policy": "static", "width": 8}),
            ("level 0", {"policy": "manual", "level": 0}),
        )
    }
    full, least = (median(s["seconds"] for s in busy(steps)) for steps in pinned.values())
    found = []
    for share in (LOAD_TARGET, (1 + least / full) / 2):
        target = share * full
        options = {"policy": "load", "target_ms": 1e3 * target, "min_bits": 2}
        steps = run_load(engine, prompts, options)
        found.append(
            {"target_seconds": target, "target_over_full": share, "full_seconds": full}
            | kept(steps, target)
            | {"steps": steps}
        )
    return {
        "full_seconds": full,
        "cheapest_over_full": least / full,
        # of the pinned run, whose steps nothing decides: how many miss a bound by noise alone
        "cheapest_kept": [kept(pinned["level 0"], f["target_seconds"]) for f in found],
        "runs": found,
    }


def run_load(
    engine: Engine, prompts: Sequence[Sequence[int]], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """The engine steps: seconds, rows, whether prompts were among them, mean bits."""
    from vllm import SamplingParams, TokensPrompt

    use(engine, options)
    inner = engine.llm.llm_engine
    steps: list[dict[str, Any]] = []

    def add(name: str, tokens: int, prompt: Sequence[int]) -> None:
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        inner.add_request(name, TokensPrompt(prompt_token_ids=list(prompt)), params)

    add("first", 2 * CALM + BUSY, prompts[0])
    while inner.has_unfinished_requests():
        if len(steps) == CALM:
            for i, prompt in enumerate(prompts[1:]):
                add(f"load {i}", BUSY, prompt)
        began = time.perf_counter()
        inner.step()
        ended = time.perf_counter()
        batch = planner(engine).batch
        steps.append(
            {
                "seconds": ended - began,
                "rows": len(batch.slots),
                "prompt": any(batch.prompt),
                "mean_bits": bits_now(engine),
            }
        )
    return steps


def busy(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Decode steps of all requests."""
    most = max(step["rows"] for step in steps)
    return [step for step in steps if step["rows"] == most and not step["prompt"]]


def kept(steps: Sequence[dict[str, Any]], target: float) -> dict[str, Any]:
    """How a target was kept under load, and when all bits were back after it."""
    chosen, spent = busy(steps), 0.0
    after_a_second = []
    for step in chosen:
        if spent >= 1.0:
            after_a_second.append(step)
        spent += step["seconds"]
    last = max(i for i, step in enumerate(steps) if step["rows"] == chosen[0]["rows"])
    back, seconds = None, 0.0
    for step in steps[last + 1 :]:
        seconds += step["seconds"]
        if step["mean_bits"] == 8:
            back = seconds
            break
    return {
        "kept_after_a_second": sum(s["seconds"] <= target for s in after_a_second)
        / max(len(after_a_second), 1),
        "bits_under_load": sum(s["mean_bits"] for s in chosen) / len(chosen),
        "seconds_until_all_bits": back,
    }


def show(results: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    table = Table(box=box.SIMPLE_HEAD, title="time of a decode step over static 8 bit")
    table.add_column("policy")
    for batch in results["steps"]:
        table.add_column(f"batch {batch}", justify="right")
        table.add_column("bits", justify="right")
    for name in results["policies"]:
        cells = []
        for found in results["steps"].values():
            cells += [f"{found[name]['time_over_8_bit']:.3f}", f"{found[name]['mean_bits']:.2f}"]
        table.add_row(name, *cells)
    console.print(table)
    for batch, found in results["owners"].items():
        share = found["machinery_share"]
        verdict = "met" if share <= SHARE_BOUND else "NOT MET"
        console.print(f"machinery at batch {batch}: {share:.2%} of a step ({verdict})")
    exact = next(e for e in results["classes"] if list(e["requests"]) == ["exact"])
    for entry in results["classes"]:
        mix = ", ".join(f"{n} {name}" for name, n in entry["requests"].items())
        booked = ", ".join(f"{name} {kl:.4f}" for name, kl in entry["booked_nats"].items())
        ratio = median(
            own / other
            for own, other in zip(entry["step_seconds"], exact["step_seconds"], strict=True)
        )
        console.print(
            f"{mix}: {entry['mean_bits']:.2f} bits, {ratio:.2f} of exact, booked {booked}"
        )
    found = results["load"]
    console.print(
        f"load: the cheapest level takes {found['cheapest_over_full']:.2f} of a full step"
    )
    for load, cheapest in zip(found["runs"], found["cheapest_kept"], strict=True):
        back = load["seconds_until_all_bits"]
        console.print(
            f"load, {load['target_over_full']:.2f} of a full step asked: "
            f"{load['kept_after_a_second']:.0%} of steps within the target after a second "
            f"(pinned at the cheapest level {cheapest['kept_after_a_second']:.0%}), "
            f"{load['bits_under_load']:.2f} bits, all bits again after "
            f"{'the end' if back is None else f'{back:.2f} s'}"
        )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="What policies cost and save in time.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="calibrated checkpoint")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, MAX_ROWS])
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
    engine = Engine(EngineSpec("flexquant", str(options.checkpoint), dtype_of("flexquant")))
    ladder_kl = planner(engine).model.ladder.kl_nats
    if ladder_kl is None:
        raise SystemExit(f"{options.checkpoint} is not calibrated; quantize with calibration")
    policies = policies_of(ladder_kl)
    steps, shares = {}, {}
    for batch in options.batches:
        steps[str(batch)] = measure_steps(
            engine, policies, prompts[:batch], options.rounds, options.tokens, console
        )
        use(engine, policies["probe 0.03"])
        found = owners.profile(engine, prompts[:batch], options.tokens, TRACED)
        found["machinery_share"] = sum(
            entry["share"]
            for name, entry in found["owners"].items()
            if name.startswith(owners.OURS)
        )
        shares[str(batch)] = found
    widest = str(max(options.batches))
    classes = measure_classes(
        engine, prompts[: int(widest)], options.tokens, max(options.rounds // 2, 1)
    )
    load = measure_load(engine, prompts[: int(widest)])
    results = {
        "settings": {"prompt_tokens": PROMPT, "tokens": options.tokens, "rounds": options.rounds},
        "engine": engine.facts(),
        "policies": policies,
        "steps": steps,
        "owners": shares,
        "share_bound": SHARE_BOUND,
        "classes": classes,
        "load": load,
    }
    write_json(options.out, results, facts)
    show(results, console)
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
