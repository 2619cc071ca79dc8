# SPDX-License-Identifier: Apache-2.0
"""What a step is: facts of its batch, what is held of its requests, and its record."""

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
class Held:
    """What is held of the request in a slot: the number of its class, its lowest width in bits."""

    number: int
    floor: int = 0


@dataclass
class StepRecord:
    """One step as `flexquant_trace` returns it. Entropies in nats, None where there are none.

    first_level: of the layers before the probe, where it is not `level`.
    """

    step: int
    request_ids: list[str]
    prompt: list[bool]
    level: int
    widths: list[int]
    average: list[float | None]
    entropy: list[float | None] | None = None
    first_level: int | None = None
    scores: list[float] | None = None


@dataclass(frozen=True)
class BatchFacts:
    """What the controller makes of a `Batch`.

    floor: the highest of the lowest widths that were promised, bits. decoding: places of the
    sequences that decode. sequences: int64 [4, n] of those, as `BudgetSteps` has them. logit_slots:
    int64 [rows], where the entropies of the logits go.
    """

    floor: int = 0
    decoding: Sequence[int] = ()
    sequences: Array = None
    logit_slots: Array = None
