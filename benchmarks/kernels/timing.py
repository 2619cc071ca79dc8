# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: all contenders of a cell in turn, round after round, each in another order.

A cell is a shape, a number of rows and of threads, and where the weights lie: `cache` is one copy
used over and over, `memory` rotates through so many copies that at least a given amount of other
weights is read before a copy is read again.

A turn in which the system took a CPU away from this process is not *clean*: it timed somebody
else's work. Medians are over clean turns wherever there are enough of them; each cell says which
share of its turns was clean.
"""

from __future__ import annotations

import math
import os
import random
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

from benchmarks.kernels.contenders import Call, Contender, flexquant_name
from benchmarks.kernels.plain_read import read_name

TURN_S = 2e-3
"""Length of a turn, unless one call takes longer."""

LEAST_CALLS = 3
"""Calls in a turn of weights in cache, unless one call takes longer than `LONG_CALL_S`."""

LONG_CALL_S = 20e-3
LEAST_ROUNDS = 5
"""Rounds, and clean turns of each contender, that a cell should have."""

LEAST_CLEAN = 3
"""Fewer clean turns than this are not taken alone: all are."""

PATIENCE = 2
"""A cell may take so many times its seconds to get its clean turns."""

EIGHT_BIT = "same layout at 8 bit"
BEST = "best of vLLM"
SHARE = "share of plain read"


class BudgetError(ValueError):
    """What is to be timed does not fit; the message says what to change."""


@dataclass(frozen=True)
class Budget:
    """How long a cell may take and how much memory it may use.

    rounds: at most; seconds: aimed at, as long as `LEAST_ROUNDS` are done; reuse_bytes: read
    between two reads of one copy; copies_bytes: of all copies together, at most.
    """

    rounds: int
    seconds: float
    reuse_bytes: int
    copies_bytes: int


class Turn(NamedTuple):
    """Seconds per call, and whether no CPU was taken away meanwhile."""

    seconds: float
    clean: bool


Times = dict[str, list[Turn]]
"""The turns of each contender, one a round."""


def _preemptions() -> int:
    """How often this process, with all its threads, lost a CPU that it wanted to keep."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _turn(calls: Sequence[Call], x: torch.Tensor) -> Turn:
    os.sched_yield()  # a wait for others falls before the turn rather than into it
    before = _preemptions()
    start = time.perf_counter()
    for call in calls:
        call(x)
    seconds = (time.perf_counter() - start) / len(calls)
    return Turn(seconds, _preemptions() == before)


def _enough(times: Times, budget: Budget, planned: int, started: float) -> bool:
    """Whether a cell is done after some of its rounds."""
    done = min(len(turns) for turns in times.values())
    if done < planned:
        return False
    clean = min(sum(turn.clean for turn in turns) for turns in times.values())
    return clean >= LEAST_ROUNDS or time.perf_counter() - started > PATIENCE * budget.seconds


def _done(times: Times) -> dict[str, Any]:
    turns = [turn for found in times.values() for turn in found]
    return {
        "rounds": min(len(found) for found in times.values()),
        "clean_turns": round(sum(turn.clean for turn in turns) / len(turns), 3),
    }


def _inputs(contenders: Sequence[Contender], x: torch.Tensor) -> dict[str, torch.Tensor]:
    converted = {dtype: x.to(dtype) for dtype in {c.activations for c in contenders}}
    return {c.name: converted[c.activations] for c in contenders}


def _estimate(contender: Contender, x: torch.Tensor) -> float:
    """Seconds per call with the weights in cache; not a result."""
    call = contender.copies[0]
    _turn([call], x)
    return min(_turn([call], x).seconds for _ in range(3))


def _rounds(budget: Budget, seconds: float) -> int:
    return max(LEAST_ROUNDS, min(budget.rounds, int(budget.seconds / max(seconds, 1e-9))))


def time_in_cache(
    contenders: Sequence[Contender], x: torch.Tensor, budget: Budget
) -> tuple[Times, dict[str, Any]]:
    """Each turn after one call that is not timed, as the others have used the caches since.

    Args:
        x: bf16 [rows, K].

    Returns:
        Times, and what was done: `rounds` and the share of `clean_turns`.
    """
    inputs = _inputs(contenders, x)
    estimates = {c.name: _estimate(c, inputs[c.name]) for c in contenders}
    calls = {
        name: 1 if once > LONG_CALL_S else max(LEAST_CALLS, math.ceil(TURN_S / once))
        for name, once in estimates.items()
    }
    seconds = sum(once * (calls[name] + 1) for name, once in estimates.items())
    rounds, started = _rounds(budget, seconds), time.perf_counter()
    times: Times = {c.name: [] for c in contenders}
    shuffle = random.Random(0)
    while not _enough(times, budget, rounds, started):
        for contender in shuffle.sample(contenders, len(contenders)):
            call, given = contender.copies[0], inputs[contender.name]
            call(given)
            times[contender.name].append(_turn([call] * calls[contender.name], given))
    return times, _done(times)


