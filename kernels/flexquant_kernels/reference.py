# SPDX-License-Identifier: Apache-2.0
"""Plain-torch truth for the kernels, on any device.

Weights are group-wise along K: ``w = scale_b * q_b + offset_b`` for the code q_b at width b, with
one pair per row, group and width. With one pair shared by all widths (S == 1), the pair (s, o)
belongs to 8 bits and ``scale_b = s * 2^(8-b)``, ``offset_b = o + s * (2^(8-b) - 1) / 2``.
"""

from collections.abc import Sequence

import torch

from .pack import (
    PARENT_BITS,
    check_group_size,
    check_k,
    check_layout,
    planes_for_width,
    unpack_planes,
    untile_plane,
    untile_scales,
)

MIN_AMAX = 2.0**-100
"""Activation groups with a lower largest magnitude quantize to zero (127/amax would overflow)."""

_CHUNK = 1 << 24  # weights dequantized to fp32 at a time by ``linear``


def _plane_k(plane: torch.Tensor, plane_width: int, tile: int) -> int:
    return plane.shape[1] * 8 // (plane_width * (tile or 1))


def _storage_form(
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    layout: Sequence[int],
    width: int,
    group_size: int,
    n: int,
    tile: int,
) -> tuple[list[torch.Tensor], torch.Tensor, tuple[int, ...], int]:
    """Validate; storage planes of the prefix, storage scales [N, K/g, S, 2], layout and K."""
    widths = check_layout(layout)
    used = planes_for_width(widths, width)
    if len(planes) < used:
        raise ValueError(
            f"width {width} of layout {widths} needs {used} planes but {len(planes)} were given: "
            "load the missing planes or choose a lower width"
        )
    k = _plane_k(planes[0], widths[0], tile)
    check_k(k)
    check_group_size(group_size, k)
    prefix = list(planes[:used])
    if tile:
        prefix = [untile_plane(p, w, k, n, tile) for p, w in zip(prefix, widths, strict=False)]
        scales = untile_scales(scales, n, tile)
    if prefix[0].shape[0] != n:
        raise ValueError(f"plane 0 has {prefix[0].shape[0]} rows where n = {n}: repack the weight")
    if tuple(scales.shape) not in [(n, k // group_size, s, 2) for s in (1, len(widths))]:
        raise ValueError(
            f"scales have shape {tuple(scales.shape)}: give [{n}, {k // group_size}, S, 2] "
            f"with S = 1 or {len(widths)}"
        )
    return prefix, scales, widths, k


def _pairs(
    scales: torch.Tensor, layout: tuple[int, ...], width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, offset) of a width, fp32 [N, K/g] each, from storage scales."""
    shared = scales.shape[2] == 1
    pair = scales[:, :, 0 if shared else planes_for_width(layout, width) - 1].float()
    scale, offset = pair[..., 0], pair[..., 1]
    if shared:
        step = float(1 << (PARENT_BITS - width))
        offset = offset + scale * ((step - 1) / 2)
        scale = scale * step
    return scale, offset


def _dequantize_rows(
    planes: Sequence[torch.Tensor],
    scale: torch.Tensor,
    offset: torch.Tensor,
    layout: tuple[int, ...],
    width: int,
    k: int,
) -> torch.Tensor:
    codes = unpack_planes(planes, layout, width, k)
    w = codes.view(codes.shape[0], scale.shape[1], -1).float()
    return w.mul_(scale.unsqueeze(-1)).add_(offset.unsqueeze(-1)).flatten(1)


def dequantize(
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    layout: Sequence[int],
    width: int,
    group_size: int,
    n: int,
    tile: int = 0,
) -> torch.Tensor:
    """Weight at ``width`` bits, fp32 [N, K], from storage (tile 0) or tiled (tile 16) form."""
    prefix, scales, layout, k = _storage_form(planes, scales, layout, width, group_size, n, tile)
    scale, offset = _pairs(scales, layout, width)
    return _dequantize_rows(prefix, scale, offset, layout, width, k)


def _check_x(x: torch.Tensor, k: int) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}: give bfloat16, float16 or float32")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(
            f"x has shape {tuple(x.shape)} but the weight has k = {k}: "
            "the last dimension must equal k"
        )


def linear(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    width: int,
    bias: torch.Tensor | None,
    layout: Sequence[int],
    group_size: int,
    out_features: int,
    tile: int = 0,
) -> torch.Tensor:
    """x [..., K] -> [..., N] in x's dtype, computed in fp32 with fp32 activations: the truth."""
    prefix, scales, layout, k = _storage_form(
        planes, scales, layout, width, group_size, out_features, tile
    )
    _check_x(x, k)
    scale, offset = _pairs(scales, layout, width)
    rows = x.reshape(-1, k).float()
    out = torch.empty(rows.shape[0], out_features, dtype=x.dtype, device=x.device)
    step = max(1, _CHUNK // k)
    for start in range(0, out_features, step):
        part = slice(start, start + step)
        w = _dequantize_rows([p[part] for p in prefix], scale[part], offset[part], layout, width, k)
        b = None if bias is None else bias[part].float()
        out[:, part] = torch.nn.functional.linear(rows, w, b).to(x.dtype)
    return out.view(*x.shape[:-1], out_features)


def quantize_activations(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 activations as the kernel makes them: x [M, K] -> int8 [M, K/g, g], fp32 scale [M, K/g].

    A group with a NaN or an infinity has scale NaN, so that the whole output row is NaN.
    """
    groups = x.float().reshape(x.shape[0], x.shape[1] // group_size, group_size)
    amax = groups.abs().amax(dim=-1)
    finite = amax.isfinite()
    live = finite & (amax >= MIN_AMAX)
    # Tensor by tensor: with a Python number torch multiplies by a reciprocal, which rounds twice.
    top = torch.full_like(amax, 127.0)
    inverse = torch.where(live, top / amax, 0.0)
    xq = torch.where(live.unsqueeze(-1), torch.round(groups * inverse.unsqueeze(-1)), 0.0).to(
        torch.int8
    )
    sx = torch.where(live, amax / top, torch.where(finite, 0.0, torch.nan))
    return xq, sx


def linear_int8(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    width: int,
    bias: torch.Tensor | None,
    layout: Sequence[int],
    group_size: int,
    out_features: int,
    tile: int = 0,
) -> torch.Tensor:
    """As ``linear`` with the native kernel's int8 activations; groups summed in fp32, ascending."""
    prefix, scales, layout, k = _storage_form(
        planes, scales, layout, width, group_size, out_features, tile
    )
    _check_x(x, k)
    scale, offset = _pairs(scales, layout, width)
    xq, sx = quantize_activations(x.reshape(-1, k), group_size)
    codes = unpack_planes(prefix, layout, width, k).view(out_features, k // group_size, group_size)
    out = torch.zeros(xq.shape[0], out_features, dtype=torch.float32, device=x.device)
    for g in range(codes.shape[1]):
        # In float64 the integer product is exact whatever the matmul precision settings.
        acc = (xq[:, g].double() @ codes[:, g].double().T).float()
        total = xq[:, g].float().sum(dim=1, keepdim=True)
        out += sx[:, g, None] * (scale[None, :, g] * acc + offset[None, :, g] * total)
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype).view(*x.shape[:-1], out_features)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Shannon entropy of softmax(logits) in nats, [rows, V] -> fp32 [rows].

    Masked logits (-inf) contribute nothing; a row that is all -inf, or has a NaN or +inf, gives
    NaN.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}: give [rows, vocabulary]")
    if logits.shape[1] == 0:
        return torch.full((logits.shape[0],), torch.nan, dtype=torch.float32, device=logits.device)
    values = logits.float()
    shifted = values - values.amax(dim=1, keepdim=True)  # +inf and all -inf become NaN here
    p = shifted.exp()
    total = p.sum(dim=1)
    moment = torch.where(p == 0, p, p * shifted).sum(dim=1)
    return total.log() - moment / total


def probe_level(
    scores: torch.Tensor, live: torch.Tensor, kl: torch.Tensor, budget: float, aggregate: str
) -> int | None:
    """The cheapest level whose KL times the aggregate of the scores is within the budget.

    Args:
        scores: fp32 [rows], a row's expected KL over that of the average token; one that is not
            finite asks for the best level.
        live: bool [rows], those that count; None comes out if none does.
        kl: fp32 [levels], calibrated mean KL at each level, nats a token, the cheapest first.
        aggregate: mean or max.

    Returns:
        The best level where none is within the budget.
    """
    counted = torch.nan_to_num(scores[live], nan=torch.inf, posinf=torch.inf)
    if len(counted) == 0:
        return None
    whole = counted.max() if aggregate == "max" else counted.double().mean().float()
    within = (kl * whole <= budget).tolist()
    return within.index(True) if True in within else len(kl) - 1
