# SPDX-License-Identifier: Apache-2.0
"""Host side of the Triton linear layer: checks, the launch, and compiling before serving."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..gpu import processors, target_of
from . import tuning
from .checks import check_width
from .dequantize import DTYPES, dequantize
from .kernel import INTERPRETED, linear_kernel
from .layout import BLOCK_K, PAD_ROWS, DeviceWeight, Form, padded
from .tuning import Launch

BN = PAD_ROWS
SLICE_WEIGHTS = 1 << 26
"""Weights dequantized at a time: 128 MiB."""

_PLANS_KEPT = 1 << 14


def _check(
    x: torch.Tensor, weight: DeviceWeight, width: torch.Tensor, bias: torch.Tensor | None
) -> None:
    device = weight.scales.device
    for name, t in (("x", x), ("bias", bias)):
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
    check_width(width, device)
    if bias is not None:
        if tuple(bias.shape) != (weight.n,) or not bias.is_floating_point():
            raise ValueError(
                f"bias is {bias.dtype} {tuple(bias.shape)}: give a float tensor [{weight.n}]"
            )
        if not bias.is_contiguous():
            raise ValueError(f"bias has strides {bias.stride()}: pass bias.contiguous()")


def _choose(rows: int, form: Form, device: torch.device) -> Launch | None:
    target = target_of(device)
    table = tuning.table_of(target)
    return tuning.choose(table, form.layout, rows, form.n, form.k, target, processors(device))


def choose_launch(rows: int, weight: DeviceWeight) -> Launch | None:
    """How the fused kernel is launched; None where the weight is dequantized first."""
    return _choose(rows, weight.form, weight.scales.device)


def linear(
    x: torch.Tensor,
    weight: DeviceWeight,
    width: torch.Tensor,
    bias: torch.Tensor | None = None,
    launch: Launch | None = None,
) -> torch.Tensor:
    """x [..., K] bf16 or fp16, contiguous -> [..., N] in x's dtype, summed in fp32.

    The width is read on the device; one that the layout has not is clamped as ``clamp_width``
    does, and one whose planes the weight has not becomes its highest. Launches, grids and addresses
    depend on shapes alone, so a CUDA graph of the call serves every width.

    Many rows (``tuning.py``) take a weight that is dequantized first, and so rounded to x's dtype.

    Args:
        width: int32, one element.
        launch: of the fused kernel; by table or heuristic when None.

    Raises:
        ValueError: a tensor that cannot be taken as it is, or parts of K that do not fit.
    """
    _check(x, weight, width, bias)
    out = torch.empty(*x.shape[:-1], weight.n, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = x.numel() // weight.k
    plan = _plan(rows, weight.form, bias is not None, launch, x.device)
    if plan is None:
        dequantized_linear(x.view(rows, -1), weight, width, bias, out.view(rows, -1))
        return out
    partial = torch.empty(plan.partial, dtype=torch.float32, device=x.device) if plan.split else out
    linear_kernel[plan.grid](
        x,
        *weight.five_planes(),
        weight.scales.view(torch.int32),
        width,
        bias if bias is not None else out,
        partial,
        weight.counters,
        weight.counters[-1:],
        out,
        *plan.numbers,
        **plan.constants,
    )
    return out


def dequantized_linear(
    x: torch.Tensor,
    weight: DeviceWeight,
    width: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """The path of ``linear`` for many rows: x [rows, k] -> ``out`` [rows, n], in slices of n."""
    at_a_time = max(BN, SLICE_WEIGHTS // weight.k // BN * BN)
    for first in range(0, weight.n, at_a_time):
        last = min(first + at_a_time, weight.n)
        plain = dequantize(weight, width, x.dtype, first, last)
        if bias is None:
            torch.mm(x, plain.T, out=out[:, first:last])
        else:
            part = bias[first:last].to(x.dtype)
            torch.addmm(part, x, plain.T, out=out[:, first:last])


@dataclass(frozen=True)
class _Plan:
    """What the fused kernel is launched with, but for tensors.

    partial: shape of the sums of K's parts, if it is split. numbers: M to top of the kernel.
    """

    grid: tuple[int, int, int]
    partial: tuple[int, int, int]
    numbers: tuple[int, ...]
    constants: dict[str, int | bool]

    @property
    def split(self) -> bool:
        return self.grid[2] > 1


@lru_cache(_PLANS_KEPT)
def _plan(
    rows: int, form: Form, has_bias: bool, launch: Launch | None, device: torch.device
) -> _Plan | None:
    """The launch of the fused kernel, by table or heuristic if None is given; or None for none.

    Raises:
        ValueError: parts of K that do not fit.
    """
    n, k = form.n, form.k
    launch = launch or _choose(rows, form, device)
    if launch is None:
        return None
    most = tuning.most_splits(rows, k)
    if not 1 <= launch.splits <= most:
        raise ValueError(f"splits is {launch.splits} for {rows} rows, k = {k}: give 1 to {most}")
    n_pad, k_pad = padded(n, k)
    return _Plan(
        (-(-rows // launch.block), n_pad // BN, launch.splits),
        (launch.splits, rows, n_pad),
        (rows, n, k, k_pad // BLOCK_K, n_pad, form.widths[-1]),
        {
            "LAYOUT": form.digits,
            "SHARED": form.shared,
            "HAS_BIAS": has_bias,
            "SPLIT": launch.splits > 1,
            "G": form.group_size,
            "EVEN_K": k == k_pad,
            "BM": launch.block,
            "BN": BN,
            "UPCAST": INTERPRETED,
            "num_warps": launch.warps,
            "num_stages": launch.stages,
            **tuning.compiler_options(launch.block, form.group_size, target_of(device)),
        },
    )


@dataclass(frozen=True)
class Layer:
    """What a linear layer is called with."""

    weight: DeviceWeight
    dtype: torch.dtype
    bias: torch.Tensor | None = None


def warm_up_rows(layer: Layer, max_rows: int) -> Iterator[tuple[tuple, int]]:
    """(what is compiled, a number of rows that needs it) of a layer, each once."""
    weight, seen = layer.weight, set()
    common = (
        weight.layout,
        weight.form.shared,
        weight.group_size,
        weight.k % BLOCK_K == 0,
        layer.dtype,
        weight.scales.device,
    )
    most = tuning.table_of(target_of(weight.scales.device)).dequantize_above + 1
    for rows in range(1, min(max_rows, most) + 1):
        launch = choose_launch(rows, weight)
        key: tuple = (*common, launch)
        if launch is not None:
            bias = layer.bias.dtype if layer.bias is not None else None
            key = (*common, bias, launch.splits > 1, launch.block, launch.warps, launch.stages)
        if key not in seen:
            seen.add(key)
            yield key, rows


def warm_up(layers: Iterable[Layer], max_rows: int) -> int:
    """Compile all that layers need for 1 to ``max_rows`` rows, by running it; -> launches made.

    To be called once weights are loaded and before a CUDA graph is captured: nothing of the linear
    layers is compiled afterwards, at any width.
    """
    done = set()
    for layer in layers:
        for key, rows in warm_up_rows(layer, max_rows):
            if key not in done:
                done.add(key)
                x = torch.zeros(rows, layer.weight.k, dtype=layer.dtype, device=key[5])
                width = torch.full((1,), layer.weight.widths[0], dtype=torch.int32, device=key[5])
                linear(x, layer.weight, width, layer.bias)
    return len(done)
