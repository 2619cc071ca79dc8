# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flexquant_kernels import reference
from vllm_flexquant.cli import app
from vllm_flexquant.format import PlaneLayout
from vllm_flexquant.format.checkpoint import OutputLayer, StoredConfig, validate_checkpoint
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.quantize.pipeline import quantize_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory, save_model):
    """A tiny random Llama in bf16, output layer of its own."""
    folder = tmp_path_factory.mktemp("model")
    save_model(
        folder,
        torch.bfloat16,
        vocab_size=100,
        intermediate_size=160,
        num_hidden_layers=2,
        tie_word_embeddings=False,
    )
    return folder


def test_each_width_of_a_saved_checkpoint_is_nearer_to_the_weight(model, tmp_path):
    out = tmp_path / "out"
    seen = []
    modules = quantize_checkpoint(model, out, FlexQuantOptions(), lambda *a: seen.append(a))
    assert len(modules) == 2 * 7 + 1
    assert seen[-1][1:] == (15, 15)
    weights, stored = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    assert f"{name}.weight" not in stored
    planes = [stored[f"{name}.plane{i}"] for i in range(3)]
    assert planes[0].shape == (64, 160 // 2)
    errors = []
    for width in (4, 6, 8):
        back = reference.dequantize(
            planes, stored[f"{name}.scales"], (4, 2, 2), width, 32, 64, tile=0
        )
        errors.append(float((back - weights[f"{name}.weight"].float()).square().mean()))
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert torch.equal(stored["model.norm.weight"], weights["model.norm.weight"])
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == "1.1"
    assert StoredConfig.read(config).output_layer is OutputLayer.PLANES
    record = json.loads((out / "flexquant.json").read_text())
    assert set(record["files"]) == {"model.safetensors"}
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("layout", ["2|2|4", "2|1|1|2|2"])
def test_other_layouts_and_shared_scales_validate(model, tmp_path, layout):
    options = FlexQuantOptions(layout=PlaneLayout.parse(layout), scales="shared", group_size=32)
    quantize_checkpoint(model, tmp_path / "out", options)
    assert len(validate_checkpoint(tmp_path / "out")) == 15


def test_ignored_layers_stay_and_are_recorded(model, tmp_path):
    options = FlexQuantOptions(ignore=("model.layers.0.mlp.up_proj", "o_proj"), output_layer=False)
    modules = quantize_checkpoint(model, tmp_path / "out", options)
    assert len(modules) == 14 - 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.up_proj" in config["ignore"]
    assert config["output_layer"] == "plain"


def broken(model, tmp_path, change):
    copy = tmp_path / "broken"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    change(copy)
    return copy


def poison(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def declare_quantized(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))


def name_strange_model(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "strange"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poison, "model.layers.1.mlp.up_proj.weight has NaN or infinite weights in rows 0 to 159"),
        (declare_quantized, "is already quantized .gptq.; start from the unquantized checkpoint"),
        (name_strange_model, "transformers cannot build this model"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "has no .safetensors file"),
    ],
)
def test_what_cannot_be_quantized_leaves_nothing_behind(model, tmp_path, change, message):
    copy = broken(model, tmp_path, change)
    result = CliRunner().invoke(
        app, ["quantize", str(copy), str(tmp_path / "out"), "--method", "rtn"]
    )
    assert result.exit_code != 0
    with pytest.raises(ValueError, match=message):
        raise result.exception
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]


def test_an_existing_folder_is_not_overwritten(model, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists and is not empty; name a new folder"):
        quantize_checkpoint(model, tmp_path, FlexQuantOptions())
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_config_reader_ignores_what_it_does_not_know_and_refuses_what_it_cannot_read():
    assert StoredConfig.read({"format_version": "1.7", "new": 1}).layout == "4|2|2"
    with pytest.raises(ValueError, match=r"format_version is '2.0', this release .* reads 1.x"):
        StoredConfig.read({"format_version": "2.0"})
    with pytest.raises(ValueError, match=r"quantization_config.group_size is 'big'"):
        StoredConfig.read({"format_version": "1.0", "group_size": "big"})
    with pytest.raises(ValueError, match=r"plane layout '5\|3'"):
        StoredConfig.read({"format_version": "1.0", "layout": "5|3"})
