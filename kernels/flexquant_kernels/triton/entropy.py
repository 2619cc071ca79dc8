# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Entropy of softmax(logits) of each row, which reads each logit once.

A program takes CHUNK logits of a row and keeps their maximum m, ``s = sum exp(x - m)`` and
``t = sum exp(x - m) * (x - m)``; a second launch joins the chunks of a row,

    m = max m_i,   s = sum w_i s_i,   t = sum w_i (t_i + (m_i - m) s_i),   w_i = exp(m_i - m)
    entropy = log s - t / s

and can fold the entropy into the moving average of the row's sequence. Chunks depend on the
vocabulary alone and are joined in one order, so a row has the same bits in any batch. Untested on
GPUs.
"""

import torch
import triton
import triton.language as tl

from .checks import check_tensor

CHUNK = 8192
CHUNK_WARPS = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def chunk_kernel(
    logits_ptr,  # fp32, bf16 or fp16 [rows, V], any strides
    partial_ptr,  # fp32 [rows, chunks, 3]: m, s, t
    V,
    stride_row,
    stride_v,
    CHUNK: tl.constexpr,
):
    """Grid (rows, chunks)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    place = logits_ptr + row * stride_row + column.to(tl.int64) * stride_v
    x = tl.load(place, mask=column < V, other=float("-inf")).to(tl.float32)
    m = tl.max(x, axis=0)
    # A chunk of -inf alone has s = 0. A NaN or +inf anywhere makes s NaN.
    shifted = x - tl.where(m == float("-inf"), 0.0, m)
    p = tl.exp(shifted)
    out = partial_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * 3
    tl.store(out, m)
    tl.store(out + 1, tl.sum(p, axis=0))
    tl.store(out + 2, tl.sum(tl.where(p == 0.0, p, p * shifted), axis=0))


@triton.jit(do_not_specialize=["chunks", "discard", "decay"])
def join_kernel(
    partial_ptr,  # fp32 [rows, chunks, 3]
    entropy_ptr,  # fp32 [rows]
    slots_ptr,  # int64 [rows]
    average_ptr,  # fp32 [discard + 1]
    seen_ptr,  # bool [discard + 1]
    chunks,
    discard,
    decay,
    CHUNKS: tl.constexpr,  # a power of two, at least chunks
    TRACK: tl.constexpr,
):
    """Grid (rows,)."""
    row = tl.program_id(0)
    index = tl.arange(0, CHUNKS)
    place = partial_ptr + (row.to(tl.int64) * chunks + index) * 3
    mask = index < chunks
    m = tl.load(place, mask=mask, other=float("-inf"))
    s = tl.load(place + 1, mask=mask, other=0.0)
    t = tl.load(place + 2, mask=mask, other=0.0)
    moved = tl.where(s == 0.0, 0.0, m - tl.max(m, axis=0))
    weight = tl.exp(moved)
    total = tl.sum(s * weight, axis=0)
    # moved is -inf where a chunk is too far below to count
    moment = tl.sum(tl.where(weight == 0.0, 0.0, (t + moved * s) * weight), axis=0)
    entropy = tl.log(total) - tl.div_rn(moment, total)
    tl.store(entropy_ptr + row, entropy)
    if TRACK:
        slot = tl.load(slots_ptr + row)
        before = tl.load(average_ptr + slot)
        mixed = entropy + decay * (before - entropy)
        usable = tl.load(seen_ptr + slot).to(tl.int1) & (tl.abs(mixed) < float("inf"))
        counts = slot < discard
        tl.store(average_ptr + slot, tl.where(usable, mixed, entropy), mask=counts)
        tl.store(seen_ptr + slot, tl.full((), 1, tl.int1), mask=counts)


def _check(logits: torch.Tensor) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}: give [rows, vocabulary]")
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits have dtype {logits.dtype}: give float32, bfloat16 or float16")


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Shannon entropy of softmax(logits) in nats, [rows, V] -> fp32 [rows].

    As ``reference.entropy``: masked logits (-inf) contribute nothing; a row that is all -inf, or
    has a NaN or +inf, gives NaN. Any strides; two launches.
    """
    _check(logits)
    return _entropy(logits, None, None, None, 0.0)


def track_entropy(
    logits: torch.Tensor,
    slots: torch.Tensor,
    average: torch.Tensor,
    seen: torch.Tensor,
    decay: float,
) -> torch.Tensor:
    """``entropy``, folded into the moving averages of sequences in the same two launches.

    Args:
        slots: int64 [rows], the sequence of each row; none twice, but for the last slot, whose
            rows count for no sequence.
        average: fp32 [slots + 1] nats, changed in place.
        seen: bool [slots + 1], changed in place: whether ``average`` holds anything.
        decay: weight of the past; where it or the present is not finite, the present replaces it.
    """
    _check(logits)
    for name, t, dtype, length in (
        ("slots", slots, torch.int64, len(logits)),
        ("average", average, torch.float32, len(average)),
        ("seen", seen, torch.bool, len(average)),
    ):
        check_tensor(name, t, dtype, (length,), logits.device)
    return _entropy(logits, slots, average, seen, decay)


def _entropy(
    logits: torch.Tensor,
    slots: torch.Tensor | None,
    average: torch.Tensor | None,
    seen: torch.Tensor | None,
    decay: float,
) -> torch.Tensor:
    rows, vocabulary = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return out
    chunks = max(1, -(-vocabulary // CHUNK))
    partial = torch.empty(rows, chunks, 3, dtype=torch.float32, device=logits.device)
    chunk_kernel[(rows, chunks)](
        logits, partial, vocabulary, *logits.stride(), CHUNK=CHUNK, num_warps=CHUNK_WARPS
    )
    join_kernel[(rows,)](
        partial,
        out,
        partial if slots is None else slots,
        partial if average is None else average,
        partial if seen is None else seen,
        chunks,
        0 if average is None else len(average) - 1,
        decay,
        CHUNKS=triton.next_power_of_2(chunks),
        TRACK=slots is not None,
        num_warps=1,
    )
    return out
