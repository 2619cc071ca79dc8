# SPDX-License-Identifier: Apache-2.0
"""The Triton linear kernel against the reference: in Triton's interpreter, or on a GPU if there.

The interpreter shows that the arithmetic and the addresses are right. It shows nothing of tensor
cores, of races or of registers; ``benchmarks/kernels/aot.py`` compiles for GPUs that are not here.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import flexquant_kernels as fk

pytest.importorskip("triton")

LAYOUTS = [(4, 2, 2), (2, 2, 4), (2, 1, 1, 2, 2)]
DTYPES = [torch.bfloat16, torch.float16]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture(scope="module")
def relaid(gpu, make_weight) -> Callable[..., tuple]:
    """(Weight, DeviceWeight) as ``make_weight`` makes them, made once."""
    known: dict[object, tuple] = {}

    def make(*args) -> tuple:
        if args not in known:
            weight = make_weight(*args)
            planes = [plane.to(DEVICE) for plane in weight.planes]
            device = gpu.relay(
                planes, weight.scales.to(DEVICE), weight.layout, weight.group_size, weight.k
            )
            known[args] = weight, device
        return known[args]

    return make


def _x(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _width(bits: int) -> torch.Tensor:
    return torch.tensor([bits], dtype=torch.int32, device=DEVICE)


def _check(got: torch.Tensor, x: torch.Tensor, weight, width: int, bias=None) -> None:
    """Against the reference in fp32: one rounding of the output, and the interpreter truncates."""
    want = fk.linear(x.float(), width=width, **weight.storage_args(bias))
    assert got.shape == want.shape
    assert got.dtype == x.dtype
    bound = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[x.dtype]
    error = (got.float().cpu() - want).abs().max()
    assert float(error) <= bound * float(want.abs().max())


@pytest.mark.parametrize("plane_width", [1, 2, 4])
def test_planes_come_back_from_the_device_form(gpu, plane_width) -> None:
    for n, k in ((1, 32), (65, 288), (130, 256)):
        generator = torch.Generator().manual_seed(n)
        shape = (n, k * plane_width // 8)
        plane = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        words = gpu.layout.relay_plane(plane, plane_width, k)
        n_pad, k_pad = gpu.layout.padded(n, k)
        assert words.numel() * 32 == n_pad * k_pad * plane_width
        step = range(0, 8, plane_width)
        fields = torch.stack([(plane >> i) & (2**plane_width - 1) for i in step], dim=-1)
        assert torch.equal(gpu.layout.restore_plane(words, plane_width, n, k), fields.flatten(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_code_at_every_width(gpu, make_weight, layout, dtype) -> None:
    """With x one at a single k, the output is the code itself: all of it is exact."""
    made = make_weight(64, 256, 32, layout)
    scales = torch.zeros_like(made.scales)
    scales[..., 0] = 1.0
    weight = replace(made, scales=scales)
    device = gpu.relay(
        [p.to(DEVICE) for p in weight.planes], scales.to(DEVICE), layout, 32, weight.k
    )
    picked = torch.tensor([0, 1, 17, 31, 32, 66, 127, 128, 145, 163, 194, 228, 240, 255])
    x = torch.nn.functional.one_hot(picked, 256).to(dtype).to(DEVICE)
    for width in weight.widths:
        got = gpu.linear(x, device, _width(width)).cpu()
        assert torch.equal(got.long(), (weight.codes >> (8 - width)).T[picked].long()), width


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["per-width", "shared"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_agrees_with_the_reference(gpu, relaid, layout, shared, dtype) -> None:
    for n, k, group_size, rows in ((1, 32, 32, 1), (65, 288, 32, 3)):
        weight, device = relaid(n, k, group_size, layout, shared)
        bias = _x(n)
        for width in weight.widths:
            x = _x(rows, k).to(dtype)
            got = gpu.linear(x.to(DEVICE), device, _width(width), bias.to(DEVICE))
            _check(got, x, weight, width, bias)


@pytest.mark.parametrize("rows", [4, 5, 8, 9, 16, 17, 33, 70])
def test_rows(gpu, relaid, rows) -> None:
    weight, device = relaid(40, 384, 128)
    x = _x(rows, 384).half()
    for width in (4, 8):
        _check(gpu.linear(x.to(DEVICE), device, _width(width)), x, weight, width)


def test_splits_of_k_are_added_in_order(gpu, relaid) -> None:
    weight, device = relaid(70, 576, 64)
    for rows in (1, 13):
        x = _x(rows, weight.k).half()
        for splits in (1, 2, 3):
            launch = gpu.Launch(8, splits, 2, 2)
            got = gpu.linear(x.to(DEVICE), device, _width(6), launch=launch)
            _check(got, x, weight, 6)
            again = gpu.linear(x.to(DEVICE), device, _width(6), launch=launch)
            assert torch.equal(got, again)
            assert not device.counters.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_many_rows_take_a_weight_that_is_dequantized(
    gpu, relaid, monkeypatch, layout, dtype
) -> None:
    rows = gpu.tuning.table_of("none").dequantize_above + 1
    monkeypatch.setitem(gpu.linear.__globals__, "SLICE_WEIGHTS", 300 * 64)  # slices of 64 outputs
    weight, device = relaid(70, 288, 32, layout)
    x, bias = _x(rows, 288).to(dtype), _x(70)
    _check(gpu.linear(x.to(DEVICE), device, _width(4)), x, weight, 4)
    _check(gpu.linear(x.to(DEVICE), device, _width(99), bias.to(DEVICE)), x, weight, 8, bias)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_dequantized_weights(gpu, relaid, layout) -> None:
    dequantize = gpu.dequantize.dequantize
    for n, k, group_size, shared, dtype, bound in (
        (70, 288, 32, False, torch.bfloat16, 2**-7),
        (65, 256, 128, True, torch.float16, 2**-10),
    ):
        weight, device = relaid(n, k, group_size, layout, shared)
        for width in weight.widths:
            want = fk.dequantize(weight.planes, weight.scales, layout, width, group_size, n)
            got = dequantize(device, _width(width), dtype)
            torch.testing.assert_close(got.float().cpu(), want, rtol=bound, atol=1e-6)
            part = dequantize(device, _width(width), dtype, 64, 65)
            assert torch.equal(part, got[64:65])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_weight_without_its_last_planes_runs_at_what_it_has(gpu, relaid, layout) -> None:
    weight, device = relaid(33, 96, 32, layout)
    for count in range(1, len(layout) + 1):
        some = gpu.relay(weight.planes[:count], weight.scales, layout, 32, weight.k)
        some = replace(some, planes=tuple(p.to(DEVICE) for p in some.planes),
                       scales=device.scales, counters=device.counters)  # fmt: skip
        assert some.widths == weight.widths[:count]
        for rows in (2, 300):
            x = _x(rows, 96).half().to(DEVICE)
            want = gpu.linear(x, device, _width(some.widths[-1]))
            assert torch.equal(gpu.linear(x, some, _width(8)), want)


def test_width_is_read_at_the_launch_and_clamped(gpu, relaid) -> None:
    for layout in LAYOUTS:
        weight, device = relaid(20, 128, 64, layout)
        x = _x(2, 128).half()
        table = torch.tensor([99, 4, 99], dtype=torch.int32, device=DEVICE)
        for bits in (4, 8, 0, 1, 2, 3, 5, 6, 7, 9, -3):
            table[1] = bits
            got = gpu.linear(x.to(DEVICE), device, table[1:2])
            _check(got, x, weight, fk.clamp_width(layout, bits))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_planes_above_the_width_are_not_read(gpu, relaid, layout) -> None:
    weight, device = relaid(33, 96, 32, layout)
    x = _x(3, 96).half().to(DEVICE)
    for i, width in enumerate(weight.widths):
        want = gpu.linear(x, device, _width(width))
        scales = torch.full_like(device.scales, torch.nan)
        scales[i] = device.scales[i]
        planes = [p if j <= i else ~p for j, p in enumerate(device.planes)]
        got = gpu.linear(x, replace(device, planes=tuple(planes), scales=scales), _width(width))
        assert torch.equal(got, want)


def test_shapes(gpu, relaid) -> None:
    _, device = relaid(17, 64, 32)
    x = _x(6, 64).half().to(DEVICE)
    want = gpu.linear(x, device, _width(8))
    assert torch.equal(gpu.linear(x.view(2, 3, 64), device, _width(8)), want.view(2, 3, 17))
    assert torch.equal(gpu.linear(x[0], device, _width(8)), want[0])
    assert gpu.linear(x[:0], device, _width(8)).shape == (0, 17)
    assert gpu.linear(x.new_empty(2, 0, 64), device, _width(8)).shape == (2, 0, 17)


def test_activations_at_odd_addresses(gpu, relaid) -> None:
    _, device = relaid(17, 64, 32)
    x = _x(3, 64).half().to(DEVICE)
    want = gpu.linear(x, device, _width(6))
    for by in (1, 3, 5):
        moved = x.new_empty(x.numel() + by)[by:].view(x.shape).copy_(x)
        assert torch.equal(gpu.linear(moved, device, _width(6)), want)


def test_activations_out_of_the_ordinary(gpu, relaid) -> None:
    """A NaN or an infinity makes its row NaN; the others do not change. Zeros give zeros."""
    _, device = relaid(17, 64, 32)
    x = _x(4, 64).half().to(DEVICE)
    clean = gpu.linear(x, device, _width(6))
    x[0] = 0.0
    x[1, 5], x[2, 40] = torch.nan, -torch.inf
    got = gpu.linear(x, device, _width(6))
    assert not got[0].any()
    assert got[1:3].isnan().all()
    assert torch.equal(got[3], clean[3])


def test_bias_dtypes(gpu, relaid) -> None:
    weight, device = relaid(17, 64, 32)
    x = _x(2, 64).half()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        bias = _x(18).to(dtype)[1:]  # at an odd address
        got = gpu.linear(x.to(DEVICE), device, _width(4), bias.to(DEVICE))
        _check(got, x, weight, 4, bias)


def test_bad_inputs_say_what_to_do(gpu, relaid) -> None:
    _, device = relaid(17, 64, 32)
    x, width, bias = _x(3, 64).half().to(DEVICE), _width(4), _x(34).to(DEVICE)

    def refused(words: str, *args, **kwargs) -> None:
        with pytest.raises(ValueError, match=words):
            gpu.linear(*args, **kwargs)

    refused("x has dtype torch.float32: give bfloat16 or float16", x.float(), device, width)
    refused(r"x has shape \(3, 32\) but the weight has k = 64", x[:, :32], device, width)
    refused(r"x has strides \(1, 3\): pass x.contiguous", x.T.contiguous().T, device, width)
    refused("width is torch.int64 with 1 elements: give one int32", x, device, width.long())
    refused("width is torch.int32 with 2 elements", x, device, width.repeat(2))
    refused(r"bias is torch.float32 \(3,\): give a float tensor \[17\]", x, device, width, bias[:3])
    refused(r"bias has strides \(2,\)", x, device, width, bias[::2])
    refused("width is on meta but the weight on", x, device, width.to("meta"))
    refused("x is on meta", x.to("meta"), device, width)
    refused("bias is on meta but the weight on", x, device, width, bias[:17].to("meta"))
    refused("bias is torch.int32", x, device, width, bias[:17].int())
    refused(r"x has shape \(\) but the weight has k = 64", x[0, 0], device, width)
    refused("splits is 2 for 3 rows, k = 64: give 1 to 1", x, device, width,
            launch=gpu.Launch(8, 2, 2, 2))  # fmt: skip


def test_a_weight_is_dequantized_as_asked_or_not_at_all(gpu, relaid) -> None:
    dequantize = gpu.dequantize.dequantize
    _, device = relaid(70, 288, 32)
    width = _width(4)

    def refused(words: str, *args) -> None:
        with pytest.raises(ValueError, match=words):
            dequantize(device, *args)

    refused("width is torch.int64 with 1 elements: give one int32", width.long(), torch.float16)
    refused("width is torch.int32 with 2 elements", width.repeat(2), torch.float16)
    refused("width is on meta but the weight on", width.to("meta"), torch.float16)
    refused("dtype is torch.float32: give bfloat16 or float16", width, torch.float32)
    refused(r"rows \[1, 70\) of 70: .* a multiple of 64", width, torch.float16, 1)
    refused(r"rows \[0, 71\) of 70: give some of them", width, torch.float16, 0, 71)
    refused(r"rows \[64, 3\) of 70: give some of them", width, torch.float16, 64, 3)
    assert dequantize(device, width, torch.float16, 64, 64).shape == (0, 288)
    whole = dequantize(device, width, torch.bfloat16)
    for bits in (-3, 0, 3):
        assert torch.equal(dequantize(device, _width(bits), torch.bfloat16), whole)
    top = dequantize(device, _width(8), torch.bfloat16)
    table = torch.tensor([0, 99], dtype=torch.int32, device=DEVICE)
    assert torch.equal(dequantize(device, table[1:], torch.bfloat16), top)
    assert not torch.equal(top, whole)


def test_bad_weights_say_what_to_do(gpu, make_weight) -> None:
    weight = make_weight(17, 64, 32)
    planes, scales = weight.planes, weight.scales

    def refused(words: str, *args) -> None:
        with pytest.raises(ValueError, match=words):
            gpu.relay(*args)

    refused("0 planes were given where layout", [], scales, (4, 2, 2), 32, 64)
    refused("4 planes were given where layout", [*planes, planes[0]], scales, (4, 2, 2), 32, 64)
    refused(r"layout \(4, 4\) has no Triton kernel: use one of", planes, scales, (4, 4), 32, 64)
    refused("plane of width 4 is torch.int32", [planes[0].int()] * 3, scales, (4, 2, 2), 32, 64)
    refused("give uint8 ", planes, scales, (2, 2, 4), 32, 64)
    refused("scales have shape", planes, scales[:, :1], (4, 2, 2), 32, 64)
    refused(r"planes have no rows: a layer \[0, 64\]", [p[:0] for p in planes], scales[:0],
            (4, 2, 2), 32, 64)  # fmt: skip
    refused("k = 0 ", planes, scales, (4, 2, 2), 32, 0)
    refused("planes are on .*meta.* but the scales on cpu: move one",
            [p.to("meta") for p in planes], scales, (4, 2, 2), 32, 64)  # fmt: skip
    refused("scales are torch.float32", planes, scales.float(), (4, 2, 2), 32, 64)
    refused("group_size 128 does not divide", planes, scales, (4, 2, 2), 128, 64)
