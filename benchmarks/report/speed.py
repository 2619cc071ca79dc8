# SPDX-License-Identifier: Apache-2.0
"""Of the stage `speed`: every system beside every other, and who wins at equal quality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from typing import Any

from benchmarks.report.figures import family
from benchmarks.report.text import listing, nats, paragraphs, percent, ratio, table
from benchmarks.serving.configurations import unquantized
from benchmarks.serving.summary import over

CLOSE = 1.05
"""KL up to so many times another counts as no more than it."""

PROMPT = "prompt"
"""Stands for the speed of taking in a prompt where others stand for a number of requests."""

DUELS = (
    "The fastest flexquant configuration whose KL is no more than the static choice's (up to 5 %), "
    "over the speed of the static choice: above 1 flexquant is faster at no less quality. *None so "
    "close*: every flexquant configuration has more KL."
)


@dataclass(frozen=True)
class Duel:
    """A static choice against the fastest flexquant configuration of no more KL.

    ratio: its speed over the static choice's; None where every flexquant configuration has more KL.
    nearest: the same of the flexquant configuration of least KL.
    """

    static: str
    batch: str
    static_kl: float
    flexquant: str | None
    flexquant_kl: float | None
    ratio: float | None
    nearest: float


def base_of(results: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The configuration that speeds are multiples of: what one would serve unquantized there."""
    name = unquantized(facts["machine"]["flags"])
    return name if name in results["configurations"] else "bf16"


def speed_over(
    configurations: Mapping[str, Any], name: str, batch: str, base: str
) -> dict[str, Any] | None:
    """Spread of a configuration's speed over the base's; None where it was not measured."""
    return over(configurations[name], configurations[base], None if batch == PROMPT else batch)


def is_flexquant(name: str) -> bool:
    """Whether a configuration is ours."""
    return family(name).startswith("flexquant")


def duels(configurations: Mapping[str, Any], batch: str, base: str) -> list[Duel]:
    """Each static choice against ours at no more KL, in the order of the configurations."""
    ours = {
        name: (entry["quality"]["kl"], speed["median"])
        for name, entry in configurations.items()
        if is_flexquant(name) and (speed := speed_over(configurations, name, batch, base))
    }
    found = []
    for name, entry in configurations.items():
        speed = speed_over(configurations, name, batch, base)
        if is_flexquant(name) or speed is None:
            continue
        kl = entry["quality"]["kl"]
        able = {n: v for n, v in ours.items() if v[0] <= CLOSE * kl}
        best = max(able, key=lambda n: able[n][1]) if able else None
        found.append(
            Duel(
                entry["label"],
                batch,
                kl,
                configurations[best]["label"] if best else None,
                able[best][0] if best else None,
                able[best][1] / speed["median"] if best else None,
                min(ours.values())[1] / speed["median"],
            )
        )
    return found


def batches_of(results: Mapping[str, Any]) -> list[str]:
    """Numbers of requests that were measured, and `PROMPT`."""
    some = next(iter(results["configurations"].values()))
    return [*some["decode_tokens_per_second"], PROMPT]


def heading(batch: str) -> str:
    """Of a column."""
    if batch == PROMPT:
        return "prompt of 256"
    return f"{batch} request{'' if batch == '1' else 's'}"


def main_table(results: Mapping[str, Any], base: str) -> str:
    """A line for each configuration."""
    configurations = results["configurations"]
    batches = batches_of(results)
    rows = []
    for name, entry in configurations.items():
        quality = entry["quality"]
        bits = entry["decode_tokens_per_second"].get("1", {}).get("mean_bits")
        stored = entry["stored_bytes"]
        rows.append(
            [
                entry["label"],
                "–" if bits is None else f"{bits:.2f}",
                "–" if stored is None else f"{stored / 1e6:.0f}",
                nats(quality["kl"], quality["kl_standard_error"]),
                percent(quality["top1"]),
                f"{exp(quality['nll']):.2f}",
                *(ratio(speed_over(configurations, name, batch, base)) for batch in batches),
            ]
        )
    headings = ["", "mean bits", "MB stored", "KL", "top-1", "perplexity", *map(heading, batches)]
    return table(headings, rows)


