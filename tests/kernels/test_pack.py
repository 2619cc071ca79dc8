# SPDX-License-Identifier: Apache-2.0
"""Planes: the slicing law, round trips, and what is refused."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flexquant_kernels as fk
from flexquant_kernels import pack

LAYOUTS = [(4, 2, 2), (2, 2, 4), (2, 1, 1, 2, 2), (4, 4), (1,) * 8]

shapes = st.tuples(st.integers(1, 50), st.integers(1, 6).map(lambda i: 32 * i))
layouts = st.sampled_from(LAYOUTS)


def _codes(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@settings(max_examples=60, deadline=None)
@given(shapes, layouts, st.integers(0, 2**31))
def test_slicing_law_and_tiling(shape: tuple[int, int], layout: tuple[int, ...], seed: int) -> None:
    codes = _codes(shape, seed)
    n, k = shape
    planes = fk.pack_planes(codes, layout)
    assert [tuple(p.shape) for p in planes] == [(n, k * w // 8) for w in layout]
    for width in fk.layout_widths(layout):
        used = fk.planes_for_width(layout, width)
        # Only the prefix is handed over, so nothing beyond it can be read.
        assert torch.equal(fk.unpack_planes(planes[:used], layout, width, k), codes >> (8 - width))
    for plane, w in zip(planes, layout, strict=True):
        tiled = fk.tile_plane(plane, w, k)
        assert tiled.shape == (-(-n // 16), k * w * 2)
        assert torch.equal(fk.untile_plane(tiled, w, k, n), plane)


def test_storage_bits_are_where_the_format_says() -> None:
    codes = _codes((3, 64), 1)
    plane = fk.pack_planes(codes, (4, 2, 2))[1]
    for row, k in ((0, 0), (1, 5), (2, 63)):
        assert (int(plane[row, k // 4]) >> (k % 4 * 2)) & 3 == (int(codes[row, k]) >> 2) & 3


def test_tiled_bits_are_where_the_format_says() -> None:
    k, w = 64, 2
    codes = _codes((20, k), 2)
    tiled = fk.tile_plane(fk.pack_planes(codes, (4, 2, 2))[1], w, k)
    for row, column in ((0, 0), (7, 33), (19, 63)):
        quad = column // 4
        byte = quad // (8 // w) * 64 + row % 16 * 4 + column % 4
        field = (int(tiled[row // 16, byte]) >> (quad % (8 // w) * w)) & 3
        assert field == (int(codes[row, column]) >> 2) & 3


def test_padding_rows_are_zero() -> None:
    tiled = fk.tile_plane(torch.full((17, 16), 255, dtype=torch.uint8), 4, 32)
    assert int(tiled[1].view(-1, 16, 4)[:, 1:].max()) == 0
    scales = fk.tile_scales(torch.ones(17, 1, 3, 2, dtype=torch.float16))
    assert scales.shape == (3, 2, 1, 2, 16)
    assert float(scales[:, 1, :, :, 1:].abs().max()) == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.sampled_from([1, 3, 5]))
def test_scales_round_trip(n: int, groups: int, sets: int) -> None:
    scales = torch.randn(n, groups, sets, 2).half()
    assert torch.equal(fk.untile_scales(fk.tile_scales(scales), n), scales)


def test_row_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = _codes((70, 64), 3)
    planes = fk.pack_planes(codes)
    tiled = [fk.tile_plane(p, w, 64) for p, w in zip(planes, (4, 2, 2), strict=True)]
    monkeypatch.setattr(pack, "_CHUNK", 64 * 20)
    for plane, w, whole, tile in zip(fk.pack_planes(codes), (4, 2, 2), planes, tiled, strict=True):
        assert torch.equal(plane, whole)
        assert torch.equal(fk.tile_plane(plane, w, 64), tile)
        assert torch.equal(fk.untile_plane(tile, w, 64, 70), plane)
    assert torch.equal(fk.unpack_planes(planes, (4, 2, 2), 8, 64), codes)


def test_clamp_width() -> None:
    assert [fk.clamp_width((4, 2, 2), w) for w in (-3, 0, 4, 5, 6, 7, 8, 99)] == [
        4,
        4,
        4,
        6,
        6,
        8,
        8,
        8,
    ]


PLANES = fk.pack_planes(torch.zeros(4, 64, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fk.check_layout((4, 4, 4)), ("layout", "(4, 4, 4)", "sum to 8")),
        (lambda: fk.check_layout((3, 5)), ("layout", "(3, 5)", "1, 2 or 4")),
        (lambda: fk.check_layout(()), ("layout", "()")),
        (lambda: fk.planes_for_width((4, 2, 2), 5), ("width 5", "(4, 6, 8)")),
        (
            lambda: fk.pack_planes(torch.zeros(4, 48, dtype=torch.uint8)),
            ("k = 48", "multiple of 32"),
        ),
        (lambda: fk.pack_planes(torch.zeros(4, 64)), ("codes", "float32", "uint8")),
        (lambda: fk.pack_planes(torch.zeros(64, dtype=torch.uint8)), ("codes", "(64,)", "2-D")),
        (
            lambda: fk.unpack_planes(PLANES[:1], (4, 2, 2), 8, 64),
            ("width 8", "3 planes", "1 were given"),
        ),
        (
            lambda: fk.unpack_planes([PLANES[0][:, :7]], (4, 2, 2), 4, 64),
            ("7 bytes", "32", "truncated"),
        ),
        (
            lambda: fk.unpack_planes([PLANES[0], PLANES[1][:2]], (4, 2, 2), 6, 64),
            ("plane 1", "2 rows", "repack"),
        ),
        (lambda: fk.tile_plane(PLANES[0], 4, 64, tile=8), ("tile 8", "16")),
        (
            lambda: fk.untile_plane(torch.zeros(1, 512, dtype=torch.uint8), 4, 64, 17),
            ("1 tiles", "n = 17"),
        ),
        (lambda: fk.tile_scales(torch.zeros(4, 2, 3)), ("scales", "(4, 2, 3)")),
        (lambda: fk.untile_scales(torch.zeros(3, 1, 2, 2, 16), 17), ("tiled scales", "n = 17")),
    ],
)
def test_bad_input_names_thing_value_and_remedy(call, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
