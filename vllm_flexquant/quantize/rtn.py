# SPDX-License-Identifier: Apache-2.0
"""Round-to-nearest parent of 8 bits, and scales for the widths nested in it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_flexquant.format.layout import PARENT_BITS, PlaneLayout, ScaleMode

_CHUNK_ELEMENTS = 1 << 18
"""Weights held in fp32 at a time, so that quantizing costs little beside the weight itself."""

_SMALLEST_SCALE = 2.0**-24
"""Smallest positive fp16 number: a group narrower than 255 of these is stored as a constant."""


class QuantizedWeight(NamedTuple):
    """A weight as parent codes and scales.

    codes: uint8 [N, K]. scales: fp16 [N, K / group_size, S, 2], the last axis (scale, offset),
    S = number of widths (ascending) or 1 for shared scales.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantize(self, layout: PlaneLayout, width: int) -> torch.Tensor:
        """The weight at `width` bits, fp32 [N, K]; for scales per width."""
        codes = self.codes >> (PARENT_BITS - width)
        pair = self.scales[:, :, layout.widths.index(width)].float()
        groups = codes.float().unflatten(1, (-1, self.group_size))
        return (groups * pair[..., :1] + pair[..., 1:]).flatten(1)


def quantize_rtn(
    weight: torch.Tensor,
    layout: PlaneLayout,
    group_size: int,
    scale_mode: ScaleMode = ScaleMode.PER_WIDTH,
    name: str = "weight",
) -> QuantizedWeight:
    """Quantize group-wise along the input dimension, asymmetrically, to the nearest parent code.

    The codes are chosen for the rounded (fp16) scale and offset, so rounding them costs nothing
    systematic. With scales per width, the scale and offset of each lower width minimise the squared
    weight error of its group given the codes (least squares).

    Args:
        weight: float [N, K] on any device; `group_size` divides K.

    Raises:
        ValueError: NaN or infinite weights (`name` says whose).
    """
    rows, columns = weight.shape
    groups = columns // group_size
    n_sets = len(layout.widths) if scale_mode is ScaleMode.PER_WIDTH else 1
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((rows, groups, n_sets, 2), dtype=torch.float16, device=weight.device)
    step = max(1, _CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        part = weight[start : start + step].float().reshape(-1, groups, group_size)
        if not torch.isfinite(part).all():
            raise ValueError(
                f"{name} has NaN or infinite weights in rows {start} to {start + len(part) - 1}; "
                "repair the checkpoint or name the layer in 'ignore'"
            )
        if (amax := float(part.abs().amax())) > torch.finfo(torch.float16).max:
            raise ValueError(
                f"{name} has a weight of magnitude {amax:.4g}, beyond what fp16 scales can hold "
                "(65504); name the layer in 'ignore'"
            )
        part_codes, part_scales = _quantize_groups(part, layout, n_sets)
        codes[start : start + step] = part_codes.reshape(-1, columns)
        scales[start : start + step] = part_scales
    return QuantizedWeight(codes, scales)


def _quantize_groups(
    groups: torch.Tensor, layout: PlaneLayout, n_sets: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [R, G, g] -> codes uint8 [R, G, g], scales fp16 [R, G, n_sets, 2]."""
    lowest, highest = groups.amin(-1), groups.amax(-1)
    offset = lowest.half()
    top = (1 << PARENT_BITS) - 1
    # the offset is rounded first, so that the range that it leaves is the one covered
    scale = ((highest - offset.float()) / top).clamp_min(_SMALLEST_SCALE).half()
    codes = groups - offset.float().unsqueeze(-1)
    codes = codes.div_(scale.float().unsqueeze(-1)).round_().clamp_(0, top)
    sets = []
    if n_sets > 1:
        for width in layout.widths[:-1]:
            nested = torch.floor(codes / (1 << (PARENT_BITS - width)))
            sets.append(_fit(groups, nested, scale.float() * (1 << (PARENT_BITS - width))))
    sets.append(torch.stack((scale, offset), dim=-1))
    return codes.to(torch.uint8), torch.stack(sets, dim=-2)


def _fit(groups: torch.Tensor, codes: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Least-squares (scale, offset) of `groups` on `codes`, both [R, G, g] -> fp16 [R, G, 2].

    `step` [R, G] is the scale where all codes of a group are equal and none can be fitted.
    """
    mean_code, mean = codes.mean(-1), groups.mean(-1)
    centred = codes - mean_code.unsqueeze(-1)
    variance = centred.square().mean(-1)
    slope = (centred * groups).mean(-1) / variance.clamp_min(1e-12)
    scale = torch.where(variance > 0, slope, step).half()
    offset = (mean - scale.float() * mean_code).half()
    return torch.stack((scale, offset), dim=-1)
