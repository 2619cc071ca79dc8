# SPDX-License-Identifier: Apache-2.0
"""Host side of the Triton linear kernel: checks, shape of the launch, the launch."""

from functools import cache

import torch

from .kernel import INTERPRETED, linear_kernel
from .layout import BLOCK_K, COUNTERS, TILE_ROWS, DeviceWeight

DTYPES = (torch.bfloat16, torch.float16)
BN = 64
WARPS = {8: 2, 16: 4, 32: 4}
"""Rows of x that one program takes, and its warps."""
STAGES = 2
MAX_SPLIT_ROWS = 8 * COUNTERS

_PROGRAMS_PER_PROCESSOR = 4


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def row_blocks(target: str) -> tuple[int, ...]:
    """Rows that a program may take on sm_90, gfx942, ...; further rows take further programs.

    By what was compiled: with 64 rows, or on sm_120 with 32, the kernel spills registers. On sm_100
    four warps bring in its other tensor cores, which unpacked weights do not reach from registers.
    AMD's matrix products take 16 rows at least.
    """
    if target.startswith("gfx"):
        return (16, 32)
    return {"sm_100": (8,), "sm_103": (8,), "sm_120": (8, 16), "sm_121": (8, 16)}.get(
        target, tuple(WARPS)
    )


@cache
def _target(device: torch.device) -> str:
    if device.type != "cuda":
        return "none"
    if torch.version.hip is not None:
        return "gfx"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def row_block(rows: int, target: str) -> int:
    """Rows of x in a program's tile."""
    blocks = row_blocks(target)
    return next((b for b in blocks if rows <= b), blocks[-1])


def choose_splits(rows: int, bm: int, n: int, k: int, processors: int) -> int:
    """Parts of K that programs of their own take; from shapes and device alone, never the width."""
    if rows > MAX_SPLIT_ROWS:
        return 1
    tiles = -(-n // BN) * -(-rows // bm)
    blocks = -(-k // BLOCK_K)
    return max(1, min(blocks, _PROGRAMS_PER_PROCESSOR * processors // tiles))


def _check(
    x: torch.Tensor, weight: DeviceWeight, width: torch.Tensor, bias: torch.Tensor | None
) -> None:
    device = weight.scales.device
    for name, t in (("x", x), ("width", width), ("bias", bias)):
        if t is not None and t.device != device:
            raise ValueError(f"{name} is on {t.device} but the weight on {device}: move one")
    if x.dtype not in DTYPES:
        raise ValueError(f"x has dtype {x.dtype}: give bfloat16 or float16")
    if x.dim() == 0 or x.shape[-1] != weight.k:
        raise ValueError(
            f"x has shape {tuple(x.shape)} but the weight has k = {weight.k}: "
            "the last dimension must equal k"
        )
    if not x.is_contiguous():
        raise ValueError(f"x has strides {x.stride()}: pass x.contiguous()")
    if width.dtype != torch.int32 or width.numel() != 1:
        raise ValueError(
            f"width is {width.dtype} with {width.numel()} elements: give one int32, "
            "an entry of the precision table"
        )
    if bias is not None:
        if tuple(bias.shape) != (weight.n,) or not bias.is_floating_point():
            raise ValueError(
                f"bias is {bias.dtype} {tuple(bias.shape)}: give a float tensor [{weight.n}]"
            )
        if not bias.is_contiguous():
            raise ValueError(f"bias has strides {bias.stride()}: pass bias.contiguous()")


def linear(
    x: torch.Tensor,
    weight: DeviceWeight,
    width: torch.Tensor,
    bias: torch.Tensor | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """x [..., K] bf16 or fp16, contiguous -> [..., N] in x's dtype, computed in fp32.

    The width is read on the device; one that the layout has not is clamped as ``clamp_width``
    does. Launches, grids and addresses depend on shapes alone, so a CUDA graph of the call serves
    every width.

    Args:
        width: int32, one element.
        splits: parts of K; for tests. Chosen by ``choose_splits`` when None.
    """
    _check(x, weight, width, bias)
    out = torch.empty(*x.shape[:-1], weight.n, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = x.numel() // weight.k
    bm = row_block(rows, _target(x.device))
    if splits is None:
        splits = choose_splits(rows, bm, weight.n, weight.k, _processors(x.device))
    most = -(-weight.k // BLOCK_K) if rows <= MAX_SPLIT_ROWS else 1
    if not 1 <= splits <= most:
        raise ValueError(f"splits is {splits} for {rows} rows, k = {weight.k}: give 1 to {most}")
    n_pad = weight.planes[0].shape[0] * TILE_ROWS
    partial = (
        torch.empty(splits, rows, n_pad, dtype=torch.float32, device=x.device)
        if splits > 1
        else out
    )
    planes = [*weight.planes, *[weight.planes[0]] * (5 - len(weight.planes))]
    linear_kernel[(-(-rows // bm), n_pad // BN, splits)](
        x,
        *planes,
        weight.scales.view(torch.int32),
        width,
        bias if bias is not None else out,
        partial,
        weight.counters,
        weight.counters[-1:],
        out,
        rows,
        weight.n,
        weight.k,
        weight.planes[0].shape[1],
        n_pad,
        LAYOUT=int("".join(map(str, weight.layout))),
        SHARED=weight.scales.shape[0] == 1 and len(weight.layout) > 1,
        HAS_BIAS=bias is not None,
        SPLIT=splits > 1,
        G=weight.group_size,
        EVEN_K=weight.k % BLOCK_K == 0,
        BM=bm,
        BN=BN,
        UPCAST=INTERPRETED,
        num_warps=WARPS[bm],
        num_stages=STAGES,
    )
    return out
