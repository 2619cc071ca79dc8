# SPDX-License-Identifier: Apache-2.0
"""Layers that a Triton kernel runs, as they are after loading; interpreted without a GPU."""

from types import SimpleNamespace

import pytest
import torch

from flexquant_kernels import KernelChoice, ops, pack, reference
from vllm_flexquant.host.linear import OnlineFlexLinearMethod
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner.table import PrecisionTable

ROWS, COLUMNS, GROUP = 33, 96, 32


@pytest.fixture
def loaded(gpu, device, monkeypatch):
    """(method, layer, the table's entry) of a layer with a bias whose last plane was pruned."""
    monkeypatch.setattr(ops, "dispatch", lambda *_: KernelChoice("triton", 0, "test", relaid=True))
    table = PrecisionTable(device)
    config = SimpleNamespace(options=FlexQuantOptions(), table=table, widths_of=lambda _: (4, 6))
    method = OnlineFlexLinearMethod(config, "layer")
    layer = torch.nn.Module()
    layer.bias = torch.nn.Parameter(torch.ones(ROWS, device=device), requires_grad=False)
    method._declare(layer, ROWS, COLUMNS, torch.float16)
    method.group_size = GROUP
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (ROWS, COLUMNS), dtype=torch.uint8, generator=generator)
    planes = [plane.to(device) for plane in pack.pack_planes(codes, (4, 2, 2))[:2]]
    scales = torch.rand(ROWS, COLUMNS // GROUP, 3, 2, generator=generator).half().to(device)
    wanted = {
        width: reference.dequantize(planes, scales, (4, 2, 2), width, GROUP, ROWS)
        for width in (4, 6)
    }
    method._finish(layer, planes, scales)
    return method, layer, table.widths, wanted


def test_a_layer_runs_at_its_entry_of_the_table(loaded, device) -> None:
    method, layer, widths, wanted = loaded
    x = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(1)).half().to(device)
    for width, runs_at in ((4, 4), (6, 6), (8, 6)):
        widths.fill_(width)
        for given in (x, x.T.contiguous().T):
            got = method.apply(layer, given, layer.bias)
            want = x.float() @ wanted[runs_at].T + 1
            torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=2e-2)


def test_what_is_compiled_before_serving(loaded, gpu, monkeypatch) -> None:
    method, layer, _, _ = loaded
    layers = method.triton_layers(layer)
    assert {one.bias is None for one in layers} == {True, False}
    assert gpu.warm_up(layers, 20) == 2 * 3  # blocks of 8, 16 and 32 rows
    method.relaid = False
    assert method.triton_layers(layer) == []
