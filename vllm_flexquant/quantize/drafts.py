# SPDX-License-Identifier: Apache-2.0
"""How levels of the ladder would do as drafts for the best one, as far as their entropy tells.

Every token is drafted after the tokens of the text, not after drafts: what is measured is the
acceptance of a draft whose predecessors were all accepted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vllm_flexquant.format.record import DraftLevelRecord, DraftsRecord, RungRecord
from vllm_flexquant.quantize import evaluate
from vllm_flexquant.quantize.bins import BIN_NATS, mean_by_bin, share_by_bin
from vllm_flexquant.quantize.parallel import Report, Workers

LEVELS = 6
"""Levels that are measured, at most."""


def draft_levels(rungs: Sequence[RungRecord], count: int = LEVELS) -> list[int]:
    """Steps down the ladder of at most `count` levels below the best, ascending.

    Evenly by mean bits from the cheapest, which is always one of them, to just below the best.
    """
    best, *drafts = rungs
    if not drafts:
        return []
    low = drafts[-1].mean_bits
    wanted = [low + i / count * (best.mean_bits - low) for i in range(count)]
    apart = [[abs(rung.mean_bits - bits) for rung in drafts] for bits in wanted]
    return sorted({drafts[row.index(min(row))].steps for row in apart})


def measure_drafts(
    nested: evaluate.NestedModel,
    workers: Workers,
    tokens: torch.Tensor,
    best: evaluate.Widths,
    levels: Mapping[int, evaluate.Widths],
    report: Report,
) -> DraftsRecord:
    """What the best level makes of tokens that other levels draft.

    Args:
        tokens: int64 [sequences, length].
        best: widths of the units at the best level.
        levels: likewise of the drafting levels, by steps down the ladder, ascending.
    """
    found = workers.compare(nested, tokens, list(levels.values()), report, draft_facts, best)
    records = []
    for steps, (kl, entropy, greedy, sampled) in zip(levels, found.unbind(1), strict=True):
        records.append(
            DraftLevelRecord(
                steps=steps,
                kl_nats=float(kl.mean()),
                mean_greedy=float(greedy.mean()),
                mean_sampled=float(sampled.mean()),
                share=share_by_bin(entropy),
                greedy=_shares(mean_by_bin(entropy, greedy)),
                sampled=_shares(mean_by_bin(entropy, sampled)),
            )
        )
    return DraftsRecord(bin_nats=BIN_NATS, levels=tuple(records))


def draft_facts(best: torch.Tensor, probability: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """As `evaluate.Facts`: KL(best || draft) and the draft's entropy in nats, whether both have the
    same most likely token, and how probable it is that a token drawn from the draft is kept."""
    drafted = draft.exp()
    same = (best.argmax(-1) == draft.argmax(-1)).float()
    kept = torch.minimum(probability, drafted).sum(-1).clamp(max=1.0)
    (kl,) = evaluate.kl_alone(best, probability, draft)
    return torch.stack([kl, -(drafted * draft).sum(-1), same, kept])


def _shares(values: Sequence[float]) -> tuple[float, ...]:
    """Without what rounding adds."""
    return tuple(min(max(value, 0.0), 1.0) for value in values)