def plan_copies(
    contenders: Sequence[Contender], calls: dict[str, int], budget: Budget
) -> tuple[int, int]:
    """Into how many blocks of copies, one a round, the rotation falls; bytes read between uses.

    A copy that comes last in its round may come first in the round that uses it again: what counts
    is the rounds between them.

    Raises:
        BudgetError: two blocks of copies take more memory than allowed.
    """
    per_round = sum(calls[c.name] * c.bytes_read for c in contenders)
    kept = sum(calls[c.name] * c.bytes_kept for c in contenders)
    if 2 * kept > budget.copies_bytes:
        raise BudgetError(
            f"the copies of two rounds take {2 * kept >> 20} MB where {budget.copies_bytes >> 20} "
            "MB are allowed: time fewer layouts or baselines, or allow more with --copies-mb"
        )
    blocks = math.ceil(budget.reuse_bytes / per_round) + 1
    blocks = min(blocks, budget.copies_bytes // kept)
    return blocks, (blocks - 1) * per_round


def time_from_memory(
    contenders: Sequence[Contender], x: torch.Tensor, budget: Budget, bandwidth: float
) -> tuple[Times, dict[str, Any]]:
    """As `time_in_cache`, each call of a turn on another copy.

    Args:
        bandwidth: bytes/s of memory, about; decides the calls in a turn.

    Returns:
        Times, and what was done; `reuse_mb` is read between two reads of one copy.
    """
    inputs = _inputs(contenders, x)
    estimates = {
        c.name: max(_estimate(c, inputs[c.name]), c.bytes_read / bandwidth) for c in contenders
    }
    calls = {name: math.ceil(TURN_S / once) for name, once in estimates.items()}
    blocks, reuse = plan_copies(contenders, calls, budget)
    # All grow together: memory is not equally fast everywhere (virtual machines, NUMA), and this
    # spreads the copies of each over all of it.
    for count in range(1, blocks * max(calls.values()) + 1):
        for contender in contenders:
            contender.grow(min(count, blocks * calls[contender.name]))
    seconds = sum(once * calls[name] for name, once in estimates.items())
    rounds, started = _rounds(budget, seconds), time.perf_counter()
    times: Times = {c.name: [] for c in contenders}
    # One whole rotation goes untimed: it makes oneDNN's primitives, and puts every copy as far
    # away as it will be in the timed rounds.
    number, shuffle = -blocks, random.Random(0)
    while not _enough(times, budget, rounds, started):
        block = number % blocks
        for contender in shuffle.sample(contenders, len(contenders)):
            count = calls[contender.name]
            copies = contender.copies[block * count : (block + 1) * count]
            spent = _turn(copies, inputs[contender.name])
            if number >= 0:
                times[contender.name].append(spent)
        number += 1
    return times, _done(times) | {"reuse_mb": round(reuse / 1e6)}


def typical(turns: Sequence[Turn]) -> list[float]:
    """Seconds of the clean turns, of all where there are too few."""
    clean = [turn.seconds for turn in turns if turn.clean]
    return clean if len(clean) >= LEAST_CLEAN else [turn.seconds for turn in turns]


def summarise(times: Times) -> dict[str, dict[str, float]]:
    """Median and quartiles in µs by contender."""
    summary = {}
    for name, turns in times.items():
        found = typical(turns)
        low, _, high = quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
        spread = {"median": median(found), "p25": low, "p75": high}
        summary[name] = {key: round(value * 1e6, 3) for key, value in spread.items()}
    return summary


def ratio(times: Times, name: str, to: str) -> float:
    """How many times faster `name` is than `to`: the median of the ratios of the rounds.

    Of rounds in which both turns were clean; of all where there are too few.
    """
    pairs = list(zip(times[to], times[name], strict=True))
    clean = [pair for pair in pairs if all(turn.clean for turn in pair)]
    chosen = clean if len(clean) >= LEAST_CLEAN else pairs
    return round(median(other.seconds / own.seconds for other, own in chosen), 4)


def _comparable(contender: Contender, other: Contender) -> bool:
    """bf16 kernels, and those of the same or the next higher number of bits."""
    if other.family == "read" or other.bits == 32:
        return False
    if other.family == "ark":
        return other.bits == contender.bits
    return other.bits == 16 or other.bits == (4 if contender.bits <= 4 else 8)


def compare(times: Times, contenders: Sequence[Contender]) -> dict[str, dict[str, float]]:
    """For each of our kernels, how many times faster it is than what it is compared with.

    `EIGHT_BIT` is the same layout at 8 bits, `BEST` the vLLM kernel with the lowest median at any
    width. `SHARE` is against a read of as many bytes in the same rounds.
    """
    vllm = [c.name for c in contenders if c.family == "vllm"]
    best = min(vllm, key=lambda name: median(typical(times[name]))) if vllm else None
    found: dict[str, dict[str, float]] = {}
    for contender in contenders:
        if contender.family != "flexquant":
            continue
        name, layout = contender.name, contender.layout
        others = {
            c.name: c.name
            for c in contenders
            if c.family != "flexquant" and _comparable(contender, c)
        }
        if best is not None:
            others[BEST] = best
        assert layout is not None
        if contender.bits < 8 and (eight := flexquant_name(layout, 8)) in times:
            others[EIGHT_BIT] = eight
        found[name] = {label: ratio(times, name, to) for label, to in others.items()}
        if (read := read_name(contender.bits)) in times:
            found[name][SHARE] = ratio(times, name, read)
    return found
