# SPDX-License-Identifier: Apache-2.0
"""W8A8 and W4A16 checkpoints: against compressed-tensors' own code, and served by stock vLLM."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.serving.checkpoints import (
    SCHEMES,
    make_checkpoint,
    quantization_config,
    quantize_weight,
    round_to_nearest,
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "tie_word_embeddings": True,
}
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A Llama of one layer in float16, its embedding tied, as a checkpoint of two files."""
    torch.manual_seed(0)
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    half = torch.float16
    linear = {f"model.layers.0.{n}.weight": torch.randn(s).to(half) for n, s in SHAPES.items()}
    others = {
        "model.embed_tokens.weight": torch.randn(96, 64).to(half),
        "model.norm.weight": torch.ones(64, dtype=half),
    }
    save_file(linear, folder / "model-00001-of-00002.safetensors")
    save_file(others, folder / "model-00002-of-00002.safetensors")
    where = dict.fromkeys(linear, "model-00001-of-00002.safetensors")
    where |= dict.fromkeys(others, "model-00002-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 32), (4, 128)])
def test_rounding_is_that_of_compressed_tensors(bits, group_size):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    weight = torch.randn(6, 256) * torch.logspace(-3, 2, 6).unsqueeze(1)
    arguments = quantization.QuantizationArgs(
        num_bits=bits,
        symmetric=True,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
    )
    grouped = weight.reshape(6, -1, group_size or 256)
    scales, zeros = utils.calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments)
    wanted = forward.quantize(weight, scales, zeros, arguments, dtype=torch.int8)
    codes, ours = round_to_nearest(weight, bits, group_size, torch.float32)
    torch.testing.assert_close(ours, scales, rtol=1e-6, atol=0)
    # a scale that differs in its last bit may round a tie the other way
    assert (codes != wanted).float().mean() < 1e-3
    assert (codes.int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda s: s.name)
def test_error_is_at_most_half_a_step(scheme):
    weight = torch.randn(16, 256)
    weight[3] = 0
    weight[4, :64] = 1e-9
    group_size = scheme.group_size or 256
    codes, scales = round_to_nearest(weight, scheme.bits, scheme.group_size, scheme.scale_dtype)
    step = scales.float().repeat_interleave(group_size, dim=1)
    error = (codes.float() * step - weight).abs()
    # half a step, and as much again where the largest positive value is clamped; a scale in bf16
    # is up to 2^-9 off
    inside = codes < 2 ** (scheme.bits - 1) - 1
    assert (error[inside] <= 0.502 * step[inside]).all()
    assert (error <= 0.54 * step).all()
    assert not codes[3].any()


def test_tiny_checkpoint_holds_what_the_formats_say(tiny, tmp_path):
    names = [f"model.layers.0.{name}" for name in SHAPES]
    original = load_file(tiny / "model-00001-of-00002.safetensors")
    for scheme in SCHEMES.values():
        out = make_checkpoint(tiny, tmp_path / scheme.name, scheme)
        index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        stored = {}
        for file in out.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a mapping
                    assert index[key] == file.name
                    stored[key] = tensors.get_tensor(key)
        assert set(index) == set(stored)
        embedding = stored["model.embed_tokens.weight"]
        assert embedding.dtype == torch.float16
        for name in names:
            expected = quantize_weight(name, original[f"{name}.weight"], scheme)
            assert {k for k in stored if k.startswith(f"{name}.")} == set(expected)
            for key, tensor in expected.items():
                assert torch.equal(stored[key], tensor)
                assert stored[key].dtype == tensor.dtype
        config = json.loads((out / "config.json").read_text())
        assert config["vocab_size"] == 96
        assert config["quantization_config"]["ignore"] == ["lm_head"]
        assert (out / "tokenizer.json").exists()


def test_shapes_and_dtypes():
    weight = torch.randn(32, 192)
    w8a8 = quantize_weight("x", weight, SCHEMES["w8a8"])
    assert {k: (t.dtype, tuple(t.shape)) for k, t in w8a8.items()} == {
        "x.weight": (torch.int8, (32, 192)),
        "x.weight_scale": (torch.float32, (32, 1)),
    }
    w4a16 = quantize_weight("x", weight, SCHEMES["w4a16"])
    assert {k: (t.dtype, tuple(t.shape)) for k, t in w4a16.items()} == {
        "x.weight_packed": (torch.int32, (32, 24)),
        "x.weight_scale": (torch.bfloat16, (32, 3)),
        "x.weight_shape": (torch.int64, (2,)),
    }
    assert w4a16["x.weight_shape"].tolist() == [32, 192]


def test_config_has_a_group_for_each_group_size():
    modules = {"a.up": (64, 256), "a.down": (64, 512), "a.odd": (64, 576)}
    groups = quantization_config(modules, SCHEMES["w4a16"])["config_groups"].values()
    assert {tuple(g["targets"]): g["weights"]["group_size"] for g in groups} == {
        ("a.up", "a.down"): 128,
        ("a.odd",): 64,
    }
    (group,) = quantization_config(modules, SCHEMES["w8a8"])["config_groups"].values()
    assert group["weights"]["strategy"] == "channel"
    assert group["input_activations"]["strategy"] == "token"


def test_configs_are_valid_for_compressed_tensors():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    for scheme in SCHEMES.values():
        config = quantization_config({"a": (64, 576), "b": (64, 256)}, scheme)
        read = quantization.QuantizationConfig.model_validate(config)
        assert read.format == scheme.format


def test_what_cannot_be_quantized_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="exists; name a new folder"):
        make_checkpoint(tiny, tmp_path, SCHEMES["w8a8"])
    made = make_checkpoint(tiny, tmp_path / "w8a8", SCHEMES["w8a8"])
    with pytest.raises(ValueError, match="no unquantized checkpoint"):
        make_checkpoint(made, tmp_path / "again", SCHEMES["w4a16"])
    with pytest.raises(ValueError, match=r"x\.weight holds NaN"):
        quantize_weight("x", torch.full((8, 64), torch.nan), SCHEMES["w8a8"])
    with pytest.raises(ValueError, match="divides its 48 inputs"):
        quantize_weight("x", torch.randn(8, 48), SCHEMES["w4a16"])
    (tiny / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\."):
        make_checkpoint(tiny, tmp_path / "half", SCHEMES["w8a8"])
    assert not (tmp_path / "half").exists()
