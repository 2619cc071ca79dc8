# SPDX-License-Identifier: Apache-2.0
"""Requests as a trace has them: when they arrive, how long prompt and answer are.

A file of the form of the Azure LLM inference traces: a line `TIMESTAMP,ContextTokens,
GeneratedTokens`, then one line for each request in order of arrival. A timestamp is a date and time
(`2023-11-16 18:15:46.6805900`) or seconds.
"""

from __future__ import annotations

import csv
import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate, pairwise
from pathlib import Path

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
SHORTER = 8
"""By what lengths of a trace are divided to fit a small machine."""

PROMPTS, ANSWERS = (8, 192), (4, 64)
"""Shortest and longest, tokens, after that."""


@dataclass(frozen=True)
class Arrival:
    """One request: seconds from the first one, tokens of prompt and answer."""

    seconds: float
    prompt: int
    answer: int


def read_trace(path: Path) -> list[Arrival]:
    """All requests of a file.

    Raises:
        ValueError: it has another form; the message names the line.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (lines.fieldnames or ())]:
            raise ValueError(
                f"{path.name} has no column {missing[0]}; its first line must name {COLUMNS}"
            )
        rows = []
        for row in lines:
            try:
                counts = int(row["ContextTokens"]), int(row["GeneratedTokens"])
                rows.append((seconds_of(row["TIMESTAMP"]), *counts))
            except (ValueError, TypeError):
                raise ValueError(
                    f"{path.name}, line {lines.line_num}: {list(row.values())} is no time and two "
                    "whole numbers"
                ) from None
            if min(counts) < 0 or rows[-1][0] < rows[0][0]:
                raise ValueError(
                    f"{path.name}, line {lines.line_num}: {list(row.values())} has a negative "
                    "length or comes before the first line"
                )
    if len(rows) < 2:
        raise ValueError(f"{path.name} has {len(rows)} requests; two are needed at least")
    rows.sort(key=lambda row: row[0])
    return [Arrival(time - rows[0][0], prompt, answer) for time, prompt, answer in rows]


def seconds_of(stamp: str) -> float:
    """Seconds of a timestamp: a number, or a date and time with up to seven decimals."""
    try:
        return float(stamp)
    except ValueError:
        whole, _, fraction = stamp.strip().partition(".")
        return datetime.fromisoformat(whole).timestamp() + float(f"0.{fraction or 0}")


def made_trace(count: int, seed: int = 0) -> list[Arrival]:
    """Requests of a trace that is made up: for machines that have no other.

    Gaps are exponential, and five times as long in every other stretch of about 20 requests;
    lengths are lognormal with medians of 1020 and 130 tokens and sigmas of 1.0 and 0.9. It comes in
    more bursts than the Azure conversation trace: the gaps' standard deviation is 1.4 times their
    mean, there 1.1.
    """
    generator = random.Random(seed)
    found, now = [], 0.0
    for i in range(count):
        now += generator.expovariate(1.0) * (5.0 if (i // 20) % 2 else 1.0)
        prompt = generator.lognormvariate(math.log(1020), 1.0)
        answer = generator.lognormvariate(math.log(130), 0.9)
        found.append(Arrival(now, round(prompt), round(answer)))
    return found


def shorter(arrival: Arrival) -> Arrival:
    """The same request with lengths for a small machine."""

    def clipped(tokens: int, bounds: tuple[int, int]) -> int:
        return min(max(round(tokens / SHORTER), bounds[0]), bounds[1])

    return Arrival(
        arrival.seconds, clipped(arrival.prompt, PROMPTS), clipped(arrival.answer, ANSWERS)
    )


def like_some(arrivals: Sequence[Arrival], count: int) -> tuple[list[Arrival], list[int]]:
    """`count` requests that stand for all, and for each request the nearest of them.

    So that few texts, whose reference is known, serve all requests. Nearest by the ratio of both
    lengths; the ones that stand for all are evenly spaced in the order of their total length.
    """
    order = sorted(arrivals, key=lambda a: (a.prompt + a.answer, a.answer))
    count = min(count, len(order))
    chosen = [order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)]

    def distance(one: Arrival, other: Arrival) -> float:
        prompts = abs(math.log(one.prompt / other.prompt))
        return prompts + abs(math.log(one.answer / other.answer))

    return chosen, [
        min(range(count), key=lambda i: distance(arrival, chosen[i])) for arrival in arrivals
    ]


@dataclass(frozen=True)
class Stretch:
    """Part of a run: how long, and what is offered in it as a share of capacity."""

    seconds: float
    share: float


def work(stretches: Sequence[Stretch]) -> float:
    """Seconds of the machine's whole capacity that are offered."""
    return math.fsum(s.seconds * s.share for s in stretches)


def spread_over(
    offsets: Sequence[float], tokens: Sequence[int], stretches: Sequence[Stretch]
) -> list[float]:
    """When each request is sent.

    A stretch has as many of the requests, in their order, as have its part of all tokens: counted
    in time, a short burst could fall on a gap of the trace. Within it they come in the trace's
    pattern.

    Args:
        offsets: seconds of the requests in the trace, ascending.
        tokens: of each one's answer.

    Returns:
        Seconds from the start of the run. The first of each stretch comes at its beginning, the
        last of all at the end of the run.
    """
    *before, total = [0, *accumulate(tokens)]
    scale = total / work(stretches)
    ends = [scale * work(stretches[:count]) for count in range(1, len(stretches))]
    # where the requests of each stretch begin, and where those of the last one end
    firsts = [0, *(bisect_left(before, end) for end in ends), len(offsets)]
    found, start = [], 0.0
    for stretch, (first, end) in zip(stretches, pairwise(firsts), strict=True):
        own = offsets[first:end]
        if own:
            length = (offsets[min(end, len(offsets) - 1)] - own[0]) or 1.0
            found += [start + (o - own[0]) / length * stretch.seconds for o in own]
        start += stretch.seconds
    return found
