# SPDX-License-Identifier: Apache-2.0
"""Self-speculation: whether to draft at all, and after which draft to stop.

Drafts run at a cheap level of the ladder, one forward pass per token; one step at the level in
force verifies them all. A draft is worth its time while

    (chance that it is kept) x (seconds per token)  >  seconds of a draft + seconds of a row more

where the chance is the product, over the drafts so far, of what their own entropies say (Leviathan
et al., arXiv:2211.17192, section 3, has the expectation for a chance that is always the same).
Whether speculation pays at all is not modelled but measured: seconds per token of steps with drafts
and of plain steps, for each number of sequences (a power of two at most), on the host's clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_flexquant.options import Gate

_FIRST_PLAIN, _FIRST_DRAFTED = 8, 8
"""Steps of each kind that are measured before the first choice between them."""

_AGAIN_PLAIN, _BURST_PLAIN, _BURST_DRAFTED = 128, 4, 6
"""While drafts are on, after so many steps so many plain ones are measured again; while they are
off, so many with drafts, the sooner the less that would lose."""

_LOOKING, _TOKENS = 0.008, 2.5
"""Share of the time that looking may lose, and the tokens that a step with drafts gives for it."""

_SOONEST, _LATEST = 40, 800

_FORGET, _FORGET_ROWS = 0.93, 0.98
_PRIOR_ROWS = 4.0
"""Sum of squares of rows for which the prior of a row's time stands."""

_WORTH = 0.97
"""Seconds per token over those of plain steps below which speculation is on; less may be noise."""

_LONGEST = 3.0
"""A step that takes so many times the mean counts as if it took that: something else ran."""

_SHARE, _ROW = 0.75, 0.03
"""Until measured, of a step's time: what of it a draft saves in proportion to its bytes, and what a
row more adds. The first is as two models on a CPU had it: drafts also go without scheduler and
sampler."""

_PRIOR_TOKENS, _FADE = 20.0, 0.999
_PRIOR_SLOPE = 0.35
"""Uncalibrated, drafts are taken to be kept with exp(-0.35 nats): the middle of small models."""


class Seconds:
    """Mean seconds of a token, or of a step that counts as one, fading."""

    def __init__(self) -> None:
        self.count = 0
        self._tokens = self._seconds = 0.0

    def add(self, seconds: float, tokens: int = 1) -> None:
        """Take in a step that gave so many tokens."""
        if self.count:
            seconds = min(seconds, _LONGEST * self.value * max(tokens, 1))
        self.count += 1
        self._tokens = _FORGET * self._tokens + tokens
        self._seconds = _FORGET * self._seconds + seconds

    @property
    def value(self) -> float:
        return self._seconds / self._tokens if self._tokens else 0.0


class Row:
    """What a row more adds to a step that verifies: the slope of its seconds over its rows."""

    def __init__(self) -> None:
        self.count = 0
        self._sums = [0.0] * 5

    def add(self, rows: int, seconds: float) -> None:
        """Take in a step with so many rows beyond one for each sequence."""
        self.count += 1
        new = (1.0, rows, rows * rows, seconds, rows * seconds)
        self._sums = [_FORGET_ROWS * old + x for old, x in zip(self._sums, new, strict=True)]

    def slope(self, prior: float) -> float:
        """Seconds; near `prior` until steps of different lengths were seen."""
        weight, rows, squares, seconds, products = self._sums
        if not weight:
            return prior
        spread = squares - rows * rows / weight + _PRIOR_ROWS
        covered = products - rows * seconds / weight + _PRIOR_ROWS * prior
        return max(covered / spread, 0.0)


class Acceptance:
    """Chance that a draft is kept, by the entropy of its logits: calibrated, then as seen.

    Args:
        by_entropy: chance in each bin of `bin_nats`, the last one open; None if not calibrated.
        mean: over all drafts.
    """

    def __init__(
        self,
        by_entropy: Sequence[float] | None = None,
        bin_nats: float = 0.25,
        mean: float | None = None,
        bins: int = 32,
    ) -> None:
        if by_entropy is None:
            by_entropy = [math.exp(-_PRIOR_SLOPE * (i + 0.5) * bin_nats) for i in range(bins)]
        self._bin_nats = bin_nats
        self._kept = [chance * _PRIOR_TOKENS for chance in by_entropy]
        self._seen = [_PRIOR_TOKENS] * len(by_entropy)
        self._all = _PRIOR_TOKENS
        self._all_kept = (0.7 if mean is None else mean) * _PRIOR_TOKENS

    def _bin(self, nats: float) -> int:
        # not a number: no distribution, nothing is sure
        last = len(self._seen) - 1
        return int(min(nats / self._bin_nats, last)) if nats >= 0 else last

    def of(self, nats: float) -> float:
        """Of a draft whose logits have this entropy."""
        number = self._bin(nats)
        return self._kept[number] / self._seen[number]

    @property
    def mean(self) -> float:
        """Of the next draft, whose entropy is not known yet."""
        return self._all_kept / self._all

    def book(self, nats: float, kept: bool) -> None:
        """A draft has been verified."""
        number = self._bin(nats)
        self._seen[number] = _FADE * self._seen[number] + 1.0
        self._kept[number] = _FADE * self._kept[number] + kept
        self._all = _FADE * self._all + 1.0
        self._all_kept = _FADE * self._all_kept + kept

    def table(self) -> list[float]:
        """Chance in each bin."""
        return [kept / seen for kept, seen in zip(self._kept, self._seen, strict=True)]


