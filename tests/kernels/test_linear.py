# SPDX-License-Identifier: Apache-2.0
"""flexquant::linear: the native kernel against the reference, and the operator's contract."""

from dataclasses import replace

import pytest
import torch

import flexquant_kernels as fk

LAYOUTS = [(4, 2, 2), (2, 2, 4), (2, 1, 1, 2, 2)]
ROWS = [0, 1, 2, 3, 4, 5, 16, 17, 70]
SHAPES = [(1, 32, 32), (7, 96, 32), (17, 128, 64), (33, 384, 128), (48, 576, 64), (40, 1536, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def _x(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _assert_tight(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if want.numel():
        scale = float(want.float().abs().max())
        # Half types: one unit in the last place, as the fp32 values differ in their last bits.
        bound = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[want.dtype]
        assert float((got.float() - want.float()).abs().max()) <= bound * scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_native_equals_its_emulation(native, make_weight, layout, shape) -> None:
    n, k, group_size = shape
    bias = _x(n)
    for shared in (False, True):
        weight = make_weight(n, k, group_size, layout, shared)
        for width in weight.widths:
            for rows in ROWS:
                b = bias if rows % 2 else None
                x = _x(rows, k)
                _assert_tight(
                    weight.op(x, width, b), fk.linear_int8(x, width=width, **weight.storage_args(b))
                )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(native, make_weight, dtype) -> None:
    weight = make_weight(33, 192, 64)
    for bias in (None, _x(33), _x(33).to(dtype), _x(33).double()):
        for rows in (1, 4, 13):
            x = _x(rows, 192).to(dtype)
            _assert_tight(
                weight.op(x, 6, bias), fk.linear_int8(x, width=6, **weight.storage_args(bias))
            )


def test_long_k_in_several_panels(native, make_weight) -> None:
    weight = make_weight(49, 8192 + 384, 128)
    x = _x(150, weight.k)  # more rows than one block of activations
    for width in weight.widths:
        _assert_tight(weight.op(x, width), fk.linear_int8(x, width=width, **weight.storage_args()))
    assert torch.equal(weight.op(x[149:], 6), weight.op(x, 6)[149:])


def test_error_of_int8_activations(native, make_weight) -> None:
    """Against fp32 activations; measured 0.0060 at every width (normal activations)."""
    for layout in LAYOUTS:
        weight = make_weight(96, 576, 64, layout)
        x = _x(64, 576)
        for width in weight.widths[1:]:
            truth = fk.linear(x, width=width, **weight.storage_args())
            assert float((weight.op(x, width) - truth).norm() / truth.norm()) < 0.015


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_planes_above_the_width_are_not_read(native, make_weight, layout) -> None:
    weight = make_weight(33, 128, 32, layout)
    sets = len(weight.widths)
    for rows in (1, 4, 9):
        x = _x(rows, 128)
        for i, width in enumerate(weight.widths):
            want = weight.op(x, width)
            garbage = [
                p if j <= i else torch.randint_like(p, 256) for j, p in enumerate(weight.tiled)
            ]
            scales = weight.tiled_scales.clone()
            scales[[j for j in range(sets) if j != i]] = torch.nan
            assert torch.equal(
                replace(weight, tiled=garbage, tiled_scales=scales).op(x, width), want
            )
            released = [p if j <= i else p.new_empty(0) for j, p in enumerate(weight.tiled)]
            assert torch.equal(replace(weight, tiled=released).op(x, width), want)


def test_batch_and_threads_do_not_change_a_row(native, make_weight, threads) -> None:
    weight = make_weight(1000, 512, 64)
    x, bias = _x(70, 512), _x(1000)
    for width in weight.widths:
        threads(1)
        alone = torch.cat([weight.op(x[i : i + 1], width, bias) for i in range(70)])
        for count in (1, 2, 3):
            threads(count)
            for rows in (1, 2, 3, 4, 5, 6, 7, 8, 13, 70):
                assert torch.equal(weight.op(x[:rows], width, bias), alone[:rows]), (
                    width,
                    count,
                    rows,
                )


def test_shapes_and_strides_of_x(native, make_weight) -> None:
    weight = make_weight(17, 64)
    x = _x(6, 64)
    want = weight.op(x, 8)
    assert torch.equal(weight.op(x.view(2, 3, 64), 8), want.view(2, 3, 17))
    assert torch.equal(weight.op(x[0], 8), want[0])
    assert torch.equal(weight.op(x.T.contiguous().T, 8), want)
    wide = torch.full((6, 100), torch.nan)
    wide[:, 20:84] = x
    assert torch.equal(weight.op(wide[:, 20:84], 8), want)
    assert weight.op(x.new_empty(2, 0, 64), 8).shape == (2, 0, 17)


def test_activations_out_of_the_ordinary(native, make_weight) -> None:
    weight = make_weight(17, 64)
    for rows in (4, 6):
        x = _x(rows, 64)
        clean = weight.op(x, 6)
        x[0] = 0.0
        x[1, 5], x[2, 40] = torch.nan, -torch.inf
        got = weight.op(x, 6)
        assert not got[0].any()
        assert got[1:3].isnan().all()
        assert torch.equal(got[3:], clean[3:])
        x[1], x[2] = 1e-38, 1e36
        want = fk.linear_int8(x, width=6, **weight.storage_args())
        for row, expected in zip(weight.op(x, 6), want, strict=True):
            _assert_tight(row, expected)


def test_width_is_read_at_run_time(native, make_weight) -> None:
    weight = make_weight(17, 64)
    x = _x(2, 64)
    table = torch.tensor([99, 4, 99], dtype=torch.int32)
    low = weight.op(x, table[1:2])
    table[1] = 8
    high = weight.op(x, table[1:2])
    assert torch.equal(low, weight.op(x, 4))
    assert torch.equal(high, weight.op(x, 8))
    assert not torch.equal(low, high)


@pytest.mark.parametrize("tile", [0, 16])
def test_width_outside_the_layout_is_clamped(make_weight, tile: int) -> None:
    weight = make_weight(17, 64)
    if tile == 0:
        weight = replace(weight, tiled=weight.planes, tiled_scales=weight.scales)

    def op(width: int) -> torch.Tensor:
        args = weight.tiled, weight.tiled_scales, torch.tensor([width], dtype=torch.int32)
        return torch.ops.flexquant.linear(_x(2, 64), *args, None, weight.layout, 32, 17, tile)

    for width, used in ((-5, 4), (0, 4), (5, 6), (7, 8), (100, 8)):
        assert torch.equal(op(width), op(used))


def test_forms_without_a_native_kernel_take_the_reference(make_weight) -> None:
    width = torch.tensor([4], dtype=torch.int32)
    x = _x(3, 64)
    for weight in (make_weight(17, 64), make_weight(17, 64, layout=(4, 4))):
        want = fk.linear(x, width=4, **weight.storage_args())
        storage = torch.ops.flexquant.linear(
            x, weight.planes, weight.scales, width, None, weight.layout, 32, 17, 0
        )
        assert torch.equal(storage, want)
    assert torch.equal(weight.op(x, 4), want)  # tiled, layout 4|4
    args = weight.tiled, weight.tiled_scales, width, None, weight.layout, 32, 17, 16
    assert torch.equal(torch.ops.flexquant.linear_reference(x, *args), want)


def test_fake_agrees(native, make_weight) -> None:
    weight = make_weight(17, 64)
    for x in (_x(3, 64), _x(2, 3, 64).bfloat16()):
        args = (
            x,
            weight.tiled,
            weight.tiled_scales,
            torch.tensor([6], dtype=torch.int32),
            _x(17),
            [4, 2, 2],
            32,
            17,
            16,
        )
        torch.library.opcheck(torch.ops.flexquant.linear.default, args)


def test_compiled_switching_does_not_recompile(native, make_weight) -> None:
    weight = make_weight(17, 64)
    table = torch.tensor([4], dtype=torch.int32)

    @torch.compile(fullgraph=True)
    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(weight.op(x, table)) * 2

    first = _x(5, 64)
    torch._dynamo.mark_dynamic(first, 0)
    model(first)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(30):
            table[0] = (4, 6, 8)[i % 3]
            x = _x(2 + i % 5, 64)
            torch.testing.assert_close(model(x), torch.relu(weight.op(x, (4, 6, 8)[i % 3])) * 2)


def test_bad_input(native, make_weight) -> None:
    weight = make_weight(17, 64)
    x = _x(1, 64)
    short = [p[:, :-1] for p in weight.tiled]
    cases = [
        (lambda: weight.op(x, torch.tensor([4])), "width must be a CPU int32 tensor"),
        (lambda: replace(weight, tiled=short).op(x, 4), "plane 0 is .* expected contiguous uint8"),
        (
            lambda: replace(weight, tiled=weight.tiled[:1]).op(x, 8),
            "width 8 needs 3 planes but 1 were given",
        ),
        (
            lambda: replace(weight, tiled_scales=weight.tiled_scales.float()).op(x, 4),
            "scales are .* expected",
        ),
        (lambda: replace(weight, group_size=48).op(x, 4), "group_size 48 is not supported"),
        (lambda: weight.op(_x(1, 32), 4), "plane 0 is"),
        (lambda: weight.op(x, 4, _x(16)), r"bias has shape \[16\]"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
