# SPDX-License-Identifier: Apache-2.0
"""Nested rounding with error compensation: one parent code that is good at every width.

GPTQ (Frantar et al. 2023, section 3) rounds a weight matrix column by column and lets the columns
that are still to come make up for the error, as measured by the layer's own inputs. Here one code
serves several widths, so each width keeps its own compensated copy of the weights, and the code of
a column is the one whose prefixes are together nearest to all of them (the objective over several
widths is that of MatGPTQ, 2026; the search over prefixes and the scales per width are ours):

1. Grid: the parent's range is that of its group, so 8 bit loses nothing at the edges; scale and
   offset of each lower width are fitted to the codes of round to nearest.
2. Columns, the one with the most energy first: for each width both neighbours of its target are
   tried, the widths above taking the nearest code in the bin that is left, and the code with the
   least sum of squared errors, each in steps of its own width, wins.
3. Scales: with the codes fixed, scale and offset of all groups of a row at a lower width are the
   solution of one linear least-squares problem in the layer's output. The parent keeps its own: its
   codes were chosen for the pair as rounded to fp16, and rounding another would be an error common
   to a whole group. Steps 2 and 3 are repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_flexquant.format.layout import PARENT_BITS, PlaneLayout
from vllm_flexquant.quantize.rtn import QuantizedWeight, quantize_rtn

_BLOCK = 128
"""Columns whose errors are spread at once; any value gives the same codes but for rounding."""

_ROW_CHUNK_ELEMENTS = 1 << 24
"""fp32 elements of the least-squares systems that are held at a time."""

_COPY_ELEMENTS = 1 << 27
"""fp32 elements of the compensated copies of the weights that are held at a time."""


@dataclass(frozen=True)
class GptqSettings:
    """How nested rounding weighs things.

    damping: share of the Hessian's mean diagonal that is added to it. rounds: how often columns
    are rounded, each time on the scales fitted to the round before. emphasis: weight of a squared
    error in steps, of the lowest width, of those between, of the parent's.
    """

    damping: float = 0.01
    rounds: int = 2
    emphasis: tuple[float, float, float] = (1.0, 0.2, 0.2)

    def weights(self, layout: PlaneLayout) -> tuple[float, ...]:
        """Emphasis of each width of `layout`, ascending."""
        lowest, middle, highest = self.emphasis
        count = len(layout.widths)
        return (lowest, *([middle] * (count - 2)), highest)[-count:] if count > 1 else (1.0,)


def nested_gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    layout: PlaneLayout,
    group_size: int,
    settings: GptqSettings = GptqSettings(),
    name: str = "weight",
) -> QuantizedWeight:
    """Quantize with scales per width, for the inputs that `hessian` sums up.

    Args:
        weight: float [N, K] on any device; `group_size` divides K.
        hessian: fp32 [K, K] on the same device, the mean of x xᵀ over calibration tokens.

    Returns:
        As `quantize_rtn`.

    Raises:
        ValueError: NaN or infinite weights or inputs (`name` says whose).
    """
    start = quantize_rtn(weight, layout, group_size, name=name)
    if not torch.isfinite(hessian).all():
        raise ValueError(
            f"{name} got NaN or infinite inputs from the calibration text; "
            "check the checkpoint or name the layer in 'ignore'"
        )
    hessian = damped(hessian, settings.damping)
    order, spread = column_order(hessian)
    emphasis = settings.weights(layout)
    codes, scales = torch.empty_like(start.codes), torch.empty_like(start.scales)
    step = max(1, _COPY_ELEMENTS // (weight.shape[1] * len(layout.widths)))
    for first in range(0, len(weight), step):  # rows do not depend on each other
        part = slice(first, first + step)
        target, pairs = weight[part].float(), start.scales[part]
        for _ in range(settings.rounds):
            rounded = round_columns(
                target, spread, order, pairs, group_size, layout.widths, emphasis
            )
            pairs = _fit_scales(target, hessian, rounded, pairs, layout, group_size)
        codes[part], scales[part] = rounded, pairs
    return QuantizedWeight(codes, scales)


def output_error(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    quantized: QuantizedWeight,
    layout: PlaneLayout,
) -> dict[int, float]:
    """By width: mean squared error of the layer's output over its mean square, both per token."""
    target = weight.float()
    norm = _energy(target, hessian)
    return {
        width: _energy(target - quantized.dequantize(layout, width), hessian)
        / max(norm, torch.finfo(torch.float32).tiny)
        for width in layout.widths
    }


