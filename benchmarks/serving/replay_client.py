# SPDX-License-Identifier: Apache-2.0
"""Sends requests at their times, whatever the server does, and measures each."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.quality.sequences import TokenSequence
from benchmarks.quality.statistics import percentile
from benchmarks.serving.servers import MODEL

TIMEOUT = 300.0
SAMPLE = 8
"""Of so many tokens one is compared with the reference."""

SHARES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class Planned:
    """A request: when it is sent, in seconds from the start, and what it decodes."""

    seconds: float
    sequence: TokenSequence


@dataclass
class Outcome:
    """What came of a request; times in seconds from the start of the run."""

    planned: float
    sent: float = math.nan
    tokens: list[float] = field(default_factory=list)
    wanted: int = 0
    error: str = ""

    @property
    def done(self) -> bool:
        return not self.error and len(self.tokens) == self.wanted

    @property
    def first(self) -> float:
        """Seconds from when it should have been sent to its first token."""
        return self.tokens[0] - self.planned

    @property
    def per_token(self) -> float:
        """Seconds for each token after the first."""
        return (self.tokens[-1] - self.tokens[0]) / max(len(self.tokens) - 1, 1)

    @property
    def whole(self) -> float:
        """Seconds from when it should have been sent to its last token."""
        return self.tokens[-1] - self.planned


async def send(
    client: httpx.AsyncClient,
    planned: Planned,
    run: str,
    start: float,
    outcome: Outcome,
    every: int,
) -> None:
    """Send one request and note when each of its tokens comes."""
    sequence = planned.sequence
    outcome.wanted = len(sequence.forced)
    body = {
        "model": MODEL,
        "prompt": sequence.prompt,
        "max_tokens": len(sequence.forced),
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "vllm_xargs": {
            "force_id": sequence.id,
            "force_tokens": sequence.forced,
            "force_run": run,
            "force_every": every,
        },
    }
    outcome.sent = time.monotonic() - start
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.is_error:
                text = (await answer.aread()).decode(errors="replace")
                outcome.error = f"{answer.status_code}: {text[:200]}"
                return
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.monotonic() - start
                for choice in json.loads(line.removeprefix("data: ")).get("choices", ()):
                    outcome.tokens += [now] * len(choice.get("token_ids") or ())
    except httpx.HTTPError as error:
        outcome.error = f"{type(error).__name__}: {error}"
        return
    if len(outcome.tokens) != outcome.wanted:
        outcome.error = f"{len(outcome.tokens)} of {outcome.wanted} tokens came"


async def replay(
    url: str,
    plan: Sequence[Planned],
    run: str,
    together: int | None = None,
    every: int = SAMPLE,
) -> list[Outcome]:
    """Send all requests, and wait for all answers.

    Args:
        together: so many at a time, as soon as one ends, instead of at their times.
        every: of so many tokens one is compared.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    places = asyncio.Semaphore(together) if together else None
    outcomes = [Outcome(planned.seconds) for planned in plan]
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits) as client:
        start = time.monotonic()

        async def one(planned: Planned, outcome: Outcome) -> None:
            if places is None:
                await asyncio.sleep(max(planned.seconds - (time.monotonic() - start), 0.0))
                await send(client, planned, run, start, outcome, every)
                return
            async with places:
                outcome.planned = time.monotonic() - start
                await send(client, planned, run, start, outcome, every)

        await asyncio.gather(*map(one, plan, outcomes))
    return outcomes


def summary(
    outcomes: Sequence[Outcome], first_target: float, token_target: float
) -> dict[str, Any]:
    """Of a run: counts, tokens per second, percentiles in seconds, the share within both targets.

    A request that failed is within no target.
    """
    done = [o for o in outcomes if o.done]
    if not done:
        raise ValueError(f"no request of {len(outcomes)} was answered: {outcomes[0].error}")
    seconds = max(o.tokens[-1] for o in done) - min(o.planned for o in outcomes)
    within = sum(o.first <= first_target and o.per_token <= token_target for o in done)

    def shares(values: Sequence[float]) -> dict[str, float]:
        return {name: percentile(values, share) for name, share in SHARES.items()}

    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(done),
        "failures": sorted({o.error for o in outcomes if o.error})[:5],
        "seconds": seconds,
        "tokens_per_second": sum(len(o.tokens) for o in done) / seconds,
        "first_token_seconds": shares([o.first for o in done]),
        "token_seconds": shares([o.per_token for o in done]),
        "request_seconds": shares([o.whole for o in done]),
        "within_targets": within / len(outcomes),
        "latest_send_seconds": max(o.sent - o.planned for o in done),
    }


def series(outcomes: Sequence[Outcome]) -> dict[str, list[float | None]]:
    """Second by second: requests under way at its end, and the median time between tokens in it."""
    done = [o for o in outcomes if o.done]
    last = math.ceil(max(o.tokens[-1] for o in done))
    gaps: list[list[float]] = [[] for _ in range(last + 1)]
    for outcome in done:
        for before, after in zip(outcome.tokens, outcome.tokens[1:], strict=False):
            gaps[int(after)].append(after - before)
    return {
        "under_way": [
            float(sum(o.planned <= second + 1 < o.tokens[-1] for o in done))
            for second in range(last + 1)
        ],
        "token_seconds": [percentile(found, 0.5) if found else None for found in gaps],
    }


def steady_speed(outcomes: Sequence[Outcome]) -> float:
    """Tokens per second of a run of so many requests at a time, while none of the places is empty:
    from the end of the first request to when the last one is sent.

    Raises:
        ValueError: no request is sent after one has ended.
    """
    begin = min(o.tokens[-1] for o in outcomes if o.done)
    end = max(o.sent for o in outcomes)
    if not begin < end:
        raise ValueError("no request was sent after another had ended: there are too few of them")
    return sum(begin < t <= end for o in outcomes for t in o.tokens) / (end - begin)


def bits_along(readings: Sequence[tuple[float, Mapping[str, float]]]) -> list[float | None]:
    """Second by second, mean bits of the decode steps that ended in it; None where none did.

    Args:
        readings: seconds from the start and the counters then, ascending, the first at 0.
    """
    found: list[float | None] = []
    for second in range(math.ceil(readings[-1][0]) if readings else 0):
        before = [c for t, c in readings if t <= second]
        after = [c for t, c in readings if t <= second + 1]
        found.append(bits_of(before[-1], after[-1]) if before else None)
    return found


def bits_of(before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
    """Mean bits of the decode steps between two readings of the metrics; None where none ran."""
    steps = after["steps"] - before["steps"]
    return (after["bits"] - before["bits"]) / steps if steps else None
