# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vllm_flexquant.format.layout import PlaneLayout
from vllm_flexquant.quantize.rounding import RoundingOptions, quantize_layers, threads_of_layer

SHAPES = {"a": (24, 64), "b": (16, 192), "c": (40, 64), "d": (8, 128)}


@pytest.fixture
def layers():
    generator = torch.Generator().manual_seed(0)
    found = []
    for name, (rows, columns) in SHAPES.items():
        inputs = torch.randn(256, columns, generator=generator)
        weight = torch.randn(rows, columns, generator=generator) / 50
        found.append((name, weight, inputs.T @ inputs / 256))
    return found


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_layers_side_by_side_are_what_they_are_one_by_one(layers, threads, method):
    options = RoundingOptions(PlaneLayout.parse("4|2|2"), 64, method, frozenset(SHAPES))
    if method == "rtn":
        layers = [(name, weight, None) for name, weight, _ in layers]
    torch.set_num_threads(1)
    wanted = [quantize_layers([layer], options)[0] for layer in layers]
    torch.set_num_threads(3)
    found = quantize_layers(layers, options)
    assert torch.get_num_threads() == 3
    for (name, weight, _), a, b in zip(layers, found, wanted, strict=True):
        assert a.codes.shape == weight.shape, name
        assert torch.equal(a.codes, b.codes), name
        assert torch.equal(a.scales, b.scales), name


def test_an_error_of_one_layer_ends_all_and_leaves_the_threads(layers, threads):
    layers[2] = ("c", layers[2][1], torch.full((64, 64), torch.nan))
    torch.set_num_threads(2)
    options = RoundingOptions(PlaneLayout.parse("4|2|2"), 64, "gptq", frozenset(SHAPES))
    with pytest.raises(ValueError, match="c got NaN or infinite inputs"):
        quantize_layers(layers, options)
    assert torch.get_num_threads() == 2


def test_threads_are_shared_out():
    assert [threads_of_layer(n, 7) for n in (1, 2, 7, 16, 64)] == [1, 1, 1, 2, 9]
