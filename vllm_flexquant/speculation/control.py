# SPDX-License-Identifier: Apache-2.0
"""Self-speculation of one worker: between the drafter, which runs the model, and the policy, which
says how far to draft; what is counted of it."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vllm_flexquant.format.record import DraftsRecord
from vllm_flexquant.options import PINNED, FlexQuantOptions
from vllm_flexquant.planner.ladder import Ladder, bytes_read
from vllm_flexquant.planner.watcher import Watcher
from vllm_flexquant.policy.arrays import Array, view
from vllm_flexquant.speculation.gate import Acceptance, Speculation, best_draft

if TYPE_CHECKING:
    from vllm_flexquant.planner.planner import Planner

_UNCALIBRATED_BITS = 4.0
"""Mean bits of drafts where nobody measured which level drafts best."""

_RARE = 0.002
"""Share of the calibration's tokens below which a bin of entropy tells nothing."""

_CHEAPER = 0.95
"""Bits that a draft reads over those of the step that verifies, above which it is not worth it."""


@dataclass
class DraftCounts:
    """Sums since the start. drafted, kept: drafts that were verified, by position from 0, and those
    of them that were kept. verified: answers that a step verified drafts of, each time. steps: that
    verified some, plain_steps: the others. tokens: of both. Seconds: drafting, and in those steps.
    """

    drafted: Counter[int] = field(default_factory=Counter)
    kept: Counter[int] = field(default_factory=Counter)
    verified: int = 0
    steps: int = 0
    plain_steps: int = 0
    tokens: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0


