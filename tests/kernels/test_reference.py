# SPDX-License-Identifier: Apache-2.0
"""The plain-torch truth, checked against the definitions written out element by element."""

import pytest
import torch

import flexquant_kernels as fk
from flexquant_kernels import reference


def _by_hand(weight, width: int) -> torch.Tensor:
    out = torch.empty(weight.n, weight.k)
    shared = weight.scales.shape[2] == 1
    for row in range(weight.n):
        for k in range(weight.k):
            pair = weight.scales[row, k // weight.group_size]
            q = int(weight.codes[row, k]) >> (8 - width)
            if shared:
                s, o = float(pair[0, 0]), float(pair[0, 1])
                step = 2 ** (8 - width)
                out[row, k] = s * step * q + o + s * (step - 1) / 2
            else:
                s, o = pair[weight.widths.index(width)].tolist()
                out[row, k] = s * q + o
    return out


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", [(4, 2, 2), (2, 2, 4), (2, 1, 1, 2, 2)])
def test_dequantize(make_weight, layout, shared: bool) -> None:
    weight = make_weight(5, 64, 32, layout, shared)
    for width in weight.widths:
        got = fk.dequantize(weight.planes, weight.scales, layout, width, 32, 5)
        torch.testing.assert_close(got, _by_hand(weight, width), rtol=1e-6, atol=1e-6)
        tiled = fk.dequantize(weight.tiled, weight.tiled_scales, layout, width, 32, 5, tile=16)
        assert torch.equal(tiled, got)


def test_half_step_is_the_middle_of_the_codes_it_stands_for(make_weight) -> None:
    weight = make_weight(4, 32, shared=True)
    parents = torch.arange(0x50, 0x60, dtype=torch.uint8).repeat(4, 2)
    planes = fk.pack_planes(parents)
    full = fk.dequantize(planes, weight.scales, (4, 2, 2), 8, 32, 4)
    low = fk.dequantize(planes, weight.scales, (4, 2, 2), 4, 32, 4)
    torch.testing.assert_close(low[:, 0], full[:, :16].mean(dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_is_the_matmul_with_the_dequantized_weight(make_weight, dtype, monkeypatch) -> None:
    weight = make_weight(33, 96)
    monkeypatch.setattr(reference, "_CHUNK", 96 * 10)  # several chunks of rows
    x, bias = torch.randn(2, 3, 96).to(dtype), torch.randn(33)
    for width in weight.widths:
        got = fk.linear(x, width=width, **weight.storage_args(bias))
        dense = fk.dequantize(weight.planes, weight.scales, weight.layout, width, 32, 33)
        want = torch.nn.functional.linear(x.float(), dense, bias).to(dtype)
        assert got.dtype == dtype
        assert got.shape == (2, 3, 33)
        torch.testing.assert_close(
            got, want, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-4
        )


def test_quantized_activations() -> None:
    x = torch.zeros(4, 64)
    x[0, :3] = torch.tensor([127.0, 0.5, 1.5])  # halves go to even
    x[0, 32:34] = torch.tensor([-2.0, 1.0])
    x[1, 0] = 1e-38  # too small for 127/amax
    x[2, 40] = torch.nan
    x[3, 1] = -torch.inf
    q, scale = reference.quantize_activations(x, 32)
    assert q[0, 0, :3].tolist() == [127, 0, 2]
    assert q[0, 1, :2].tolist() == [-127, 64]
    assert scale[0].tolist() == [1.0, pytest.approx(2 / 127)]
    assert scale[1].tolist() == [0.0, 0.0]
    assert not q[1].any()
    assert scale[2, 0] == 0
    assert scale[2, 1].isnan()
    assert scale[3, 0].isnan()
    assert not q[2:].any()


def test_int8_activations_are_close_to_the_truth(make_weight) -> None:
    weight = make_weight(64, 576, 64)
    x = torch.randn(32, 576, generator=torch.Generator().manual_seed(0))
    truth = fk.linear(x, width=8, **weight.storage_args())
    error = (fk.linear_int8(x, width=8, **weight.storage_args()) - truth).norm() / truth.norm()
    assert error < 0.01  # measured 0.0059: normal activations in groups of 64


def test_entropy() -> None:
    logits = torch.randn(6, 50)
    logits[1, ::2] = -torch.inf
    logits[2] = 0.0
    logits[3, 1:] = -torch.inf
    got = fk.entropy(logits)
    p = logits.double().softmax(-1)
    want = -torch.where(p > 0, p * p.log(), 0.0).sum(-1)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert got[3] == 0
    logits[3] = -torch.inf
    logits[4, 7] = torch.nan
    logits[5, 7] = torch.inf
    assert fk.entropy(logits).isnan().tolist() == [False, False, False, True, True, True]


def test_bad_input(make_weight) -> None:
    weight = make_weight(4, 64)
    args = weight.storage_args()
    with pytest.raises(ValueError, match=r"width 5 is not in layout .* use one of \(4, 6, 8\)"):
        fk.linear(torch.zeros(1, 64), width=5, **args)
    with pytest.raises(ValueError, match=r"x has shape \(1, 32\) .* k = 64"):
        fk.linear(torch.zeros(1, 32), width=4, **args)
    with pytest.raises(ValueError, match=r"x has dtype torch\.int64"):
        fk.linear(torch.zeros(1, 64, dtype=torch.int64), width=4, **args)
    with pytest.raises(
        ValueError, match=r"group_size 128 does not divide k = 64: use one of \[32, 64\]"
    ):
        fk.linear(torch.zeros(1, 64), width=4, **{**args, "group_size": 128})
    with pytest.raises(ValueError, match="group_size 48 is not supported"):
        fk.linear(torch.zeros(1, 64), width=4, **{**args, "group_size": 48})
    with pytest.raises(ValueError, match="plane 0 has 4 rows where n = 5"):
        fk.linear(torch.zeros(1, 64), width=4, **{**args, "out_features": 5})
    with pytest.raises(ValueError, match=r"scales have shape .* S = 1 or 3"):
        fk.linear(torch.zeros(1, 64), width=4, **{**args, "scales": weight.scales[:, :, :2]})
    with pytest.raises(ValueError, match="needs 3 planes but 1 were given"):
        fk.linear(torch.zeros(1, 64), width=8, **{**args, "planes": weight.planes[:1]})
    with pytest.raises(ValueError, match=r"logits have shape \(3,\)"):
        fk.entropy(torch.zeros(3))