def duel_table(results: Mapping[str, Any], base: str) -> str:
    """At equal quality: a line for each static choice, a column for each number of requests."""
    batches = batches_of(results)
    by_batch = {batch: duels(results["configurations"], batch, base) for batch in batches}
    rows = []
    for place, first in enumerate(by_batch[batches[0]]):
        cells = [first.static, nats(first.static_kl)]
        for batch in batches:
            duel = by_batch[batch][place]
            cells.append(
                "none so close"
                if duel.ratio is None
                else f"**{duel.ratio:.2f}** {duel.flexquant}"
                if duel.ratio > 1
                else f"{duel.ratio:.2f} {duel.flexquant}"
            )
        rows.append(cells)
    return table(["static choice", "its KL", *map(heading, batches)], rows)


def losses(results: Mapping[str, Any], base: str) -> str:
    """Where a static choice wins: a line for each."""
    by_static: dict[str, list[str]] = {}
    for batch in batches_of(results):
        for duel in duels(results["configurations"], batch, base):
            where = "a prompt" if batch == PROMPT else heading(batch)
            if duel.ratio is None:
                words = f"{1 / duel.nearest:.2f} times the speed of the nearest of ours"
            elif duel.ratio < 1:
                words = f"{1 / duel.ratio:.2f} times as fast at no more KL"
            else:
                continue
            by_static.setdefault(duel.static, []).append(f"{where}: {words}")
    nearer = {
        d.static
        for d in duels(results["configurations"], batches_of(results)[0], base)
        if d.ratio is None
    }
    return "\n".join(
        f"- **{static}**{' (nearer to the reference than any of ours)' * (static in nearer)}: "
        f"{'; '.join(words)}."
        for static, words in by_static.items()
    )


def llama_words(results: Mapping[str, Any]) -> str:
    """What llama.cpp's files are; empty without them."""
    files = results.get("llama_cpp", {}).get("files")
    if not files:
        return ""
    parts = []
    for name, found in files.items():
        label = results["configurations"][name]["label"]
        types = ", ".join(f"{count} {kind}" for kind, count in found["tensor_types"].items())
        parts.append(f"{label} has {found['bits_per_weight']:.2f} bits per weight ({types})")
    note, package = results["llama_cpp"]["note"], results["llama_cpp"]["package"]
    return f"llama.cpp is {package}, compiled for this processor. {'; '.join(parts)}. {note}"


def no_bf16(base: str) -> str:
    """Why speeds are not multiples of bf16's, where they are not."""
    if base == "bf16":
        return ""
    return (
        "This processor has no instructions for bf16: vLLM emulates it, so one would serve the "
        "unquantized model in fp32, and speeds are multiples of that. Quantized ones have their "
        "activations in fp32 there, too."
    )


def section(results: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The whole of it, after the picture."""
    load, settings = results["cpu_while_measuring"], results["settings"]
    base = base_of(results, facts)
    return paragraphs(
        main_table(results, base),
        f"Speed is tokens per second while decoding (last column: of a prompt of "
        f"{settings['prefill_tokens']}), as a multiple of {base}'s in the same round; median and "
        f"quartiles of {settings['rounds']} rounds. KL in nats per token, top-1 and perplexity are "
        f"of {settings['scored_tokens']} tokens that the same engines decoded. Mean bits: of the "
        "decode steps of one request, where widths can be told. MB stored: the files that are "
        "served from; – where the unquantized ones are quantized while they load.",
        no_bf16(base),
        llama_words(results),
        listing(results.get("unavailable", {})),
        f"While measuring, other processes used {percent(load['other_processes'])} of the cores, "
        f"and the host took {percent(load['stolen_by_host'])}.",
    )
