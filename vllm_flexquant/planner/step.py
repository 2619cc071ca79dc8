# SPDX-License-Identifier: Apache-2.0
"""What a step is: what vLLM says of its batch, and what the planner makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vllm_flexquant.policy.arrays import Array


class Batch(NamedTuple):
    """Host facts of one step, in the order of the batch.

    slots: slot of each request. prompt: the step computes prompt tokens of it, or tokens of its
    answer that were computed before it was preempted. discarded: the token sampled for it is thrown
    away (a chunk that is not the last). rows: its last row in what the forward pass computes.
    positions: tokens that it has generated.
    """

    request_ids: Sequence[str]
    slots: Sequence[int]
    prompt: Sequence[bool]
    discarded: Sequence[bool]
    rows: Sequence[int]
    positions: Sequence[int]


@dataclass(frozen=True)
class BatchFacts:
    """What stays the same while the batch does.

    floor: the highest of the lowest widths that were granted, bits. decoding: places of the
    sequences that decode. sequences: int64 [4, n] of those, as `StepFacts` has them. logit_slots:
    int64 [requests], where the entropies of the logits go. prompts: some sequence does not decode.
    """

    floor: int = 0
    decoding: Sequence[int] = ()
    sequences: Array = None
    logit_slots: Array = None
    prompts: bool = False


class RanAt(NamedTuple):
    """What a step of decoding alone ran at: bounds of widths in bits, levels of the layers before
    and after the probe."""

    low: int
    high: int
    first: int
    later: int
