# SPDX-License-Identifier: Apache-2.0
"""Planes as the Triton kernels read them, made from storage form (``pack.py``) when a model loads.

N is padded to a multiple of 64 and K to one of 256, with zero codes and zero scales. A plane of
width w is int32 [N_pad/16, K_pad/256, 16, 8, w]: for 16 rows and 256 k, w consecutive words for
each of 8 lanes, so that a lane reads its share of a row with one load of 4*w bytes and a tile of
rows is one run of memory along K.

A block of 256 k is 4 chunks of 64, a chunk 4 slices of 16, and a slice 8 lanes of 2 halves:

    k = 256 * block + 64 * chunk + 16 * slice + 2 * lane + half

In the w words of a lane, that weight's field of w bits starts at bit ``16 * half + 4 * slice`` of

    w = 4: word chunk
    w = 2: word chunk // 2, and 2 * (chunk % 2) bits further
    w = 1: word 0, and (0, 2, 1, 3)[chunk] bits further

and every word is stored rotated left by 3 bits. So

- the two halves of a word are neighbours in k: one rotation, one AND and one OR give two of them
  as a pair of fp16 or bf16 numbers (``linear.py``);
- the fields of slice 0 in 4-bit words lie where they are needed, at bit 3 of the mantissa;
- two planes of width w become the words of one of width 2 * w with one rotation and one bitwise
  selection a word (the order of chunks in 1-bit planes is what makes it so);
- a slice lies within one group, whatever the size of groups.

Scales are fp16 [S, N_pad/16, K_pad/256, 16, 256/g, 2] (scale, offset): one width is one block of
memory, tiled as the planes are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch

from ..pack import check_group_size, check_k, check_layout

LAYOUTS = ((4, 2, 2), (2, 2, 4), (2, 1, 1, 2, 2))
BLOCK_K = 256
TILE_ROWS = 16
PAD_ROWS = 64
ROTATION = 3
COUNTERS = 8
"""Counters of a tile of 64 rows: one for each block of rows of x, of at least 8, if K is split."""

_CHUNK_SHIFT = {4: (0, 0, 0, 0), 2: (0, 2, 0, 2), 1: (0, 2, 1, 3)}
_ROWS_AT_A_TIME = 1 << 12


class Form(NamedTuple):
    """What a launch depends on: layout, planes that there are, sets of scales, and sizes."""

    layout: tuple[int, ...]
    planes: int
    sets: int
    group_size: int
    n: int
    k: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Those that the planes give, ascending."""
        return tuple(accumulate(self.layout[: self.planes]))

    @property
    def shared(self) -> bool:
        """Whether one pair of scale and offset serves all widths."""
        return self.sets == 1 and len(self.layout) > 1

    @property
    def digits(self) -> int:
        """As kernels know the layout: 422 for 4|2|2."""
        return int("".join(map(str, self.layout)))