@dataclass
class Times:
    """What was measured for so many sequences, all greedy or some of them sampled.

    plain, drafted: seconds per token of steps without and with drafts, drafting included. step:
    seconds of a plain step. draft: of one forward pass that drafts. row: what a row more adds to a
    step that verifies. on: drafts pay. looking: the other kind of step is measured, for `left`
    steps more; else the better kind runs for so many.
    """

    plain: Seconds = field(default_factory=Seconds)
    drafted: Seconds = field(default_factory=Seconds)
    step: Seconds = field(default_factory=Seconds)
    draft: Seconds = field(default_factory=Seconds)
    row: Row = field(default_factory=Row)
    on: bool = True
    looking: bool = False
    left: int = _AGAIN_PLAIN

    def choose(self) -> None:
        """Take up the better kind of step, or have a look at the other, for the next one."""
        was, self.on = self.on, self.drafted.value < _WORTH * self.plain.value
        self.left -= 1
        if self.on != was or self.left <= 0:
            self.looking = not self.looking and self.on == was
            self.left = self._burst() if self.looking else self._again()

    def _burst(self) -> int:
        return _BURST_PLAIN if self.on else _BURST_DRAFTED

    def _again(self) -> int:
        """Steps between two looks."""
        if self.on:
            return _AGAIN_PLAIN
        loss = max(self.drafted.value / self.plain.value - 1, 0.0) * _TOKENS
        return round(min(max(_BURST_DRAFTED * loss / _LOOKING, _SOONEST), _LATEST))

    def rate(self) -> float:
        """Seconds per token, of the better kind."""
        found = [kind.value for kind in (self.plain, self.drafted) if kind.count]
        return min(found) if found else 0.0


