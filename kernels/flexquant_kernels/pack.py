# SPDX-License-Identifier: Apache-2.0
"""Bit planes: packing 8-bit codes, reading them back at a width, the tiled form of the CPU kernel.

A *layout* is the tuple of plane widths, most significant plane first, summing to 8; (4, 2, 2) is
the default. A *width* is the number of bits in use, a prefix sum of the layout (4, 6 or 8 there).
The code of a weight at width b is ``q >> (8 - b)``.

Storage form (on disk, ``tile == 0``)
    Plane of width w: uint8 [N, K*w/8]. Element k of a row lies in byte ``k // (8/w)`` at bit
    ``(k % (8/w)) * w``. Scales: fp16 [N, K/g, S, 2] (scale, offset); S is the number of widths, or
    1 for one pair shared by all widths.

Tiled form (AVX512-VNNI kernel, ``tile == 16``)
    N is padded to a multiple of 16 with zero codes and zero scales. A quad is 4 consecutive k; the
    64 bytes of a quad are 16 rows x 4 k, byte ``row*4 + j``. A plane of width w packs 8/w
    consecutive quads into one 64-byte vector, quad i of the set at bits i*w of each byte:
    uint8 [N_pad/16, K*w*2]. Scales: fp16 [S, N_pad/16, K/g, 2, 16]: one width is one block.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

DEFAULT_LAYOUT: tuple[int, ...] = (4, 2, 2)
GROUP_SIZES: tuple[int, ...] = (32, 64, 128)
PARENT_BITS = 8
K_MULTIPLE = 32
"""K must divide by this: one 64-byte vector of a 1-bit plane holds 32 k."""
TILE = 16

_CHUNK = 1 << 20  # elements handled at a time, bounds the temporaries to a few MiB


def check_layout(layout: Sequence[int]) -> tuple[int, ...]:
    """Return ``layout`` as a tuple; ValueError unless its widths are 1, 2 or 4 and sum to 8."""
    widths = tuple(int(w) for w in layout)
    if not widths or any(w not in (1, 2, 4) for w in widths) or sum(widths) != PARENT_BITS:
        raise ValueError(
            f"layout {tuple(layout)} is not valid: give plane widths of 1, 2 or 4 bits that sum to "
            f"{PARENT_BITS}, for example {DEFAULT_LAYOUT}"
        )
    return widths


def layout_widths(layout: Sequence[int]) -> tuple[int, ...]:
    """Widths that a layout offers, ascending: (4, 2, 2) -> (4, 6, 8)."""
    return tuple(accumulate(check_layout(layout)))


def planes_for_width(layout: Sequence[int], width: int) -> int:
    """Number of leading planes that make up ``width`` bits."""
    widths = layout_widths(layout)
    if width not in widths:
        raise ValueError(f"width {width} is not in layout {tuple(layout)}: use one of {widths}")
    return widths.index(width) + 1


def clamp_width(layout: Sequence[int], width: int) -> int:
    """Smallest width of the layout that is at least ``width``, else the highest."""
    widths = layout_widths(layout)
    return next((w for w in widths if w >= width), widths[-1])


def check_k(k: int) -> None:
    """ValueError unless ``k`` is a positive multiple of 32."""
    if k <= 0 or k % K_MULTIPLE:
        raise ValueError(
            f"k = {k} is not a positive multiple of {K_MULTIPLE}: "
            "pad the input dimension or leave this layer unquantized"
        )


def check_group_size(group_size: int, k: int) -> None:
    """ValueError unless ``group_size`` is supported and divides ``k``."""
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size {group_size} is not supported: use one of {GROUP_SIZES}")
    if k % group_size:
        fits = [g for g in GROUP_SIZES if k % g == 0]
        remedy = f"use one of {fits}" if fits else "leave this layer unquantized"
        raise ValueError(f"group_size {group_size} does not divide k = {k}: {remedy}")


def _check_bytes(name: str, t: torch.Tensor) -> None:
    if t.dtype != torch.uint8:
        raise ValueError(f"{name} has dtype {t.dtype}: convert it to torch.uint8")
    if t.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: give a 2-D tensor")


def _check_plane(name: str, plane: torch.Tensor, plane_width: int, columns: int) -> None:
    _check_bytes(name, plane)
    if plane.shape[1] != columns:
        raise ValueError(
            f"{name} of width {plane_width} has {plane.shape[1]} bytes per row where {columns} are "
            "expected: the plane is truncated or k is wrong; repack the weight"
        )


def _check_tile(tile: int) -> None:
    if tile != TILE:
        raise ValueError(f"tile {tile} is not supported: use {TILE}")


def _row_chunks(n: int, k: int, multiple: int = 1) -> Iterator[slice]:
    step = max(1, _CHUNK // max(k, 1) // multiple) * multiple
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _pack_fields(fields: torch.Tensor, width: int) -> torch.Tensor:
    """[..., 8/w, M] codes of w bits -> [..., M] bytes, field i at bit i*w."""
    out = fields[..., 0, :].clone()
    for i in range(1, PARENT_BITS // width):
        out |= fields[..., i, :] << (i * width)
    return out


def _unpack_fields(packed: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    """Inverse of packing; the 8/w fields appear as a new dimension ``dim``."""
    mask = (1 << width) - 1
    return torch.stack(
        [(packed >> (i * width)) & mask for i in range(PARENT_BITS // width)], dim=dim
    )


def pack_planes(codes: torch.Tensor, layout: Sequence[int] = DEFAULT_LAYOUT) -> list[torch.Tensor]:
    """Split parent codes uint8 [N, K] into storage planes, uint8 [N, K*w/8] each."""
    widths = check_layout(layout)
    _check_bytes("codes", codes)
    n, k = codes.shape
    check_k(k)
    planes = [torch.empty(n, k * w // 8, dtype=torch.uint8, device=codes.device) for w in widths]
    for rows in _row_chunks(n, k):
        part = codes[rows]
        low = PARENT_BITS
        for plane, w in zip(planes, widths, strict=True):
            low -= w
            fields = ((part >> low) & ((1 << w) - 1)).view(part.shape[0], k * w // 8, 8 // w)
            plane[rows] = _pack_fields(fields.transpose(1, 2), w)
    return planes


def unpack_planes(
    planes: Sequence[torch.Tensor], layout: Sequence[int], width: int, k: int
) -> torch.Tensor:
    """Codes at ``width`` bits, uint8 [N, K], from the storage planes of the prefix alone."""
    widths = check_layout(layout)
    used = planes_for_width(widths, width)
    check_k(k)
    if len(planes) < used:
        raise ValueError(
            f"width {width} of layout {widths} needs {used} planes but {len(planes)} were given: "
            "load the missing planes or choose a lower width"
        )
    for i in range(used):
        _check_plane(f"plane {i}", planes[i], widths[i], k * widths[i] // 8)
        if planes[i].shape[0] != planes[0].shape[0]:
            raise ValueError(
                f"plane {i} has {planes[i].shape[0]} rows where plane 0 has {planes[0].shape[0]}: "
                "repack the weight"
            )
    n = planes[0].shape[0]
    codes = torch.empty(n, k, dtype=torch.uint8, device=planes[0].device)
    for rows in _row_chunks(n, k):
        out = _unpack_fields(planes[0][rows], widths[0], -1).flatten(1)
        for plane, w in zip(planes[1:used], widths[1:used], strict=True):
            out <<= w
            out |= _unpack_fields(plane[rows], w, -1).flatten(1)
        codes[rows] = out
    return codes


def tile_plane(plane: torch.Tensor, plane_width: int, k: int, tile: int = TILE) -> torch.Tensor:
    """Storage plane uint8 [N, K*w/8] -> tiled uint8 [ceil(N/16), K*w*2], rows padded with zero."""
    _check_tile(tile)
    check_k(k)
    _check_plane("plane", plane, plane_width, k * plane_width // 8)
    n, w = plane.shape[0], plane_width
    tiles = -(-n // tile)
    out = torch.empty(tiles, k * w * tile // 8, dtype=torch.uint8, device=plane.device)
    for rows in _row_chunks(n, k, tile):
        codes = _unpack_fields(plane[rows], w, -1).flatten(1)
        if codes.shape[0] % tile:
            codes = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[0] % tile))
        t = codes.shape[0] // tile
        quads = codes.view(t, tile, k // 4, 4).permute(0, 2, 1, 3)
        sets = quads.reshape(t, k * w // 32, 8 // w, tile * 4)
        out[rows.start // tile : rows.start // tile + t] = _pack_fields(sets, w).flatten(1)
    return out


def untile_plane(
    tiled: torch.Tensor, plane_width: int, k: int, n: int, tile: int = TILE
) -> torch.Tensor:
    """Tiled plane uint8 [ceil(N/16), K*w*2] -> storage plane uint8 [N, K*w/8]."""
    _check_tile(tile)
    check_k(k)
    w = plane_width
    _check_plane("tiled plane", tiled, w, k * w * tile // 8)
    if tiled.shape[0] != -(-n // tile):
        raise ValueError(
            f"tiled plane has {tiled.shape[0]} tiles of {tile} rows, which does not fit n = {n}: "
            "retile the plane"
        )
    out = torch.empty(n, k * w // 8, dtype=torch.uint8, device=tiled.device)
    for rows in _row_chunks(n, k, tile):
        part = tiled[rows.start // tile : -(-rows.stop // tile)]
        t = part.shape[0]
        quads = _unpack_fields(part.view(t, k * w // 32, tile * 4), w, 2)
        codes = (
            quads.view(t, k // 4, tile, 4).permute(0, 2, 1, 3).reshape(t * tile, k * w // 8, 8 // w)
        )
        out[rows] = _pack_fields(codes.transpose(1, 2), w)[: rows.stop - rows.start]
    return out


def tile_scales(scales: torch.Tensor, tile: int = TILE) -> torch.Tensor:
    """Scales fp16 [N, K/g, S, 2] -> fp16 [S, ceil(N/16), K/g, 2, 16], rows padded with zero."""
    _check_tile(tile)
    if scales.dim() != 4 or scales.shape[3] != 2:
        raise ValueError(
            f"scales have shape {tuple(scales.shape)}: give [N, K/g, S, 2] (scale, offset)"
        )
    n, groups, sets, _ = scales.shape
    padded = torch.nn.functional.pad(scales, (0, 0, 0, 0, 0, 0, 0, -n % tile))
    return padded.view(-1, tile, groups, sets, 2).permute(3, 0, 2, 4, 1).contiguous()


def untile_scales(tiled: torch.Tensor, n: int, tile: int = TILE) -> torch.Tensor:
    """Scales fp16 [S, ceil(N/16), K/g, 2, 16] -> fp16 [N, K/g, S, 2]."""
    _check_tile(tile)
    if tiled.dim() != 5 or tiled.shape[3:] != (2, tile) or tiled.shape[1] != -(-n // tile):
        raise ValueError(
            f"tiled scales have shape {tuple(tiled.shape)}, which does not fit n = {n}: "
            f"give [S, {-(-n // tile)}, K/g, 2, {tile}]"
        )
    sets, tiles, groups = tiled.shape[:3]
    return tiled.permute(1, 4, 2, 0, 3).reshape(tiles * tile, groups, sets, 2)[:n].contiguous()