def _energy(error: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((error @ hessian) * error).sum())


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """`hessian` with its diagonal raised, so that it can be inverted; an input that is always 0
    gets a diagonal of 1, and its weights are then simply rounded."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    return hessian


def column_order(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Order in which to round columns, int64 [K], and the spread of errors in that order."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    return order, _spread(hessian[order][:, order])


def _spread(hessian: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse, fp32 [K, K]: row j tells how an error in column j is
    made up for by the columns after it."""
    for raised in range(6):
        factor, info = torch.linalg.cholesky_ex(hessian)
        if not info.any():
            inverse = torch.cholesky_inverse(factor)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if not info.any():
                return upper
        hessian = hessian.clone()
        hessian.diagonal().add_(hessian.diagonal().mean() * 0.01 * 4**raised)
    raise ValueError("the inputs of a layer are too close to dependent; use more calibration text")


def round_columns(
    target: torch.Tensor,
    spread: torch.Tensor,
    order: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    widths: Sequence[int],
    emphasis: Sequence[float],
) -> torch.Tensor:
    """Codes uint8 [N, K] of the highest width, for fixed scales fp16 or fp32 [N, G, S, 2].

    Args:
        target: fp32 [N, K]. spread, order: of `column_order`.
        widths: S of them, ascending. emphasis: weight of a squared error in steps of each.
    """
    rows, columns = target.shape
    pairs = scales.float().permute(1, 3, 2, 0).contiguous()  # [G, 2, S, N]
    wanted = target.T[order].unsqueeze(1).repeat(1, len(widths), 1)  # [K, S, N]
    group_of = (order // group_size).tolist()
    codes = torch.empty((columns, rows), dtype=torch.uint8, device=target.device)
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        block = wanted[first:last]
        local = spread[first:last, first:last]
        errors = torch.empty_like(block)
        for i in range(last - first):
            scale, offset = pairs[group_of[first + i]]
            chosen, got = _choose(block[i], scale, offset, widths, emphasis)
            codes[first + i] = chosen
            errors[i] = (block[i] - got) / local[i, i]
            if i + 1 < last - first:
                rest = block[i + 1 :].view(last - first - i - 1, -1)
                rest.addr_(local[i, i + 1 :], errors[i].view(-1), alpha=-1.0)
        if last < columns:
            rest = wanted[last:].view(columns - last, -1)
            rest.addmm_(spread[first:last, last:].T, errors.view(last - first, -1), alpha=-1.0)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()


def _choose(
    wanted: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    widths: Sequence[int],
    emphasis: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The parent code of one column, uint8 [N], and its value at each width, fp32 [S, N].

    Args:
        wanted, scale, offset: fp32 [S, N].
    """
    steps = (wanted - offset) / scale  # where the target lies on each width's own grid
    shifts = [1 << (widths[-1] - width) for width in widths]
    paths = torch.cat([_paths(steps, widths, s) for s in range(len(widths))])
    cost = torch.zeros_like(paths)
    for s, shift in enumerate(shifts):
        cost += emphasis[s] * (torch.floor(paths / shift) - steps[s]).square_()
    code = paths.gather(0, cost.argmin(0, keepdim=True))[0]
    prefixes = torch.floor(code / torch.tensor(shifts, device=code.device)[:, None])
    return code.to(torch.uint8), prefixes * scale + offset


def _paths(steps: torch.Tensor, widths: Sequence[int], anchor: int) -> torch.Tensor:
    """Parent codes fp32 [2, N]: both neighbours of the target at width number `anchor`, and from
    there the nearest code of each higher width inside the bin that is left."""
    below = torch.floor(steps[anchor])
    code = torch.stack((below, below + 1)).clamp_(0, (1 << widths[anchor]) - 1)
    for s in range(anchor + 1, len(widths)):
        bins = 1 << (widths[s] - widths[s - 1])
        first = code * bins
        code = torch.clamp(torch.round(steps[s]), first, first + (bins - 1))
    return code


def _fit_scales(
    target: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    layout: PlaneLayout,
    group_size: int,
) -> torch.Tensor:
    """fp16 [N, G, S, 2] that minimise the error of the layer's output at each lower width."""
    rows, columns = target.shape
    groups = columns // group_size
    summed = hessian.unflatten(1, (groups, group_size)).sum(-1)  # [K, G]
    both = summed.unflatten(0, (groups, group_size)).sum(1)  # [G, G]
    fitted = torch.empty_like(scales)
    chunk = max(1, _ROW_CHUNK_ELEMENTS // (4 * groups * groups + columns))
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        pull = target[part] @ hessian
        fitted[part, :, -1] = scales[part, :, -1]
        for s, width in enumerate(layout.widths[:-1]):
            fitted[part, :, s] = _solve(
                codes[part] >> (PARENT_BITS - width),
                (1 << width) / 2 - 0.5,
                pull,
                hessian,
                summed,
                both,
                scales[part, :, s].float(),
            )
    return fitted


def _solve(
    codes: torch.Tensor,
    centre: float,
    pull: torch.Tensor,
    hessian: torch.Tensor,
    summed: torch.Tensor,
    both: torch.Tensor,
    before: torch.Tensor,
) -> torch.Tensor:
    """Normal equations of (scale, offset) of all groups of each row: fp16 [N, G, 2].

    Codes are centred, which keeps scale and offset nearly independent. A pair that comes out
    unusable (a group whose codes are all equal) stays as it was.
    """
    groups = both.shape[0]
    size = codes.shape[1] // groups
    centred = codes.float() - centre
    grouped = centred.unflatten(1, (groups, size))
    system = centred.new_empty((codes.shape[0], groups, 2, groups, 2))
    for g in range(groups):
        columns = slice(g * size, (g + 1) * size)
        reach = centred[:, columns] @ hessian[columns]
        system[:, g, 0, :, 0] = (reach.unflatten(1, (groups, size)) * grouped).sum(-1)
        cross = centred[:, columns] @ summed[columns]
        system[:, g, 0, :, 1] = cross
        system[:, :, 1, g, 0] = cross
        system[:, g, 1, :, 1] = both[g]
    right = torch.stack(
        (
            (pull.unflatten(1, (groups, size)) * grouped).sum(-1),
            pull.unflatten(1, (groups, size)).sum(-1),
        ),
        dim=-1,
    )
    matrix = system.reshape(-1, 2 * groups, 2 * groups)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    ridge = 1e-4 * diagonal + torch.finfo(torch.float32).tiny
    old = torch.stack((before[..., 0], before[..., 1] + centre * before[..., 0]), dim=-1)
    vector = right.flatten(1) + ridge * old.flatten(1)
    diagonal.add_(ridge)
    solution, info = torch.linalg.solve_ex(matrix, vector)
    solution = solution.unflatten(1, (groups, 2))
    scale = solution[..., 0].half()
    offset = (solution[..., 1] - centre * scale.float()).half()
    pair = torch.stack((scale, offset), dim=-1)
    usable = torch.isfinite(pair).all(-1) & (scale > 0) & (info == 0)[:, None]
    return torch.where(usable.unsqueeze(-1), pair, before.half())


def accumulate_hessian(hessian: torch.Tensor, inputs: torch.Tensor, seen: int) -> int:
    """Take `inputs` [..., K] into the running mean of x xᵀ, in place; returns tokens seen."""
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    total = seen + len(rows)
    hessian.mul_(seen / total).addmm_(rows.T, rows, alpha=1.0 / total)
    return total
