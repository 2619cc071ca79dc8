# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The decision before a step: from entropies, floors and ladder to the precision table.

One launch of one program, and no host read: what the host knows of the batch, and the rules that an
operator may change, lie in buffers at addresses that stay, so that a captured launch stays valid.
What comes out is what the planner's policy ``entropy`` computes in NumPy, bit by bit; so products
and sums are not contracted. Untested on GPUs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .checks import check_tensor

AGGREGATES = ("mean", "quantile", "max")
MAX_ROWS = 4096
LAYERS_AT_A_TIME = 256
WARPS = 4
_WANTED = 9
"""Widths from 0 to 8 bits that a table of widths answers."""


@triton.jit
def _round(x):
    """To nearest, ties to even, of 0 <= x < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _nth(values, counts, rank):
    """The value of this rank, ascending from 0, among fp32 values that count."""
    bits = values.to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)  # ordered as the values are
    low = tl.full((), -0x80000000, tl.int64)
    high = tl.full((), 0x7FFFFFFF, tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        enough = tl.sum((counts & (keys <= middle)).to(tl.int32), axis=0) > rank
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    found = high.to(tl.int32)
    return tl.where(found < 0, found ^ 0x7FFFFFFF, found).to(tl.float32, bitcast=True)


@triton.jit
def write_table(
    table_ptr, ladder_ptr, allowed_ptr, level, first, layers, low, high, LAYERS: tl.constexpr
):
    """Entries of the layers from ``first`` on: a rung of the ladder within [low, high]."""
    for start in range(first, layers, LAYERS):
        layer = start + tl.arange(0, LAYERS)
        mask = layer < layers
        width = tl.load(ladder_ptr + level.to(tl.int64) * layers + layer, mask=mask, other=8)
        width = tl.minimum(tl.maximum(width, low), high)
        tl.store(table_ptr + layer, tl.load(allowed_ptr + layer * 9 + width, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["levels", "layers"])
def decision_kernel(
    facts_ptr,  # int32 [rows, 3]: slot (-1: no row), prompt, floor
    average_ptr,  # fp32 [slots + 1]
    seen_ptr,  # bool [slots + 1]
    thresholds_ptr,  # fp64 [4]: low, high, hysteresis, quantile
    choices_ptr,  # int32 [6]: pinned, aggregate, dwell, min_bits, max_bits, prefill at all bits
    limits_ptr,  # int32 [2, 9]: least width at or above, greatest at or below
    ladder_ptr,  # int32 [levels + 1, layers], the last rung at all bits
    allowed_ptr,  # int32 [layers, 9]
    level_ptr,  # int32 [1]
    held_ptr,  # int32 [1]
    bounds_ptr,  # int32 [3]
    table_ptr,  # int32 [layers]
    rows,
    levels,
    layers,
    ROWS: tl.constexpr,  # a power of two, at least rows
    LAYERS: tl.constexpr,
):
    """Grid (1,)."""
    last_level = tl.load(level_ptr)
    last_held = tl.load(held_ptr)
    pinned = tl.load(choices_ptr) != 0
    aggregate = tl.load(choices_ptr + 1)
    dwell = tl.load(choices_ptr + 2)
    low_nats = tl.load(thresholds_ptr)
    high_nats = tl.load(thresholds_ptr + 1)
    row = tl.arange(0, ROWS)
    slot = tl.load(facts_ptr + row * 3, mask=row < rows, other=-1)
    live = slot >= 0
    prompt = tl.load(facts_ptr + row * 3 + 1, mask=live, other=0) != 0
    floor = tl.max(tl.load(facts_ptr + row * 3 + 2, mask=live, other=0), axis=0)
    decodes = live & (prompt == 0)
    known = decodes & (tl.load(seen_ptr + slot, mask=decodes, other=0) != 0)
    nats = tl.load(average_ptr + slot, mask=decodes, other=0.0)
    decoding = tl.sum(decodes.to(tl.int32), axis=0)
    count = tl.sum(known.to(tl.int32), axis=0)

    nats = tl.where(nats != nats, float("inf"), nats)
    nats = tl.minimum(nats, (high_nats * tl.maximum(decoding, 1).to(tl.float64)).to(tl.float32))
    if aggregate == 0:
        total = tl.sum(tl.where(known, nats, 0.0).to(tl.float64), axis=0)
        combined = (total / tl.maximum(count, 1).to(tl.float64)).to(tl.float32)
    elif aggregate == 1:
        quantile = tl.load(thresholds_ptr + 3).to(tl.float32)
        rank = _round(tl.maximum(count - 1, 0).to(tl.float32) * quantile).to(tl.int32)
        combined = _nth(nats, known, rank)
    else:
        combined = tl.max(tl.where(known, nats, float("-inf")), axis=0)
    top = levels - 1
    share = tl.div_rn(combined - low_nats.to(tl.float32), (high_nats - low_nats).to(tl.float32))
    share = tl.minimum(tl.maximum(share, 0.0), 1.0)
    wanted = _round(share * top.to(tl.float32)).to(tl.int32)
    least = (tl.load(thresholds_ptr + 2) * top.to(tl.float64)).to(tl.float32)
    moves = tl.abs(wanted - last_level).to(tl.float32) > least
    moves = moves | ((wanted != last_level) & ((wanted == 0) | (wanted == top)))
    moves = moves & (last_held + 1 >= dwell) & (count > 0)
    decides = (decoding > 0) & (pinned == 0)
    level = tl.where(decides & moves, wanted, last_level)
    held = tl.where(decides, tl.where(moves, 0, last_held + 1), last_held)

    whole = (tl.sum((live & prompt).to(tl.int32), axis=0) > 0) & (pinned == 0)
    whole = whole & (tl.load(choices_ptr + 5) != 0)
    low = tl.load(limits_ptr + tl.maximum(tl.load(choices_ptr + 3), floor))
    high = tl.maximum(tl.load(limits_ptr + 9 + tl.load(choices_ptr + 4)), low)
    tl.debug_barrier()  # all threads have read level and held before one writes them
    tl.store(level_ptr, level)
    tl.store(held_ptr, held)
    tl.store(bounds_ptr, low)
    tl.store(bounds_ptr + 1, high)
    tl.store(bounds_ptr + 2, ((whole == 0) & (pinned == 0)).to(tl.int32))
    rung = tl.where(whole, levels, level)
    write_table(table_ptr, ladder_ptr, allowed_ptr, rung, 0, layers, low, high, LAYERS)


@dataclass(frozen=True)
class Rules:
    """What an operator may change; fields are those of ``FlexQuantOptions``.

    pinned: the level stays as it is, whatever the batch (policies static and manual).
    min_bits, max_bits: under a pinned width, both are that width.
    """

    pinned: bool
    entropy_low: float
    entropy_high: float
    hysteresis: float
    dwell: int
    aggregate: str
    quantile: float
    min_bits: int
    max_bits: int
    prefill_full: bool


@dataclass(frozen=True)
class DecisionState:
    """All that decisions read and write, on one device, at addresses that stay.

    facts: int32 [rows, 3] of each row of the batch: its slot, -1 where there is no row; whether it
        computes prompt tokens; the lowest width in bits that its request asked for, 0 for none.
    average, seen: entropy of sequences by slot, fp32 [slots + 1] nats and bool [slots + 1].
    level, held: int32 [1], as ``Decision`` of the policies.
    bounds: int32 [3], written: lowest and highest width of this step, and whether later layers may
        still be decided (by ``probe.py``).
    table: int32, the precision table; its first ``layers`` entries are written.
    """

    facts: torch.Tensor
    average: torch.Tensor
    seen: torch.Tensor
    thresholds: torch.Tensor
    choices: torch.Tensor
    limits: torch.Tensor
    ladder: torch.Tensor
    allowed: torch.Tensor
    level: torch.Tensor
    held: torch.Tensor
    bounds: torch.Tensor
    table: torch.Tensor

    def adopt(self, rules: Rules) -> None:
        """Decide by other rules from the next step on.

        Raises:
            ValueError: the aggregate is unknown, or a bound is no width.
        """
        for name, bits in (("min_bits", rules.min_bits), ("max_bits", rules.max_bits)):
            if not 0 <= bits < _WANTED:
                raise ValueError(f"{name} is {bits}: give 0 to {_WANTED - 1}")
        if rules.aggregate not in AGGREGATES:
            raise ValueError(f"aggregate is {rules.aggregate!r}: give one of {AGGREGATES}")
        floats = (rules.entropy_low, rules.entropy_high, rules.hysteresis, rules.quantile)
        self.thresholds.copy_(torch.tensor(floats, dtype=torch.float64))
        whole = (
            rules.pinned,
            AGGREGATES.index(rules.aggregate),
            rules.dwell,
            rules.min_bits,
            rules.max_bits,
            rules.prefill_full,
        )
        self.choices.copy_(torch.tensor(whole, dtype=torch.int32))

    def announce(self, slots: Sequence[int], prompt: Sequence[bool], floors: Sequence[int]) -> None:
        """Write the facts of a batch, in one copy.

        Raises:
            ValueError: more rows than there is room for, or a slot or a width that there is not.
        """
        if len(slots) > len(self.facts):
            raise ValueError(
                f"the batch has {len(slots)} rows but there is room for {len(self.facts)}: "
                "make the state for more rows"
            )
        # the kernel would read whatever lies there
        if max(slots, default=0) >= len(self.average):
            raise ValueError(f"slot {max(slots)} is none: there are {len(self.average)}")
        if max(floors, default=0) >= _WANTED:
            raise ValueError(f"a floor is {max(floors)} bits: give 0 to {_WANTED - 1}")
        host = torch.tensor([[-1, 0, 0]], dtype=torch.int32).repeat(len(self.facts), 1)
        rows = list(zip(slots, map(int, prompt), floors, strict=True))
        host[: len(rows)] = torch.tensor(rows, dtype=torch.int32).reshape(-1, 3)
        self.facts.copy_(host, non_blocking=True)


def make_state(
    ladder: torch.Tensor,
    allowed: torch.Tensor,
    average: torch.Tensor,
    seen: torch.Tensor,
    table: torch.Tensor,
    rows: int,
) -> DecisionState:
    """The state of decisions that write ``table``, at the best level, on the device of ``table``.

    Args:
        ladder: int32 [levels, layers], level 0 the cheapest.
        allowed: int32 [layers, 9], the width at which each layer runs when some width is wanted;
            it has them at 8.
        average, seen: fp32 and bool [slots + 1], kept by reference.
        table: int32 [at least layers], kept by reference.
        rows: of a batch, at most.

    Raises:
        ValueError: a tensor has another dtype, shape or device, or is not contiguous.
    """
    if ladder.dim() != 2 or ladder.numel() == 0:
        raise ValueError(f"ladder is {tuple(ladder.shape)}: give [levels, layers], one at least")
    levels, layers = ladder.shape
    for name, t, dtype, shape in (
        ("ladder", ladder, torch.int32, (levels, layers)),
        ("allowed", allowed, torch.int32, (layers, _WANTED)),
        ("average", average, torch.float32, (len(average),)),
        ("seen", seen, torch.bool, (len(average),)),
        ("table", table, torch.int32, (max(len(table), layers),)),
    ):
        check_tensor(name, t, dtype, shape, table.device)
    if not 0 < rows <= MAX_ROWS:
        raise ValueError(f"rows is {rows}: give 1 to {MAX_ROWS}")
    known = sorted(set(allowed.unique().tolist()))
    at_least = [next((w for w in known if w >= bits), known[-1]) for bits in range(_WANTED)]
    at_most = [next((w for w in known[::-1] if w <= bits), known[0]) for bits in range(_WANTED)]

    def of(values: object, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=table.device)

    return DecisionState(
        facts=of([[-1, 0, 0]] * rows),
        average=average,
        seen=seen,
        thresholds=of([0.0] * 4, torch.float64),
        choices=of([1, 0, 1, known[0], known[-1], 1]),
        limits=of([at_least, at_most]),
        ladder=torch.cat([ladder, allowed[:, -1:].T]).contiguous(),
        allowed=allowed,
        level=of([levels - 1]),
        held=of([0]),
        bounds=of([known[0], known[-1], 0]),
        table=table,
    )


def decide(state: DecisionState) -> None:
    """Decide the widths of a step from the facts announced, and write the precision table."""
    decision_kernel[(1,)](
        state.facts,
        state.average,
        state.seen,
        state.thresholds,
        state.choices,
        state.limits,
        state.ladder,
        state.allowed,
        state.level,
        state.held,
        state.bounds,
        state.table,
        len(state.facts),
        len(state.ladder) - 1,
        state.ladder.shape[1],
        ROWS=triton.next_power_of_2(len(state.facts)),
        LAYERS=LAYERS_AT_A_TIME,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
