# SPDX-License-Identifier: Apache-2.0
"""flexquant::linear: the native kernel against the reference, and the operator's contract."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import flexquant_kernels as fk

LAYOUTS = [(4, 2, 2), (2, 2, 4), (2, 1, 1, 2, 2)]
ROWS = [0, 1, 2, 3, 4, 5, 16, 17, 70]
SHAPES = [
    (1, 32, 32),
    (7, 96, 32),
    (15, 64, 64),
    (17, 128, 64),
    (33, 384, 128),
    (48, 576, 64),
    (100, 1536, 128),
]
"""(N, K, group size), every one of them odd in some way to 16 rows or to vectors."""
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


@pytest.fixture(scope="module")
def emulated() -> Callable[..., torch.Tensor]:
    """`linear_int8`, computed once for all instruction sets; the key must name all that differs."""
    known: dict[object, torch.Tensor] = {}

    def compute(key: object, x: torch.Tensor, width: int, args: dict[str, object]) -> torch.Tensor:
        if (key, width) not in known:
            known[key, width] = fk.linear_int8(x, width=width, **args)
        return known[key, width]

    return compute


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_native_equals_its_emulation(isa, make_weight, emulated, layout, shape) -> None:
    n, k, group_size = shape
    bias = _x(n)
    for shared in (False, True):
        weight = make_weight(n, k, group_size, layout, shared)
        for width in weight.widths:
            for rows in ROWS:
                b = bias if rows % 2 else None
                x = _x(rows, k)
                key = ("shapes", layout, shape, shared, rows)
                _assert_tight(
                    weight.op(x, width, b), emulated(key, x, width, weight.storage_args(b))
                )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(isa, make_weight, emulated, dtype) -> None:
    weight = make_weight(33, 192, 64)
    for bias in (None, _x(33), _x(33).to(dtype), _x(33).double()):
        for rows in (1, 4, 13):
            x = _x(rows, 192).to(dtype)
            key = ("dtypes", dtype, None if bias is None else bias.dtype, rows)
            _assert_tight(weight.op(x, 6, bias), emulated(key, x, 6, weight.storage_args(bias)))


def test_long_k_in_several_panels(isa, make_weight, emulated) -> None:
    weight = make_weight(49, 8192 + 384, 128)
    x = _x(150, weight.k)  # more rows than one block of activations
    for width in weight.widths:
        _assert_tight(weight.op(x, width), emulated("long k", x, width, weight.storage_args()))
    assert torch.equal(weight.op(x[149:], 6), weight.op(x, 6)[149:])


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_largest_integer_sums(isa, make_weight, layout, group_size) -> None:
    """All codes and activations at their extremes: sums of products must not saturate anywhere."""
    made = make_weight(17, 256, group_size, layout)
    codes = torch.full_like(made.codes, 255)
    codes[::2, ::3] = 0
    planes = fk.pack_planes(codes, layout)
    tiled = [fk.tile_plane(p, w, 256) for p, w in zip(planes, layout, strict=True)]
    weight = replace(made, codes=codes, planes=planes, tiled=tiled)
    for rows in (1, 3, 7, 33):
        x = torch.full((rows, 256), -5.0)
        x[::2] = 5.0
        x[1::4, ::2] = 5.0
        for width in weight.widths:
            _assert_tight(
                weight.op(x, width), fk.linear_int8(x, width=width, **weight.storage_args())
            )


def _hard_x(rows: int, k: int) -> torch.Tensor:
    """Activations of very different sizes; zeros, an infinity and a NaN have rows of their own."""
    x = _x(rows, k) * 10.0 ** torch.linspace(-6, 4, rows).unsqueeze(1)
    if rows > 5:
        x[1] = 0.0
        x[2, k // 2], x[3, 0] = torch.inf, torch.nan
        x[4, : k // 2] = 1e-38
        x[5, ::2] = 3e38
    return x


def _bits(t: torch.Tensor) -> bytes:
    """The bytes of a tensor, with one NaN for all of them."""
    same = torch.where(t.isnan(), torch.nan, t)
    return same.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_all_instruction_sets_give_the_same_bits(selected, make_weight, layout, dtype) -> None:
    """Integer sums are exact, and the fp32 chain of an output element is the same on each."""
    isas = fk.supported_isas()
    if len(isas) < 2:
        pytest.skip(f"this machine has one instruction set only, {isas[0]}")
    for n, k, group_size in ((1, 32, 32), (33, 384, 128), (100, 576, 64), (31, 8192 + 96, 32)):
        weight, bias = make_weight(n, k, group_size, layout, shared=n == 33), _x(n)
        for rows in (1, 2, 3, 5, 7, 16, 17, 40):
            x = _hard_x(rows, k).to(dtype)
            for width in weight.widths:
                got = {}
                for isa in isas:
                    fk.select_isa(isa)
                    got[isa] = _bits(weight.op(x, width, bias))
                differing = [isa for isa in isas if got[isa] != got[isas[0]]]
                assert not differing, (isas[0], differing, n, k, rows, width)


def test_error_of_int8_activations(isa, make_weight) -> None:
    """Against fp32 activations; measured 0.0060 at every width (normal activations)."""
    for layout in LAYOUTS:
        weight = make_weight(96, 576, 64, layout)
        x = _x(64, 576)
        for width in weight.widths[1:]:
            truth = fk.linear(x, width=width, **weight.storage_args())
            assert float((weight.op(x, width) - truth).norm() / truth.norm()) < 0.015


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_planes_above_the_width_are_not_read(isa, make_weight, layout) -> None:
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


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_batch_and_threads_do_not_change_a_row(isa, make_weight, threads, group_size) -> None:
    weight = make_weight(200, 512, group_size)
    x, bias = _x(256, 512), _x(200)
    for width in weight.widths:
        threads(1)
        alone = torch.cat([weight.op(x[i : i + 1], width, bias) for i in range(256)])
        for rows in (*range(1, 71), 256):
            threads(1 + rows % 3)
            assert torch.equal(weight.op(x[:rows], width, bias), alone[:rows]), (width, rows)


def test_threads_on_a_matrix_worth_them(isa, make_weight, threads) -> None:
    weight = make_weight(1000, 512, 64)
    x, bias = _x(70, 512), _x(1000)
    threads(1)
    want = {rows: weight.op(x[:rows], 6, bias) for rows in (1, 2, 5, 16, 70)}
    for count in (2, 3, 8):
        threads(count)
        for rows, expected in want.items():
            assert torch.equal(weight.op(x[:rows], 6, bias), expected), (count, rows)


@pytest.mark.slow
def test_more_rows_than_are_quantized_at_a_time(isa, make_weight) -> None:
    weight = make_weight(17, 8192, 128)
    x = _x(2100, 8192)  # 16 MiB in int8 are 2048 rows
    got = weight.op(x, 4)
    for row in (0, 1, 2046, 2047, 2048, 2049, 2099):
        assert torch.equal(got[row], weight.op(x[row], 4)), row


def test_calls_from_several_threads(isa, make_weight) -> None:
    weight = make_weight(130, 512, 64)
    xs = [_x(rows, 512, seed=rows) for rows in range(1, 41)]
    want = [weight.op(x, 6) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(
            pool.map(lambda x: weight.op(x, 6), xs * 5), want * 5, strict=True
        ):
            assert torch.equal(got, expected)


def test_nothing_is_left_over_from_the_call_before(isa, make_weight) -> None:
    """Scratch memory is kept between calls; what another shape left there must not show."""
    small, large = make_weight(17, 96, 32), make_weight(100, 1536, 128, (2, 1, 1, 2, 2))
    spoil = [_x(rows, 1536) * 1e30 for rows in (1, 4, 70)] + [torch.full((33, 1536), torch.nan)]
    for rows in (1, 3, 6, 17):
        x = _x(rows, 96)
        want = small.op(x, 6)
        for other in spoil:
            large.op(other, 8)
            assert torch.equal(small.op(x, 6), want)


def _shifted(t: torch.Tensor, by: int) -> torch.Tensor:
    """A contiguous copy that starts `by` elements into its storage."""
    view = t.new_empty(t.numel() + by)[by:].view(t.shape)
    return view.copy_(t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_at_odd_addresses(isa, make_weight, dtype) -> None:
    weight, bias = make_weight(33, 192, 64), _x(33)
    for rows in (1, 2, 7, 20):
        x = _x(rows, 192).to(dtype)
        want = weight.op(x, 8, bias)
        for by in (1, 3, 7):
            moved = replace(
                weight,
                tiled=[_shifted(plane, by + i) for i, plane in enumerate(weight.tiled)],
                tiled_scales=_shifted(weight.tiled_scales, by),
            )
            assert moved.tiled[0].data_ptr() % 2 == by % 2
            assert torch.equal(moved.op(_shifted(x, by), 8, _shifted(bias, by)), want)


def test_shapes_and_strides(isa, make_weight) -> None:
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
    assert weight.op(x[1:1], 8).shape == (0, 17)
    assert torch.equal(weight.op(x[:1].expand(6, 64), 8), want[:1].expand(6, 17))
    bias = _x(34)
    assert torch.equal(weight.op(x, 8, bias[::2]), weight.op(x, 8, bias[::2].contiguous()))


def test_no_outputs(isa, make_weight) -> None:
    weight = make_weight(17, 64)
    none = [plane[:0] for plane in weight.tiled]
    width = torch.tensor([8], dtype=torch.int32)
    for rows in (0, 1, 9):
        args = none, weight.tiled_scales[:, :0], width, None, weight.layout, 32, 0, 16
        assert torch.ops.flexquant.linear(_x(rows, 64), *args).shape == (rows, 0)


def test_activations_out_of_the_ordinary(isa, make_weight) -> None:
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


def test_width_is_read_at_run_time(isa, make_weight) -> None:
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
def test_width_outside_the_layout_is_clamped(native, make_weight, tile: int) -> None:
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
    wide = make_weight(17, 64)
    assert torch.equal(
        wide.op(x.double(), 4), fk.linear(x.double(), width=4, **wide.storage_args())
    )
    for weight in (wide, make_weight(17, 64, layout=(4, 4))):
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
    width = torch.tensor([4], dtype=torch.int32)
    short = [p[:, :-1] for p in weight.tiled]
    strided = [p.repeat_interleave(2, dim=1)[:, ::2] for p in weight.tiled]
    signed = [p.view(torch.int8) for p in weight.tiled]
    scales = weight.tiled_scales
    plane, pair = "plane 0 is .* expected contiguous uint8", "scales are .* expected contiguous"
    cases = [
        (lambda: weight.op(x, torch.tensor([4])), "width must be a CPU int32 tensor"),
        (lambda: weight.op(x, width.float()), "width must be a CPU int32 tensor .* not Float"),
        (lambda: weight.op(x, width.repeat(2)), "width must be .* with 2 elements"),
        (lambda: replace(weight, tiled=short).op(x, 4), plane),
        (lambda: replace(weight, tiled=strided).op(x, 4), plane),
        (lambda: replace(weight, tiled=signed).op(x, 4), plane),
        (
            lambda: replace(weight, tiled=weight.tiled[:1]).op(x, 8),
            "width 8 needs 3 planes but 1 were given",
        ),
        (lambda: replace(weight, tiled_scales=scales.float()).op(x, 4), pair),
        (lambda: replace(weight, tiled_scales=scales.bfloat16()).op(x, 4), pair),
        (lambda: replace(weight, tiled_scales=scales.mT.contiguous().mT).op(x, 4), pair),
        (lambda: replace(weight, tiled_scales=scales[:2]).op(x, 4), pair),
        (lambda: replace(weight, group_size=48).op(x, 4), "group_size 48 is not supported"),
        (lambda: replace(weight, group_size=128).op(x, 4), "group_size 128 does not divide k = 64"),
        (lambda: weight.op(_x(1, 32), 4), "plane 0 is"),
        (lambda: weight.op(torch.ones(1, 64, dtype=torch.int32), 4), "x has dtype torch.int32"),
        (lambda: weight.op(torch.tensor(1.0), 4), "x has no dimension"),
        (lambda: weight.op(x, 4, _x(16)), r"bias has shape \[16\]"),
        (lambda: weight.op(x, 4, _x(1, 17)), r"bias has shape \[1, 17\]"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
