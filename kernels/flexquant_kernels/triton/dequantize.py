# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""A weight at a width, unpacked once: for so many rows that a matrix product of its own pays.

Codes are taken from the words as in ``kernel.py``; ``scale * code + offset`` is rounded to the
dtype of the activations, as a checkpoint in that dtype would be. Untested on GPUs.
"""

import torch
import triton
import triton.language as tl

from .checks import check_width
from .kernel import columns, excess, is_last, load_pairs, operand, parts, scale_and_offset, width_of
from .layout import PAD_ROWS, TILE_ROWS, DeviceWeight

DTYPES = (torch.bfloat16, torch.float16)
WARPS = 4


@triton.jit
def _write(
    out_ptr,
    planes,
    scales_ptr,
    zero,
    rows,
    block,
    blocks,
    sizes,  # (N, K, N_pad, first row of out)
    LAYOUT: tl.constexpr,
    WIDTH: tl.constexpr,
    SET: tl.constexpr,
    SHARED: tl.constexpr,
    G: tl.constexpr,
):
    """A block of 256 k of some rows."""
    N, K, n_pad, first = sizes
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    HIGH: tl.constexpr = 2 if (LAYOUT != 422 and WIDTH < 4) else 4
    LOW: tl.constexpr = WIDTH - HIGH
    PART_K: tl.constexpr = 32 if G == 32 else 64
    start = (0 if SHARED else SET) * blocks.to(tl.int64) * (256 // G) * n_pad
    pairs = columns(load_pairs(scales_ptr + start, rows, block, blocks, 256 // G))
    high, low = parts(planes, rows, block, blocks, LAYOUT, WIDTH)
    for part in tl.static_range(256 // PART_K):
        scale, offset = scale_and_offset(pairs[part * PART_K // G], SHARED, WIDTH)
        code = operand(high, zero, part, PART_K, HIGH, LOW, DTYPE).to(tl.float32)
        if LOW > 0:
            code += operand(low, zero, part, PART_K, LOW, 0, DTYPE).to(tl.float32)
        code -= excess(HIGH, LOW, part * PART_K // 64, tl.bfloat16 == DTYPE)
        rk = block * 256 + part * PART_K + tl.arange(0, PART_K)
        place = out_ptr + (rows - first).to(tl.int64)[:, None] * K + rk[None, :]
        weight = tl.fma(scale[:, None], code, offset[:, None])
        tl.store(place, weight.to(DTYPE), mask=(rows < N)[:, None] & (rk < K)[None, :])


@triton.jit
def _write_at_width(
    width,
    out_ptr,
    planes,
    scales_ptr,
    zero,
    rows,
    block,
    blocks,
    sizes,
    LAYOUT: tl.constexpr,
    SET: tl.constexpr,
    SHARED: tl.constexpr,
    G: tl.constexpr,
):
    """``_write`` at the least width from the SET-th on that is enough, else the highest."""
    WIDTH: tl.constexpr = width_of(LAYOUT, SET)
    if is_last(LAYOUT, SET):  # noqa: SIM114 - known to the compiler, unlike the next
        _write(out_ptr, planes, scales_ptr, zero, rows, block, blocks, sizes,
               LAYOUT, WIDTH, SET, SHARED, G)  # fmt: skip
    elif width <= WIDTH:
        _write(out_ptr, planes, scales_ptr, zero, rows, block, blocks, sizes,
               LAYOUT, WIDTH, SET, SHARED, G)  # fmt: skip
    else:
        _write_at_width(width, out_ptr, planes, scales_ptr, zero, rows, block, blocks, sizes,
                        LAYOUT, SET + 1, SHARED, G)  # fmt: skip


@triton.jit(
    do_not_specialize=["N", "blocks", "first", "top"],
    do_not_specialize_on_alignment=["width_ptr", "zero_ptr"],
)
def dequantize_kernel(
    p0,  # planes, scales, width and zero as in kernel.py
    p1,
    p2,
    p3,
    p4,
    scales_ptr,
    width_ptr,
    zero_ptr,
    out_ptr,  # bf16 or fp16 [rows from first on, K]
    N,
    K,
    blocks,
    n_pad,
    first,  # a multiple of BN
    top,  # the highest width whose planes there are
    LAYOUT: tl.constexpr,
    SHARED: tl.constexpr,
    G: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid (blocks, tiles of BN rows from first on)."""
    width = tl.minimum(tl.load(width_ptr), top)
    zero = tl.load(zero_ptr + tl.full((1, 1), 0, tl.int32)).to(tl.uint32, bitcast=True)
    planes = (p0, p1, p2, p3, p4)
    block = tl.program_id(0)
    rows = first + tl.program_id(1) * BN + tl.arange(0, BN)
    sizes = (N, K, n_pad, first)
    _write_at_width(width, out_ptr, planes, scales_ptr, zero, rows, block, blocks, sizes,
                    LAYOUT, 0, SHARED, G)  # fmt: skip


def dequantize(
    weight: DeviceWeight,
    width: torch.Tensor,
    dtype: torch.dtype,
    first: int = 0,
    last: int | None = None,
) -> torch.Tensor:
    """Rows [first, last) of the weight at the width, bf16 or fp16 [last - first, k].

    Args:
        width: int32, one element, read on the device.
        first, last: rows; ``first`` a multiple of 64.

    Raises:
        ValueError: a width, dtype or range of rows that cannot be taken as it is.
    """
    last = weight.n if last is None else last
    form = weight.form
    check_width(width, weight.scales.device)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}: give bfloat16 or float16")
    if not 0 <= first <= last <= weight.n or first % PAD_ROWS:
        raise ValueError(
            f"rows [{first}, {last}) of {weight.n}: give some of them, the first a multiple of "
            f"{PAD_ROWS}"
        )
    out = torch.empty(last - first, weight.k, dtype=dtype, device=width.device)
    if first == last:
        return out
    blocks = weight.planes[0].shape[1]
    dequantize_kernel[(blocks, -(-(last - first) // PAD_ROWS))](
        *weight.five_planes(),
        weight.scales.view(torch.int32),
        width,
        weight.counters[-1:],
        out,
        last,
        weight.k,
        blocks,
        weight.planes[0].shape[0] * TILE_ROWS,
        first,
        form.widths[-1],
        LAYOUT=form.digits,
        SHARED=form.shared,
        G=form.group_size,
        BN=PAD_ROWS,
        num_warps=WARPS,
    )
    return out
