# SPDX-License-Identifier: Apache-2.0
"""The parts of `benchmarks.serving.speculation` that measure: acceptance, gates, load."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.serving.drafts import add_up, evenly, shares
from benchmarks.serving.engine import MAX_ROWS
from benchmarks.serving.kinds import Prompt, of_round
from benchmarks.serving.speculating import PLAIN, Crowd, Run, SpeculatingEngine
from benchmarks.serving.summary import spread
from vllm_flexquant.speculation.gate import expected_speedup

ENTROPIES = (0.5, 1.0, 2.0)
"""Thresholds of gate entropy, nats."""

LEVELS, MOST_BITS = 3, 6.0
"""Levels to draft at, evenly spaced in bits up to here."""

PLAIN_EVERY = 4
"""Runs with drafts between two plain ones."""

WARM_TOKENS = 32
"""What a gate learns from: its first choice between steps with drafts and plain ones takes 12."""

CROWDS = (1, 4, MAX_ROWS, 1)
"""Requests at a time, phase after phase."""

SEEDS = 1000
"""Between those of two rounds."""

Say = Callable[[str], None]


def gates_of(most: int) -> dict[str, dict[str, Any]]:
    """Options by name."""
    longest = {"speculate": most}
    return {
        **{
            f"fixed {n}": {"speculate": n, "draft_gate": "fixed"}
            for n in sorted({1, 2, 3, most})
            if n <= most
        },
        **{
            f"entropy {nats}": longest | {"draft_gate": "entropy", "draft_entropy": nats}
            for nats in ENTROPIES
        },
        "gain": longest | {"draft_gate": "gain"},
    }


def drafts_of(
    engine: SpeculatingEngine, levels: Sequence[int] | None, widths: Sequence[int] | None
) -> dict[str, dict[str, Any]]:
    """Levels and widths to draft at, as options by name; by default some of the ladder, and the
    widths that no level stands for."""
    bits = engine.planner.model.ladder.mean_bits
    if levels is None:
        usual = engine.usual["draft_level"]
        levels = sorted({*evenly(bits, LEVELS, MOST_BITS), *(() if usual is None else (usual,))})
    if widths is None:
        found = [set(engine.planner.state.rungs[n].tolist()) for n in levels]
        uniform = {min(of_layers) for of_layers in found if len(of_layers) == 1}
        widths = [w for w in engine.planner.options.layout.widths[:-1] if w not in uniform]
    return {f"level {n}": {"draft_level": n} for n in levels} | {
        f"width {w}": {"draft_width": w} for w in widths
    }


def measure_acceptance(
    engine: SpeculatingEngine,
    drafts: Mapping[str, dict[str, Any]],
    prompts: Mapping[str, Sequence[Prompt]],
    temperatures: Sequence[float],
    rounds: int,
    tokens: int,
    say: Say,
) -> list[dict[str, Any]]:
    """One request at a time, each draft as long as it may be: a plain run and one with drafts."""
    cells = [(name, kind, t) for name in drafts for kind in prompts for t in temperatures]
    pairs: dict[Any, list[tuple[Run, Run]]] = {cell: [] for cell in cells}
    bits = {}
    for number in range(rounds):
        order = list(cells)
        random.Random(number).shuffle(order)
        for cell in order:
            name, kind, temperature = cell
            fixed = drafts[name] | {"speculate": engine.most, "draft_gate": "fixed"}
            given = of_round(prompts[kind], number, 1)
            learned = f"acceptance {cell}"
            found = [
                engine.run(options, given, tokens, temperature, SEEDS * number, learned)
                for options in (drafts[name] | PLAIN, fixed)
            ]
            bits[name] = engine.speculation.mean_bits
            pairs[cell].append((found[0], found[1]))
        say(f"  acceptance: round {number + 1} of {rounds}")
    return [
        {"draft": name, "mean_bits": bits[name], "kind": kind, "temperature": temperature}
        | accepted(pairs[name, kind, temperature], engine.most)
        for name, kind, temperature in cells
    ]


def accepted(pairs: Sequence[tuple[Run, Run]], most: int) -> dict[str, Any]:
    """What plain runs and those with drafts of a fixed length say of the drafts."""
    counts = add_up([drafted.counts for _, drafted in pairs])
    costs = [drafted.cost for _, drafted in pairs if drafted.cost and drafted.cost["step_seconds"]]
    found, draft, row, expected = shares(counts), None, None, None
    if costs:
        draft, row = (
            median(cost[name] / cost["step_seconds"] for cost in costs)
            for name in ("draft_seconds", "row_seconds")
        )
        expected = expected_speedup(found["chance"], most, draft, row)
    return found | {
        "length": most,
        "drafted": counts["drafted"],
        "kept": counts["kept"],
        "draft_over_step": draft,
        "row_over_step": row,
        "expected_speedup": expected,
        "speed_over_plain": spread([drafted.rate / plain.rate for plain, drafted in pairs]),
        "tokens_per_second": median(drafted.rate for _, drafted in pairs),
    }


def measure_gates(
    engine: SpeculatingEngine,
    gates: Mapping[str, dict[str, Any]],
    prompts: Sequence[Prompt],
    batch: int,
    temperature: float,
    rounds: int,
    tokens: int,
) -> dict[str, Any]:
    """By gate: speed over the plain runs of the same round, and what was drafted."""
    for name in gates:
        engine.forget(name)
    warm, seed = of_round(prompts, rounds, batch), SEEDS * rounds
    for name in [n for n in gates if gates[n]["draft_gate"] != "fixed"]:
        engine.run(gates[name], warm, WARM_TOKENS, temperature, seed, name)
    runs: dict[str, list[Run]] = {name: [] for name in gates}
    plain: list[list[Run]] = []
    for number in range(rounds):
        given = of_round(prompts, number, batch)
        order = list(gates)
        random.Random(number).shuffle(order)
        own = []
        for index, name in enumerate(order):
            if index % PLAIN_EVERY == 0:
                own.append(engine.run(PLAIN, given, tokens, temperature, SEEDS * number, "plain"))
            runs[name].append(
                engine.run(gates[name], given, tokens, temperature, SEEDS * number, name)
            )
        plain.append([*own, engine.run(PLAIN, given, tokens, temperature, SEEDS * number, "plain")])
    base = [median(run.rate for run in found) for found in plain]
    return {
        "plain_tokens_per_second": spread(base),
        "plain_spread": spread(
            [run.rate / b for found, b in zip(plain, base, strict=True) for run in found]
        ),
        "gates": {
            name: {
                "speed_over_plain": spread(
                    [run.rate / b for run, b in zip(found, base, strict=True)]
                )
            }
            | shares(add_up([run.counts for run in found]))
            for name, found in runs.items()
        },
        "gain_cost": runs["gain"][-1].cost,
    }


def measure_load(
    engine: SpeculatingEngine, prompts: Sequence[Prompt], rounds: int, tokens: int, say: Say
) -> list[dict[str, Any]]:
    """Phases of more and fewer requests, greedy, with gate gain and plain: by phase, as a gate."""
    gain = gates_of(engine.most)["gain"]
    engine.forget("load")
    run_load(engine, gain, prompts, 0, tokens, "load")
    pairs = []
    for number in range(rounds):
        plain = run_load(engine, PLAIN, prompts, number, tokens, "plain")
        pairs.append((plain, run_load(engine, gain, prompts, number, tokens, "load")))
        say(f"  load: round {number + 1} of {rounds}")
    phases = []
    for index, requests in enumerate(CROWDS):
        both = [(plain[index], drafted[index]) for plain, drafted in pairs]
        phases.append(
            {
                "requests": requests,
                "speed_over_plain": spread([d.rate / p.rate for p, d in both]),
                "tokens_per_second": median(d.rate for _, d in both),
            }
            | shares(add_up([d.counts for _, d in both]))
        )
    return phases


def run_load(
    engine: SpeculatingEngine,
    options: dict[str, Any],
    prompts: Sequence[Prompt],
    number: int,
    tokens: int,
    learned: str,
) -> list[Run]:
    """The phases, one request running through them all."""
    engine.use(options, learned)
    crowd, found = Crowd(), []
    given = of_round(prompts, number, max(CROWDS))
    room = (tokens + 2) * (engine.most + 1)
    first = engine.add(crowd, given[0], len(CROWDS) * room, 0.0, 0)
    for requests in CROWDS:
        others = [engine.add(crowd, ids, room, 0.0, 0) for ids in given[1:requests]]
        found.append(engine.timed(crowd, requests * tokens))
        if others:
            engine.end(crowd, others)
    engine.end(crowd, [first])
    return found