class SelfSpeculation(Watcher):
    """State of one engine's drafts; watches its planner.

    Args:
        options: with `speculate` above 0, the most that the engine was started for.
        drafts: what calibration found of levels as drafts, None if nothing.
        clocked: as `Speculation`.

    Raises:
        ValueError: as `check`.
    """

    def __init__(
        self,
        planner: Planner,
        options: FlexQuantOptions,
        drafts: DraftsRecord | None = None,
        clocked: bool = True,
    ) -> None:
        assert planner.table is not None
        self.planner, self._drafts_record = planner, drafts
        self.started_for = options.speculate
        self.control = Speculation(options.speculate, clocked=clocked)
        self.counts = DraftCounts()
        sizes = torch.tensor([layer.rows * layer.columns for layer in planner.table.layers])
        self._share = view((sizes / sizes.sum().clamp(min=1)).float().to(planner.device))
        self._pending: dict[str, list[tuple[float, bool]]] = {}
        self._ids: list[str] = []
        self._step = -1
        self._ended = self._drafting = 0.0
        self._sequences = 0
        self._trace: deque[dict[str, Any]] = deque(maxlen=options.trace_steps)
        self._chances: dict[int, float] = {}
        self._drafts: dict[int, list[tuple[float, bool]]] = {}
        self.level: int | None = None
        self._drafts_at: object = None
        self._ways: object = None
        self.check(options)
        self.changed(options)
        planner.watchers.add(self)
        planner.speculates = planner.clock.elsewhere = True

    def check(self, options: FlexQuantOptions) -> None:
        """Whether these options can be gone by.

        Raises:
            ValueError: more drafts than the engine was started for, a level that is not on the
                ladder, or drafts as wide as what is pinned.
        """
        if options.speculate > self.started_for:
            raise ValueError(
                f"speculate is {options.speculate}, but the engine was started with "
                f"{self.started_for}, for which it set aside room; give at most that"
            )
        _, widths = self._level_of(options)
        bits, pinned = self._mean_bits(widths), _pinned_bits(options, self.planner.model.ladder)
        if options.speculate and pinned is not None and bits >= pinned:
            raise ValueError(
                f"steps are pinned to {pinned:.1f} bits, and drafts would run at {bits:.1f}: pin a "
                "higher width, give a lower draft_level, or set speculate to 0"
            )

    def changed(self, options: FlexQuantOptions) -> None:
        """Go by other options, which were checked, from now on."""
        control = self.control
        control.most, control.gate = options.speculate, options.draft_gate
        control.threshold = options.draft_entropy
        ways = (options.speculate, options.draft_gate, options.draft_entropy)
        # off and on again is no other way
        if options.speculate and ways != self._ways:
            self._ways = ways
            control.forget_gains()
        self.level, self.widths = self._level_of(options)
        self.mean_bits = self._mean_bits(self.widths)
        control.draft_cost = self._cost(self.widths)
        if self._drafts_at != (asked := (options.draft_level, options.draft_width)):
            self._drafts_at = asked
            control.greedy, control.sampled = self._acceptance()
            control.times.clear()

    def _mean_bits(self, widths: Array) -> float:
        return float((widths * self._share).sum())

    def _level_of(self, options: FlexQuantOptions) -> tuple[int | None, Array]:
        """The level at which drafts run, None if it is none, and its widths."""
        ladder = self.planner.model.ladder
        if options.draft_width is not None:
            return None, self.planner.state.rungs[0] * 0 + options.draft_width
        level = options.draft_level
        if level is None:
            level = self._recommended(options)
        if level >= len(ladder):
            raise ValueError(
                f"draft_level {level} is not on the ladder, which has levels 0 to {len(ladder) - 1}"
            )
        return level, self.planner.state.rungs[level]

    def _recommended(self, options: FlexQuantOptions) -> int:
        ladder = self.planner.model.ladder
        if self._drafts_record is None:
            bits = ladder.mean_bits
            return min(range(len(bits)), key=lambda n: abs(bits[n] - _UNCALIBRATED_BITS))
        top = len(ladder) - 1
        levels = [(top - found.steps, found.mean_greedy) for found in self._drafts_record.levels]
        return best_draft(levels, ladder.cost, max(options.speculate, 1)).level

    def _acceptance(self) -> tuple[Acceptance, Acceptance]:
        record, top = self._drafts_record, len(self.planner.model.ladder) - 1
        if record is None or self.level is None:
            return Acceptance(), Acceptance()
        wanted = top - self.level
        near = min(record.levels, key=lambda found: abs(found.steps - wanted))
        return (
            Acceptance(_where_seen(near.greedy, near.share), record.bin_nats, near.mean_greedy),
            Acceptance(_where_seen(near.sampled, near.share), record.bin_nats, near.mean_sampled),
        )

    def _cost(self, widths: Array) -> float:
        """Bytes read at `widths` over those at all bits."""
        assert self.planner.table is not None
        layers = self.planner.table.layers
        full = bytes_read(layers, [layer.widths[-1] for layer in layers])
        return bytes_read(layers, widths.tolist()) / max(full, 1)

    # ---- the step

    def begin(
        self,
        ids: Sequence[str],
        drafted: Sequence[int],
        kept: Sequence[int],
        rows: Sequence[int],
        sampling: bool = False,
    ) -> int:
        """Take in the step that has just been sampled; returns the tokens to draft at most.

        Args:
            ids: requests of the batch. drafted, kept: drafts of each that it verified and kept.
            rows: places of those that may draft. sampling: some of them sample.
        """
        now = time.perf_counter()
        self._sequences, self.control.sampling = len(ids), sampling
        # vLLM does not ask for drafts after every step
        if self.planner.steps != self._step + 1:
            self._pending, self._ids = {}, []
        self._book_kept(ids, drafted, kept)
        batch = self.planner.batch
        if self._ids == ids and batch is not None and not any(batch.prompt):
            step, tokens = now - self._ended, len(ids) + sum(kept)
            self.control.book_step(len(ids), sum(drafted), tokens, step, self._drafting)
            self.planner.book_seconds((step + self._drafting) * len(ids) / tokens)
            counts = self.counts
            counts.tokens += tokens
            if sum(drafted):
                counts.steps += 1
                counts.verify_seconds += step
            else:
                counts.plain_steps += 1
        self._drafting = 0.0
        self._drafts = {row: [] for row in rows}
        self._chances = dict.fromkeys(rows, 1.0)
        if not rows or not self._cheaper():
            return 0
        return self.control.length(len(ids))

    def _cheaper(self) -> bool:
        """Whether the step in force reads clearly more than a draft does."""
        return self.mean_bits < _CHEAPER * self._mean_bits(self.planner.state.table)

    def _book_kept(self, ids: Sequence[str], drafted: Sequence[int], kept: Sequence[int]) -> None:
        for request, count, good in zip(ids, drafted, kept, strict=True):
            # drafts that vLLM puts in place of some of ours are not known
            known = self._pending.get(request, ())[:count]
            for index, (nats, greedy) in enumerate(known[: good + 1]):
                self.control.of(greedy).book(nats, index < good)
            if self._trace.maxlen and known:
                self._trace.append(
                    {"request": request, "nats": [nats for nats, _ in known], "kept": good}
                )
            self.counts.verified += count > 0
            self.counts.drafted.update(range(count))
            self.counts.kept.update(range(good))

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """While drafts run, at their level."""
        began = time.perf_counter()
        with self.planner.drafting(self.widths):
            yield
        self._drafting = time.perf_counter() - began
        self.counts.draft_seconds += self._drafting

    def entropies(self, logits: torch.Tensor) -> list[float]:
        """Nats, of logits [rows, vocabulary]."""
        return torch.ops.flexquant.entropy(logits).tolist()

    def book_draft(self, seconds: float) -> None:
        """A forward pass has drafted one token for each row."""
        self.control.book_draft(self._sequences, seconds)

    def stop(
        self, rows: Sequence[int], nats: Sequence[float], greedy: Sequence[bool]
    ) -> tuple[list[int], list[int]]:
        """After a draft of each of `rows`: those that go on, and those whose draft is not worth
        verifying.

        Args:
            nats: entropies of the drafts. greedy: whether the request samples greedily.
        """
        control, kept, refused = self.control, [], []
        chances = []
        for row, entropy, sure in zip(rows, nats, greedy, strict=True):
            known: Acceptance = control.of(sure)
            chance = self._chances[row] * known.of(entropy)
            if not control.keeps(chance, entropy, self._sequences):
                refused.append(row)
                continue
            self._chances[row] = chance
            self._drafts[row].append((entropy, sure))
            kept.append(row)
            chances.append(chance * known.mean)
        on = control.goes_on(chances, self._sequences)
        return [row for row, wants in zip(kept, on, strict=True) if wants], refused

    def end(self, ids: Sequence[str]) -> None:
        """The drafts of this step are made; from now on the next step's time counts."""
        self._pending = {ids[row]: drafts for row, drafts in self._drafts.items() if drafts}
        self._ids, self._step = list(ids), self.planner.steps
        self._ended = time.perf_counter()

    # ---- the operator's view

    def status(self) -> dict[str, Any]:
        """As plain values, for `GET /v1/flexquant`."""
        counts, control = self.counts, self.control
        return {
            "most": control.most,
            "gate": control.gate,
            "draft_level": self.level,
            "draft_mean_bits": self.mean_bits,
            "drafted": [counts.drafted[i] for i in sorted(counts.drafted)],
            "accepted": [counts.kept[i] for i in sorted(counts.drafted)],
            "steps": counts.steps,
            "plain_steps": counts.plain_steps,
            "tokens": counts.tokens,
            "draft_seconds": counts.draft_seconds,
            "verify_seconds": counts.verify_seconds,
            "acceptance_by_entropy": {
                "greedy": control.greedy.table(),
                "sampled": control.sampled.table(),
            },
            "cost_table": control.cost_table(),
        }

    def trace(self) -> list[dict[str, Any]]:
        """The last `trace_steps` drafts that were verified: request, entropies in nats, how many
        were kept."""
        return list(self._trace)

    def gauges(self) -> Mapping[str, float]:
        """What `/metrics` shows as it is now."""
        found: dict[str, float] = {
            "draft_mean_bits": self.mean_bits,
            **({} if self.level is None else {"draft_level": self.level}),
            "speculation_on": float(any(self._drafts.values())),
        }
        if self.counts.verified:
            found["accepted_length"] = 1 + self.counts.kept.total() / self.counts.verified
        speedup = self.control.speedup(self._sequences)
        if speedup is not None:
            found["speculation_speedup"] = speedup
        return found

    def sums(self) -> dict[Any, float]:
        """What `/metrics` counts."""
        counts = self.counts
        return {
            "speculated_steps": counts.steps,
            "draft_seconds": counts.draft_seconds,
            "verify_seconds": counts.verify_seconds,
        }


def _pinned_bits(options: FlexQuantOptions, ladder: Ladder) -> float | None:
    """Mean bits of all steps, None where they differ or are all bits."""
    if options.policy not in PINNED:
        return None
    if options.width is not None:
        return float(options.width)
    return None if options.level is None else float(ladder.mean_bits[options.level])


def _where_seen(chances: Sequence[float], share: Sequence[float]) -> list[float]:
    """Chances by bin, those of bins with too few tokens as in the bin before."""
    found: list[float] = []
    for chance, seen in zip(chances, share, strict=True):
        found.append(chance if seen > _RARE or not found else found[-1])
    return found
