# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The probe: from one hidden state to the widths of the layers after it, in one launch.

A program scores a row, ``exp(w . x + b)``; whichever is last adds the scores up, in the order of
the rows and in fp64, so that it does not matter which is. It takes the cheapest level of the ladder
whose calibrated KL times that aggregate is within the budget, and writes the table's later entries,
within the bounds that the decision left (``decision.py``). Addresses and grid follow from shapes.
Untested on GPUs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .checks import check_tensor
from .decision import LAYERS_AT_A_TIME, write_table

AGGREGATES = ("mean", "max")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_H = 1024
ROWS_AT_A_TIME = 1024
WARPS = 4


@triton.jit(do_not_specialize=["levels", "layers", "first"])
def probe_kernel(
    x_ptr,  # fp32, bf16 or fp16 [rows, H], any stride of rows
    live_ptr,  # bool [rows]
    weight_ptr,  # fp32 [H]
    bias_ptr,  # fp32 [1]
    kl_ptr,  # fp32 [levels]
    budget_ptr,  # fp32 [1]
    ladder_ptr,  # int32 [levels, layers]
    allowed_ptr,  # int32 [layers, 9]
    bounds_ptr,  # int32 [3]: low, high, whether to write
    counter_ptr,  # int32 [1], zero before and after
    scores_ptr,  # fp32 [rows], written
    level_ptr,  # int32 [1], written
    table_ptr,  # int32 [layers], written from `first` on
    stride_row,
    H,
    levels,
    layers,
    first,
    MAXIMUM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,  # a power of two, at least levels
    LAYERS: tl.constexpr,
):
    """Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    products = tl.full((BLOCK_H,), 0.0, tl.float32)
    for start in range(0, H, BLOCK_H):
        column = start + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + row * stride_row + column, mask=column < H, other=0.0)
        weight = tl.load(weight_ptr + column, mask=column < H, other=0.0)
        products += x.to(tl.float32) * weight
    score = tl.exp(tl.sum(products, axis=0) + tl.load(bias_ptr))
    tl.store(scores_ptr + row, score)
    tl.debug_barrier()  # the score is stored before a thread says so
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == rows - 1:
        tl.store(counter_ptr, 0)
        sums = tl.full((ROWS,), 0.0, tl.float64)
        largest = tl.full((ROWS,), float("-inf"), tl.float32)
        counts = tl.full((ROWS,), 0, tl.int32)
        for start in range(0, rows, ROWS):
            index = start + tl.arange(0, ROWS)
            live = tl.load(live_ptr + index, mask=index < rows, other=0) != 0
            scores = tl.load(scores_ptr + index, mask=live, other=0.0, cache_modifier=".cg")
            scores = tl.where(scores < float("inf"), scores, float("inf"))  # NaN too
            sums += scores.to(tl.float64)
            largest = tl.maximum(largest, tl.where(live, scores, float("-inf")))
            counts += live.to(tl.int32)
        count = tl.sum(counts, axis=0)
        if MAXIMUM:
            aggregate = tl.max(largest, axis=0)
        else:
            total = tl.sum(sums, axis=0)
            aggregate = (total / tl.maximum(count, 1).to(tl.float64)).to(tl.float32)
        if (count > 0) & (tl.load(bounds_ptr + 2) != 0):
            index = tl.arange(0, LEVELS)
            kl = tl.load(kl_ptr + index, mask=index < levels, other=float("inf"))
            within = kl * aggregate <= tl.load(budget_ptr)
            level = tl.min(tl.where(within & (index < levels), index, levels - 1), axis=0)
            tl.store(level_ptr, level)
            low, high = tl.load(bounds_ptr), tl.load(bounds_ptr + 1)
            write_table(table_ptr, ladder_ptr, allowed_ptr, level, first, layers, low, high, LAYERS)


@dataclass(frozen=True)
class ProbeState:
    """All that a probe reads and writes but the hidden states, at addresses that stay.

    weight: fp32 [H]; bias: fp32 [1].
    kl: fp32 [levels], calibrated mean KL in nats a token at each level; budget: fp32 [1], likewise.
    bounds, ladder, allowed, table: as in ``DecisionState``.
    first: the first layer, by its entry in the table, that the probe decides.
    level: int32 [1], written: the level chosen last. counter: int32 [1], zero between launches, so
        that launches of one state must not overlap.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    kl: torch.Tensor
    budget: torch.Tensor
    bounds: torch.Tensor
    ladder: torch.Tensor
    allowed: torch.Tensor
    table: torch.Tensor
    first: int
    aggregate: str
    level: torch.Tensor
    counter: torch.Tensor

    def __post_init__(self) -> None:
        levels, layers = len(self.kl), len(self.allowed)
        for name, dtype, shape in (
            ("weight", torch.float32, (len(self.weight),)),
            ("bias", torch.float32, (1,)),
            ("kl", torch.float32, (levels,)),
            ("budget", torch.float32, (1,)),
            ("bounds", torch.int32, (3,)),
            ("ladder", torch.int32, (max(len(self.ladder), levels), layers)),
            ("allowed", torch.int32, (layers, 9)),
            ("table", torch.int32, (max(len(self.table), layers),)),
            ("level", torch.int32, (1,)),
            ("counter", torch.int32, (1,)),
        ):
            check_tensor(name, getattr(self, name), dtype, shape, self.table.device)
        if levels == 0:
            raise ValueError("kl has no level: give the KL of each level of the ladder")
        if not 0 <= self.first <= layers:
            raise ValueError(f"first is {self.first} of {layers} layers: give 0 to {layers}")
        if self.aggregate not in AGGREGATES:
            raise ValueError(f"aggregate is {self.aggregate!r}: give one of {AGGREGATES}")


def probe(x: torch.Tensor, live: torch.Tensor, state: ProbeState) -> torch.Tensor:
    """Score rows and decide the later layers; -> scores, fp32 [rows].

    The table stays as it is where no row is live, or the bounds say that nothing is to be decided.
    A score that is not finite asks for the best level.

    Args:
        x: fp32, bf16 or fp16 [rows, H], rows of contiguous numbers: what the probe's layer gets.
        live: bool [rows], rows that count.
    """
    if x.dtype not in DTYPES or x.dim() != 2 or x.shape[1] != len(state.weight):
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}: give float32, bfloat16 or float16 "
            f"[rows, {len(state.weight)}]"
        )
    if x.stride(1) != 1:
        raise ValueError(f"x has strides {x.stride()}: pass x.contiguous()")
    if x.device != state.table.device:
        raise ValueError(f"x is on {x.device} but the table on {state.table.device}: move one")
    check_tensor("live", live, torch.bool, (len(x),), x.device)
    scores = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x) == 0:
        return scores
    probe_kernel[(len(x),)](
        x,
        live,
        state.weight,
        state.bias,
        state.kl,
        state.budget,
        state.ladder,
        state.allowed,
        state.bounds,
        state.counter,
        scores,
        state.level,
        state.table,
        x.stride(0),
        len(state.weight),
        len(state.kl),
        len(state.allowed),
        state.first,
        MAXIMUM=state.aggregate == "max",
        BLOCK_H=BLOCK_H,
        ROWS=ROWS_AT_A_TIME,
        LEVELS=triton.next_power_of_2(len(state.kl)),
        LAYERS=LAYERS_AT_A_TIME,
        num_warps=WARPS,
    )
    return scores