@dataclass(frozen=True)
class DeviceWeight:
    """One nested weight [n, k] on a device, in the form of this module.

    planes: int32 each, most significant first, all of the layout or the first of them; scales:
    fp16; counters: int32 [COUNTERS * N_pad/64 + 1], zero between launches and the last one always
    (``kernel.py``), so that launches of one weight must not overlap.
    """

    planes: tuple[torch.Tensor, ...]
    scales: torch.Tensor
    counters: torch.Tensor
    layout: tuple[int, ...]
    group_size: int
    n: int
    k: int

    @property
    def form(self) -> Form:
        """All of it but the numbers."""
        return Form(
            self.layout, len(self.planes), self.scales.shape[0], self.group_size, self.n, self.k
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Those that its planes give, ascending."""
        return self.form.widths

    def five_planes(self) -> list[torch.Tensor]:
        """As kernels take them; what the layout or the weight has not is not read."""
        return [*self.planes, *[self.planes[0]] * (5 - len(self.planes))]


def padded(n: int, k: int) -> tuple[int, int]:
    """(N_pad, K_pad)."""
    return -(-n // PAD_ROWS) * PAD_ROWS, -(-k // BLOCK_K) * BLOCK_K


def _check_width(plane_width: int) -> None:
    if plane_width not in _CHUNK_SHIFT:
        raise ValueError(f"plane width {plane_width} is not supported: use 1, 2 or 4")


def _shifts(plane_width: int, device: torch.device) -> torch.Tensor:
    """int64 [chunk, slice, half]: first bit of a field in its word, before the rotation."""
    chunk = torch.tensor(_CHUNK_SHIFT[plane_width], device=device).view(4, 1, 1)
    part = 4 * torch.arange(4, device=device).view(1, 4, 1)
    return chunk + part + 16 * torch.arange(2, device=device)


def _pack_rows(codes: torch.Tensor, plane_width: int) -> torch.Tensor:
    """Fields uint8 [16 * t, K_pad] -> int32 [t, K_pad/256, 16, 8, w]."""
    rows, k = codes.shape
    fields = codes.view(rows, k // BLOCK_K, 4, 4, 8, 2).permute(0, 1, 4, 2, 3, 5).long()
    fields = fields << _shifts(plane_width, codes.device)  # [row, block, lane, chunk, slice, half]
    words = fields.reshape(rows, k // BLOCK_K, 8, plane_width, -1).sum(dim=-1)  # no two fields meet
    words = ((words << ROTATION) | (words >> (32 - ROTATION))) & 0xFFFFFFFF
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return signed.view(-1, TILE_ROWS, k // BLOCK_K, 8, plane_width).transpose(1, 2).contiguous()


def _unpack_rows(words: torch.Tensor, plane_width: int) -> torch.Tensor:
    """Inverse of ``_pack_rows``."""
    tiles, blocks = words.shape[:2]
    unsigned = words.transpose(1, 2).reshape(tiles * TILE_ROWS, blocks, 8, plane_width, 1).long()
    unsigned = unsigned & 0xFFFFFFFF
    unsigned = ((unsigned >> ROTATION) | (unsigned << (32 - ROTATION))) & 0xFFFFFFFF
    shifts = _shifts(plane_width, words.device).view(plane_width, -1)
    fields = (unsigned >> shifts) & ((1 << plane_width) - 1)
    fields = fields.view(tiles * TILE_ROWS, blocks, 8, 4, 4, 2).permute(0, 1, 3, 4, 2, 5)
    return fields.reshape(tiles * TILE_ROWS, blocks * BLOCK_K).to(torch.uint8)


def relay_plane(plane: torch.Tensor, plane_width: int, k: int) -> torch.Tensor:
    """Storage plane uint8 [N, K*w/8] -> int32 [N_pad/16, K_pad/256, 16, 8, w]."""
    _check_width(plane_width)
    check_k(k)
    n = plane.shape[0]
    if plane.dtype != torch.uint8 or plane.dim() != 2 or plane.shape[1] != k * plane_width // 8:
        raise ValueError(
            f"plane of width {plane_width} is {plane.dtype} {tuple(plane.shape)}: give uint8 "
            f"[N, {k * plane_width // 8}] for k = {k}"
        )
    n_pad, k_pad = padded(n, k)
    shape = (n_pad // TILE_ROWS, k_pad // BLOCK_K, TILE_ROWS, 8, plane_width)
    out = torch.empty(shape, dtype=torch.int32, device=plane.device)
    for start in range(0, n_pad, _ROWS_AT_A_TIME):
        part = plane[start : start + _ROWS_AT_A_TIME]
        first = torch.stack(
            [(part >> i) & ((1 << plane_width) - 1) for i in range(0, 8, plane_width)], dim=-1
        ).flatten(1)
        rows = min(_ROWS_AT_A_TIME, n_pad - start)
        fields = torch.nn.functional.pad(first, (0, k_pad - k, 0, rows - part.shape[0]))
        tile = start // TILE_ROWS
        out[tile : tile + rows // TILE_ROWS] = _pack_rows(fields, plane_width)
    return out


def restore_plane(words: torch.Tensor, plane_width: int, n: int, k: int) -> torch.Tensor:
    """Fields of a plane, uint8 [n, k], from its device form: the inverse, for tests and export."""
    _check_width(plane_width)
    n_pad, k_pad = padded(n, k)
    shape = (n_pad // TILE_ROWS, k_pad // BLOCK_K, TILE_ROWS, 8, plane_width)
    if tuple(words.shape) != shape or words.dtype != torch.int32:
        raise ValueError(f"words are {words.dtype} {tuple(words.shape)}: give int32 {shape}")
    return _unpack_rows(words, plane_width)[:n, :k].contiguous()


def relay_scales(scales: torch.Tensor, k: int) -> torch.Tensor:
    """Scales fp16 [N, K/g, S, 2] -> fp16 [S, N_pad/16, K_pad/256, 16, 256/g, 2]."""
    if scales.dim() != 4 or scales.shape[3] != 2 or scales.dtype != torch.float16:
        raise ValueError(
            f"scales are {scales.dtype} {tuple(scales.shape)}: give float16 [N, K/g, S, 2]"
        )
    n, groups = scales.shape[:2]
    n_pad, k_pad = padded(n, k)
    more = k_pad * groups // k - groups
    whole = torch.nn.functional.pad(scales, (0, 0, 0, 0, 0, more, 0, n_pad - n))
    tiles = whole.view(n_pad // TILE_ROWS, TILE_ROWS, k_pad // BLOCK_K, -1, *scales.shape[2:])
    return tiles.permute(4, 0, 2, 1, 3, 5).contiguous()


def make_counters(n: int, device: torch.device) -> torch.Tensor:
    """Those of a weight of n rows, as ``DeviceWeight`` has them."""
    tiles = padded(n, BLOCK_K)[0] // PAD_ROWS
    return torch.zeros(COUNTERS * tiles + 1, dtype=torch.int32, device=device)


def relay(
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    layout: Sequence[int],
    group_size: int,
    k: int,
) -> DeviceWeight:
    """Device form of a weight, on the device of ``planes``.

    Args:
        planes: storage planes uint8 [N, K*w/8], most significant first; all of the layout, or the
            first of them.
        scales: fp16 [N, K/g, S, 2], S the number of widths or 1.

    Raises:
        ValueError: a tensor is not what it should be, or the layout has no kernel.
    """
    widths = check_layout(layout)
    check_k(k)
    check_group_size(group_size, k)
    if widths not in LAYOUTS:
        raise ValueError(f"layout {widths} has no Triton kernel: use one of {LAYOUTS}")
    if not 1 <= len(planes) <= len(widths):
        raise ValueError(
            f"{len(planes)} planes were given where layout {widths} has {len(widths)}: give those "
            "of the widths in use"
        )
    n = planes[0].shape[0]
    if n == 0:
        raise ValueError(f"planes have no rows: a layer [0, {k}] runs on no kernel")
    if any(plane.device != scales.device for plane in planes):
        devices = ", ".join(str(plane.device) for plane in planes)
        raise ValueError(f"planes are on {devices} but the scales on {scales.device}: move one")
    if tuple(scales.shape) not in [(n, k // group_size, s, 2) for s in (1, len(widths))]:
        raise ValueError(
            f"scales have shape {tuple(scales.shape)}: give [{n}, {k // group_size}, S, 2] "
            f"with S = 1 or {len(widths)}"
        )
    return DeviceWeight(
        tuple(relay_plane(p, w, k) for p, w in zip(planes, widths, strict=False)),
        relay_scales(scales, k),
        make_counters(n, scales.device),
        widths,
        group_size,
        n,
        k,
    )