@dataclass
class Speculation:
    """Decides for one engine.

    most: tokens drafted at most before a step verifies them. gate: what ends a draft: what it
    gains, an entropy above `threshold` (nats), or only `most`. draft_cost: bytes that the draft's
    level reads over those of the level that verifies. clocked: time is measured; ranks that must
    decide the same have clocks of their own and go by `draft_cost` alone.
    """

    most: int
    gate: Gate = "gain"
    threshold: float = 1.5
    draft_cost: float = 0.6
    clocked: bool = True
    greedy: Acceptance = field(default_factory=Acceptance)
    sampled: Acceptance = field(default_factory=Acceptance)
    times: dict[tuple[int, bool], Times] = field(default_factory=dict)
    sampling: bool = False
    """Of the batch at hand: some request samples, which makes verifying take longer."""

    def length(self, sequences: int) -> int:
        """Tokens to draft at most, 0 to run a plain step."""
        if not sequences:
            return 0
        if self.gate == "fixed":
            return self.most
        if not self.clocked:
            return expected_best(self.greedy.mean, *self._relative(sequences), self.most)[0]
        times = self._of(sequences)
        if times.plain.count < _FIRST_PLAIN:
            return 0
        if times.drafted.count < _FIRST_DRAFTED:
            return self.most
        times.choose()
        return self.most if times.on != times.looking else 0

    def goes_on(self, chances: Sequence[float], sequences: int) -> list[bool]:
        """Whether each of the sequences that draft is worth another draft.

        Args:
            chances: that its next draft and all before it are kept.
            sequences: of the batch.
        """
        if self.gate != "gain":
            return [True] * len(chances)
        _, draft, row, token = self._costs(sequences)
        gains = [chance * token - row for chance in chances]
        if sum(gain for gain in gains if gain > 0) <= draft:
            return [False] * len(chances)
        return [gain > 0 for gain in gains]

    def keeps(self, chance: float, nats: float, sequences: int) -> bool:
        """Whether a draft is worth a row of the step that verifies.

        Args:
            chance: that it and all before it are kept.
            nats: entropy of its logits.
        """
        if self.gate == "fixed":
            return True
        if self.gate == "entropy":
            return nats <= self.threshold
        _, _, row, token = self._costs(sequences)
        return chance * token > row

    def of(self, greedy: bool) -> Acceptance:
        """What is known of the drafts of greedy requests, or of those that sample."""
        return self.greedy if greedy else self.sampled

    # ---- what was measured

    def forget_gains(self) -> None:
        """Drafts will be made otherwise from now on: what they gained is to be measured again."""
        for times in self.times.values():
            times.drafted = Seconds()

    def book_draft(self, sequences: int, seconds: float) -> None:
        """One forward pass drafted for the sequences of a batch."""
        if self.clocked:
            self._of(sequences).draft.add(seconds)

    def book_step(
        self, sequences: int, extra: int, tokens: int, step: float, drafting: float = 0.0
    ) -> None:
        """A step of decoding has run.

        Args:
            extra: rows beyond one per sequence. tokens: that it gave.
            step: its seconds; drafting: those spent on drafts for it, 0 if there was none.
        """
        if not self.clocked:
            return
        times = self._of(sequences)
        if not drafting:
            times.plain.add(step, tokens)
            times.step.add(step)
            return
        times.drafted.add(step + drafting, tokens)
        if extra:
            times.row.add(extra, step)

    def _of(self, sequences: int) -> Times:
        bucket = max(sequences - 1, 0).bit_length()
        return self.times.setdefault((bucket, self.sampling), Times())

    def _relative(self, sequences: int) -> tuple[float, float]:
        """A draft and a row more for each sequence, over a plain step."""
        return 1 - _SHARE * (1 - self.draft_cost), _ROW * sequences

    def _costs(self, sequences: int) -> tuple[float, float, float, float]:
        """Seconds of a plain step, of a draft, of a row more and per token; where nothing was
        measured, shares of a step that takes 1."""
        times = self._of(sequences)
        step = times.step.value if times.step.count else 1.0
        draft, row = self._relative(1)
        return (
            step,
            times.draft.value if times.draft.count else step * draft,
            times.row.slope(step * row),
            times.rate() or step / max(sequences, 1),
        )

    def speedup(self, sequences: int) -> float | None:
        """Tokens per second with drafts over those without, None until both were measured."""
        return _speedup(self._of(sequences))

    def cost_table(self) -> list[dict[str, Any]]:
        """What is known by number of sequences, and whether some of them were sampled: seconds of a
        plain step, a draft and a row more, tokens per second with drafts over without, and whether
        speculation is on."""
        return [
            {
                "sequences": 1 << bucket,
                "sampled": sampled,
                "step_seconds": times.step.value,
                "draft_seconds": times.draft.value,
                "row_seconds": times.row.slope(0.0),
                "speedup": _speedup(times),
                "on": times.on,
            }
            for (bucket, sampled), times in sorted(self.times.items())
            if times.plain.count or times.drafted.count
        ]


def _speedup(times: Times) -> float | None:
    if not times.plain.count or not times.drafted.value:
        return None
    return times.plain.value / times.drafted.value


def expected_speedup(kept: float, length: int, draft: float, row: float) -> float:
    """Tokens per second over those of plain steps, with `length` drafts each kept with `kept`.

    Args:
        draft: time of a draft over that of a plain step.
        row: what verifying one draft more adds to a step, over a plain step.
    """
    tokens = sum(kept**i for i in range(length + 1))
    return tokens / (1 + length * (draft + row))


@dataclass(frozen=True)
class Draft:
    """A level of the ladder and a length at which drafts are expected to gain most."""

    level: int
    length: int
    speedup: float


def best_draft(
    levels: Sequence[tuple[int, float]], cost: Sequence[float], most: int, row: float = _ROW
) -> Draft:
    """The level that drafts best for one sequence.

    Args:
        levels: and the chance that its draft is kept, of each level that was measured.
        cost: of every level of the ladder over the best one's, in bytes read or in time.
    """
    found = []
    for level, kept in levels:
        draft = 1 - _SHARE * (1 - cost[level])
        length, speedup = expected_best(kept, draft, row, most)
        # where nothing pays, what loses least when it is tried
        found.append(
            Draft(level, length, speedup if length else expected_speedup(kept, 1, draft, row))
        )
    return max(found, key=lambda draft: draft.speedup)


def expected_best(kept: float, draft: float, row: float, most: int) -> tuple[int, float]:
    """The length up to `most` of the highest expected speed-up, and that; 0 where none pays."""
    every = [(expected_speedup(kept, n, draft, row), -n) for n in range(most + 1)]
    speedup, length = max(every)
    return -length, speedup
