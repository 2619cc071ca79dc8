# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vllm_flexquant.format import PlaneLayout
from vllm_flexquant.quantize.integer_grid import SCALE_DTYPE, compensated, nearest
from vllm_flexquant.quantize.rtn import quantize_rtn


@pytest.fixture(scope="module")
def layer():
    """Weights with outliers and a mean of their own per group, and inputs that depend on each
    other."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 128, generator=generator) * 0.05
    weight += torch.randn(48, 4, generator=generator).repeat_interleave(32, 1) * 0.03
    mixing = torch.randn(128, 128, generator=generator) / 128**0.5
    inputs = torch.randn(4096, 128, generator=generator) @ mixing
    return weight, inputs.T @ inputs / len(inputs)


def output_error(weight, hessian, got):
    error = got - weight
    return float(((error @ hessian) * error).sum())


@pytest.mark.parametrize(("width", "symmetric"), [(4, False), (4, True), (8, True)])
def test_codes_scales_and_zeros_are_what_the_format_holds(layer, width, symmetric):
    weight, hessian = layer
    for found in (
        nearest(weight, width, 32, symmetric),
        compensated(weight, hessian, width, 32, symmetric),
    ):
        assert found.codes.dtype == found.zeros.dtype == torch.uint8
        assert found.scales.dtype == SCALE_DTYPE
        assert found.codes.shape == weight.shape
        assert found.scales.shape == found.zeros.shape == (48, 4)
        assert int(found.codes.max()) < 1 << width
        assert int(found.zeros.max()) < 1 << width
        assert (found.scales > 0).all()
        if symmetric:
            assert (found.zeros == 1 << (width - 1)).all()
        error = (found.dequantize() - weight).square().mean() / weight.square().mean()
        assert error < (0.03 if width == 4 else 1e-4)


def test_whole_zeros_searched_cost_less_than_own_offsets_rounded(layer):
    weight, _ = layer
    layout = PlaneLayout()
    own = quantize_rtn(weight, layout, 32)
    nested = own.dequantize(layout, 4)
    scale, offset = own.scales[:, :, 0].float().unbind(-1)
    zero = (-offset / scale).round()
    codes = (own.codes >> 4).float().unflatten(1, (4, 32))
    moved = ((codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)

    def error(got):
        return float((got - weight).square().mean())

    found = nearest(weight, 4, 32, symmetric=False).dequantize()
    assert error(found) < error(moved) / 1.5
    assert error(found) < error(nested)


def test_compensation_lowers_the_error_of_the_output(layer):
    weight, hessian = layer
    plain = output_error(weight, hessian, nearest(weight, 4, 32, False).dequantize())
    found = output_error(weight, hessian, compensated(weight, hessian, 4, 32, False).dequantize())
    assert found < 0.7 * plain


def test_groups_of_one_value_and_inputs_that_are_always_zero():
    weight = torch.randn(8, 64)
    weight[0], weight[1, :32], weight[2, :32] = 0, 3.0, -1e-9
    hessian = torch.eye(64)
    hessian[:, 5] = hessian[5] = 0
    for found in (nearest(weight, 4, 32, False), compensated(weight, hessian, 4, 32, False)):
        got = found.dequantize()
        assert torch.isfinite(got).all()
        assert not got[0].any()
        torch.testing.assert_close(got[1, :32], weight[1, :32], rtol=0.01, atol=0)
        assert got[2, :32].abs().max() < 1e-6
