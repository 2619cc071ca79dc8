# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vllm_flexquant.format import PlaneLayout
from vllm_flexquant.quantize.gptq import (
    GptqSettings,
    accumulate_hessian,
    nested_gptq,
    output_error,
)
from vllm_flexquant.quantize.rtn import quantize_rtn


def correlated_inputs(columns, tokens=2048, seed=0):
    """Inputs whose columns depend on each other, as those of real layers do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    scale = torch.logspace(0, -1.5, columns)
    return torch.randn(tokens, columns, generator=generator) * scale @ (mix + torch.eye(columns))


def problem(rows=48, columns=128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    hessian = torch.zeros(columns, columns)
    accumulate_hessian(hessian, correlated_inputs(columns, seed=seed), 0)
    return weight, hessian


@pytest.mark.parametrize("text", ["4|2|2", "2|2|4", "2|1|1|2|2"])
def test_every_width_is_better_than_round_to_nearest(text):
    layout = PlaneLayout.parse(text)
    weight, hessian = problem()
    nearest = output_error(weight, hessian, quantize_rtn(weight, layout, 64), layout)
    nested = output_error(weight, hessian, nested_gptq(weight, hessian, layout, 64), layout)
    assert set(nested) == set(layout.widths)
    for width in layout.widths[:-1]:
        assert nested[width] < 0.9 * nearest[width]
    assert nested[8] < 1.1 * nearest[8]
    assert nested[4] < 0.85 * nearest[4]


def test_the_error_is_that_of_the_layers_output():
    layout = PlaneLayout()
    weight, _ = problem()
    inputs = correlated_inputs(128)
    hessian = torch.zeros(128, 128)
    seen = 0
    for part in inputs.split(300):
        seen = accumulate_hessian(hessian, part, seen)
    assert seen == len(inputs)
    quantized = quantize_rtn(weight, layout, 64)
    error = output_error(weight, hessian, quantized, layout)
    for width in layout.widths:
        back = quantized.dequantize(layout, width)
        moved = (inputs @ (back - weight).T).square().sum() / (inputs @ weight.T).square().sum()
        assert error[width] == pytest.approx(float(moved), rel=1e-3)


def test_more_emphasis_on_the_lowest_width_helps_it_at_the_cost_of_the_others():
    layout = PlaneLayout()
    weight, hessian = problem(rows=96)
    errors = {
        emphasis: output_error(
            weight,
            hessian,
            nested_gptq(
                weight, hessian, layout, 64, GptqSettings(emphasis=(1.0, emphasis, emphasis))
            ),
            layout,
        )
        for emphasis in (1e-4, 4.0)
    }
    assert errors[1e-4][4] < 0.3 * errors[4.0][4]
    assert errors[4.0][8] < 0.1 * errors[1e-4][8]


def test_same_input_same_codes():
    weight, hessian = problem()
    first, second = (nested_gptq(weight, hessian, PlaneLayout(), 64) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)


def test_constant_groups_dead_inputs_and_few_tokens():
    layout = PlaneLayout()
    weight, _ = problem(rows=5)
    weight[:, :64] = 0.25
    weight[2] = 0.0
    inputs = correlated_inputs(128, tokens=20)
    inputs[:, 100:] = 0.0
    hessian = torch.zeros(128, 128)
    accumulate_hessian(hessian, inputs, 0)
    quantized = nested_gptq(weight, hessian, layout, 64)
    assert torch.isfinite(quantized.scales).all()
    for width in layout.widths:
        back = quantized.dequantize(layout, width)
        assert torch.isfinite(back).all()
        assert (back[2]).abs().max() < 1e-3
        assert (back - weight)[:, :64].abs().max() < 2e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_and_bad_inputs_name_the_layer(value):
    weight, hessian = problem(rows=4)
    broken = weight.clone()
    broken[1, 3] = value
    with pytest.raises(ValueError, match=r"up_proj has NaN or infinite weights"):
        nested_gptq(broken, hessian, PlaneLayout(), 64, name="up_proj")
    hessian[0, 0] = value
    with pytest.raises(ValueError, match=r"up_proj got NaN or infinite inputs"):
        nested_gptq(weight, hessian, PlaneLayout(), 64, name="up_proj")
