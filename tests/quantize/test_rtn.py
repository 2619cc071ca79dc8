# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexquant_kernels import pack, reference
from vllm_flexquant.format import PlaneLayout, ScaleMode
from vllm_flexquant.quantize.rtn import quantize_rtn

LAYOUTS = ["4|2|2", "2|2|4", "2|1|1|2|2"]


def at_width(weight, layout, group, mode, width):
    codes, scales = quantize_rtn(weight, layout, group, mode)
    planes = pack.pack_planes(codes, layout.planes)
    return reference.dequantize(planes, scales, layout.planes, width, group, len(weight), tile=0)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    group=st.sampled_from([32, 64, 128]),
    text=st.sampled_from(LAYOUTS),
    mode=st.sampled_from(list(ScaleMode)),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 1000),
)
def test_error_is_bounded_by_the_step_of_each_width(rows, groups, group, text, mode, scale, seed):
    weight = (
        torch.randn(rows, groups * group, generator=torch.Generator().manual_seed(seed)) * scale
    )
    layout = PlaneLayout.parse(text)
    spread = weight.reshape(rows, groups, group)
    spread = spread.amax(-1) - spread.amin(-1)
    last = None
    for width in layout.widths:
        error = (at_width(weight, layout, group, mode, width) - weight).reshape(rows, groups, group)
        # half a step of the width, and what fp16 scales add
        step = spread / (1 << width)
        rms = error.square().mean(-1).sqrt()
        assert (rms <= 0.75 * step + 2e-3 * scale).all()
        total = float(error.square().sum())
        assert last is None or total < last
        last = total


@pytest.mark.parametrize("text", LAYOUTS)
def test_scales_per_width_are_never_worse_than_shared(text):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    layout = PlaneLayout.parse(text)
    for width in layout.widths[:-1]:
        own = (at_width(weight, layout, 64, ScaleMode.PER_WIDTH, width) - weight).square().sum()
        shared = (at_width(weight, layout, 64, ScaleMode.SHARED, width) - weight).square().sum()
        assert own <= shared


def test_constant_groups_and_zeros_survive():
    weight = torch.zeros(3, 64)
    weight[1] = 0.25
    for mode in ScaleMode:
        for width in (4, 6, 8):
            back = at_width(weight, PlaneLayout(), 64, mode, width)
            torch.testing.assert_close(back, weight, atol=1e-4, rtol=0)


def test_chunks_do_not_change_the_result(monkeypatch):
    weight = torch.randn(37, 128)
    whole = quantize_rtn(weight, PlaneLayout(), 64)
    monkeypatch.setattr("vllm_flexquant.quantize.rtn._CHUNK_ELEMENTS", 500)
    parts = quantize_rtn(weight, PlaneLayout(), 64)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)


def test_nan_infinite_and_huge_weights_are_refused():
    weight = torch.randn(8, 64)
    weight[5, 3] = torch.nan
    with pytest.raises(ValueError, match=r"model\.x has NaN or infinite weights"):
        quantize_rtn(weight, PlaneLayout(), 64, name="model.x")
    weight[5, 3] = 1e6
    with pytest.raises(ValueError, match=r"model\.x has a weight of magnitude 1e\+06"):
        quantize_rtn(weight, PlaneLayout(), 64, name="model.x")
