# SPDX-License-Identifier: Apache-2.0
"""Whether output with drafts is as output without: greedy token for token, sampled in the mean.

A step that verifies has more rows than a plain one, and sums of other numbers of rows round in
another order. So where two tokens are all but as likely, the other one may come: a difference
counts as *noise* if the two best log-probabilities of the plain run are less than `NOISE_NATS`
apart there and the other token is one of them. Any other difference is a fault.

Sampled answers are other ones. Of them the model's own log-probabilities are compared, mean by
mean: `FAR` standard errors apart is a fault. That finds a sampler that goes by the wrong
temperature; it is no proof that the distributions are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Protocol

from benchmarks.quality.sequences import mean_and_error
from benchmarks.serving.kinds import Prompt

NOISE_NATS = 0.05

FAR = 4.0
"""Standard errors between the means of sampled answers, from which on they are not the same."""

AT_A_TIME = (16, 8, 3, 1)
"""Prompts at a time, in turn."""


@dataclass(frozen=True)
class Answer:
    """Tokens of an answer; of each, the log-probabilities of its own and maybe of the best."""

    tokens: list[int]
    best: list[dict[int, float]]

    def nats(self) -> float:
        """Mean of minus the log-probabilities of its tokens."""
        return -mean(best[t] for t, best in zip(self.tokens, self.best, strict=True))


class Answers(Protocol):
    """Answers to some prompts at a time."""

    def __call__(
        self, batch: Sequence[Prompt], /, *, drafts: bool, temperature: float
    ) -> list[Answer]: ...


def first_difference(plain: Sequence[int], drafted: Sequence[int]) -> int | None:
    """Where two answers part, None if they do not; one that ends early parts at its end."""
    for index, (one, other) in enumerate(zip(plain, drafted, strict=False)):
        if one != other:
            return index
    return None if len(plain) == len(drafted) else min(len(plain), len(drafted))


def margin(best: Mapping[int, float]) -> float:
    """Nats between the two best."""
    first, second = sorted(best.values(), reverse=True)[:2]
    return first - second


def is_noise(best: Mapping[int, float], token: int, tolerance: float = NOISE_NATS) -> bool:
    """Whether `token` may come instead of the best by rounding alone."""
    ranked = sorted(best, key=lambda t: best[t], reverse=True)[:2]
    return token in ranked and margin(best) < tolerance


def compare(
    prompts: Sequence[Prompt], plain: Sequence[Answer], drafted: Sequence[Answer]
) -> list[dict[str, Any]]:
    """The answers that differ: prompt, position, nats between the two best, whether it is noise."""
    found = []
    for prompt, one, other in zip(prompts, plain, drafted, strict=True):
        at = first_difference(one.tokens, other.tokens)
        if at is None:
            continue
        short = at >= min(len(one.tokens), len(other.tokens))
        found.append(
            {
                "prompt": prompt.name,
                "position": at,
                "nats": None if short else margin(one.best[at]),
                "noise": not short and is_noise(one.best[at], other.tokens[at]),
            }
        )
    return found


def batches(prompts: Sequence[Prompt], most: int) -> Iterator[list[Prompt]]:
    """Cut into batches of `AT_A_TIME`, none above `most`."""
    start = turn = 0
    while start < len(prompts):
        count = min(AT_A_TIME[turn % len(AT_A_TIME)], most)
        yield list(prompts[start : start + count])
        start, turn = start + count, turn + 1


def both(
    batch: Sequence[Prompt], answer: Answers, temperature: float
) -> tuple[list[Answer], list[Answer]]:
    """Answers without drafts and with them."""
    plain = answer(batch, drafts=False, temperature=temperature)
    return plain, answer(batch, drafts=True, temperature=temperature)


def measure_equality(
    prompts: Sequence[Prompt],
    most: int,
    answer: Answers,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Counts of answers that are equal and that are not.

    Args:
        most: at a time.

    Raises:
        SystemExit: a difference that is no noise.
    """
    different: list[dict[str, Any]] = []
    done = 0
    for batch in batches(prompts, most):
        different += compare(batch, *both(batch, answer, 0.0))
        done += len(batch)
        say(f"  equality: {done} of {len(prompts)} prompts, {len(different)} differ")
    faults = [d for d in different if not d["noise"]]
    if faults:
        named = "; ".join(
            f"{d['prompt']} at token {d['position']} ("
            + ("one ends early)" if d["nats"] is None else f"best two {d['nats']:.3f} nats apart)")
            for d in faults
        )
        raise SystemExit(
            f"greedy output with drafts differs from that without by more than noise "
            f"({NOISE_NATS} nats) on {len(faults)} of {len(prompts)} prompts: {named}; nothing is "
            "written"
        )
    return {
        "prompts": len(prompts),
        "equal": len(prompts) - len(different),
        "within_noise": len(different),
        "otherwise": 0,
        "noise_nats": NOISE_NATS,
        "at_a_time": [n for n in AT_A_TIME if n <= most] or [most],
        "different": different,
    }


def apart(plain: Sequence[float], drafted: Sequence[float]) -> dict[str, float]:
    """Means of two samples and the standard errors between them."""
    (one, error), (other, second) = mean_and_error(plain), mean_and_error(drafted)
    between = math.hypot(error, second)
    return {
        "plain_nats": one,
        "drafted_nats": other,
        "standard_error": between,
        "standard_errors_apart": abs(other - one) / between if between else 0.0,
    }


def measure_sampled(
    prompts: Sequence[Prompt],
    most: int,
    temperature: float,
    answer: Answers,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Mean of minus the log-probabilities of sampled tokens, without drafts and with them.

    Args:
        most: at a time.

    Raises:
        SystemExit: they are too far apart.
    """
    plain: list[float] = []
    drafted: list[float] = []
    for start in range(0, len(prompts), most):
        answers = both(prompts[start : start + most], answer, temperature)
        plain += [a.nats() for a in answers[0]]
        drafted += [a.nats() for a in answers[1]]
    found = apart(plain, drafted)
    words = (
        f"sampled at {temperature}: {found['plain_nats']:.2f} nats per token without drafts, "
        f"{found['drafted_nats']:.2f} with, {found['standard_errors_apart']:.1f} standard errors "
        "apart"
    )
    if not found["standard_errors_apart"] < FAR:
        raise SystemExit(f"output with drafts is not as that without: {words}; nothing is written")
    say(f"  {words}")
    return {"prompts": len(prompts), "temperature": temperature} | found
