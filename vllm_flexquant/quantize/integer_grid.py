# SPDX-License-Identifier: Apache-2.0
"""Rounding for one width, on a grid whose zero is a whole code: scale * (code - zero).

Static formats have this grid, where flexquant's own has an offset of any value. Moving an offset to
the nearest whole code shifts all weights of a group by up to half a step, so weights are rounded
anew: scale and zero are searched together, and errors are compensated for as in `gptq`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_flexquant.quantize.gptq import GptqSettings, column_order, damped, round_columns

SCALE_DTYPE = torch.bfloat16
"""Scales are values that bf16 holds, so that they are the same whichever dtype a model is served
in."""

_CHUNK_ELEMENTS = 1 << 18
"""Weights whose grid is searched at a time."""

_SHRINK = tuple(1.0 - 0.05 * i for i in range(7))
"""Shares of a group's range that the grid is tried on."""

_SYSTEM_ELEMENTS = 1 << 24
"""fp32 elements of the least-squares systems that are held at a time."""


class IntegerWeight(NamedTuple):
    """A weight as scale * (code - zero).

    codes: uint8 [N, K]. scales: bf16 [N, K / group_size]. zeros: uint8 [N, K / group_size].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """fp32 [N, K]."""
        groups = self.codes.float().unflatten(1, (self.scales.shape[1], -1))
        shifted = groups - self.zeros.float().unsqueeze(-1)
        return (shifted * self.scales.float().unsqueeze(-1)).flatten(1)


def nearest(
    weight: torch.Tensor,
    width: int,
    group_size: int,
    symmetric: bool,
    energy: torch.Tensor | None = None,
) -> IntegerWeight:
    """Round to nearest, on the grid of each group that has the least squared error.

    Args:
        weight: finite float [N, K]; `group_size` divides K.
        width: bits of a code, up to 8.
        symmetric: the zero is 2^(width - 1) everywhere.
        energy: fp32 [K], weight of a squared error in each column; None for the same in all.
    """
    rows, columns = weight.shape
    groups = columns // group_size
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((rows, groups), dtype=SCALE_DTYPE, device=weight.device)
    zeros = torch.empty((rows, groups), dtype=torch.uint8, device=weight.device)
    if energy is None:
        energy = torch.ones(columns, device=weight.device)
    energy = energy.view(groups, group_size)
    step = max(1, _CHUNK_ELEMENTS // columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        target = weight[part].float().unflatten(1, (groups, group_size))
        scale, zero = _search(target, energy, (1 << width) - 1, symmetric)
        codes[part] = _codes(target, scale, zero, (1 << width) - 1).flatten(1).to(torch.uint8)
        scales[part], zeros[part] = scale.to(SCALE_DTYPE), zero.to(torch.uint8)
    return IntegerWeight(codes, scales, zeros)


def compensated(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    width: int,
    group_size: int,
    symmetric: bool,
) -> IntegerWeight:
    """Round with error compensation (GPTQ) for the inputs that `hessian` sums up.

    Columns are rounded on the grid of `nearest`, then scales are the least-squares solution in the
    layer's output, as often as `GptqSettings` says.

    Args:
        weight: finite float [N, K] on any device.
        hessian: finite fp32 [K, K] on the same device, the mean of x xᵀ over calibration tokens.
    """
    settings = GptqSettings()
    hessian = damped(hessian, settings.damping)
    order, spread = column_order(hessian)
    energy = torch.empty_like(hessian.diagonal())
    energy[order] = spread.diagonal() ** -2  # what is left of an error once it is compensated for
    _, scales, zeros = nearest(weight, width, group_size, symmetric, energy)
    target = weight.float()
    for _ in range(settings.rounds):
        offsets = -zeros.float() * scales.float()
        pairs = torch.stack((scales.float(), offsets), dim=-1).unsqueeze(2)
        codes = round_columns(target, spread, order, pairs, group_size, (width,), (1.0,))
        scales = _fit_scales(target, hessian, IntegerWeight(codes, scales, zeros))
    return IntegerWeight(codes, scales, zeros)


def _search(
    target: torch.Tensor, energy: torch.Tensor, top: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero, fp32 [R, G], of `target` [R, G, g] with codes up to `top`."""
    lowest = target.amin(-1).clamp_max(0)
    highest = target.amax(-1).clamp_min(0)
    if symmetric:
        reach = torch.maximum(-lowest, highest)
        lowest, highest = -reach, reach
    best = torch.full_like(lowest, torch.inf)
    scale, zero = torch.ones_like(lowest), torch.zeros_like(lowest)
    for share in _SHRINK:
        step = _storable((highest - lowest) * (share / top), torch.ones_like(scale))
        below = -lowest * share / step
        middle = torch.full_like(step, (top + 1) / 2)
        for at in (middle,) if symmetric else (below.floor(), below.ceil()):
            at = at.clamp(0, top)
            shifted = _codes(target, step, at, top) - at.unsqueeze(-1)
            power = (shifted.square() * energy).sum(-1)
            fitted = _storable((shifted * target * energy).sum(-1) / power, step)
            got = _codes(target, fitted, at, top) - at.unsqueeze(-1)
            error = ((got * fitted.unsqueeze(-1) - target).square_() * energy).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, fitted, scale), torch.where(better, at, zero)
    return scale, zero


def _codes(target: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    """Nearest codes, fp32 [R, G, g]."""
    steps = target / scale.unsqueeze(-1) + zero.unsqueeze(-1)
    return steps.round_().clamp_(0, top)


def _storable(scale: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """`scale` as it will be stored, fp32; `otherwise` where it is no positive number."""
    stored = scale.to(SCALE_DTYPE).float()
    return torch.where(torch.isfinite(stored) & (stored > 0), stored, otherwise)


def _fit_scales(target: torch.Tensor, hessian: torch.Tensor, weight: IntegerWeight) -> torch.Tensor:
    """Scales bf16 [N, G] that minimise the error of the layer's output, given codes and zeros."""
    rows, columns = target.shape
    groups = weight.scales.shape[1]
    size = columns // groups
    fitted = torch.empty_like(weight.scales)
    chunk = max(1, _SYSTEM_ELEMENTS // (groups * groups + columns))
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        codes, before, zeros = (t[part].float() for t in weight)
        shifted = codes.unflatten(1, (groups, size)) - zeros.unsqueeze(-1)
        system = shifted.new_empty((len(shifted), groups, groups))
        for g in range(groups):
            reach = shifted[:, g] @ hessian[g * size : (g + 1) * size]
            system[:, g] = (reach.unflatten(1, (groups, size)) * shifted).sum(-1)
        pull = (target[part] @ hessian).unflatten(1, (groups, size))
        diagonal = system.diagonal(dim1=1, dim2=2)
        ridge = 1e-4 * diagonal + torch.finfo(torch.float32).tiny
        vector = (pull * shifted).sum(-1) + ridge * before
        diagonal.add_(ridge)
        solution, info = torch.linalg.solve_ex(system, vector)
        usable = torch.where((info == 0)[:, None], solution, before)
        fitted[part] = _storable(usable, before).to(SCALE_DTYPE)
    return fitted
