# SPDX-License-Identifier: Apache-2.0
"""Exported checkpoints, read back with the compressed-tensors package."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from vllm_flexquant.cli import app
from vllm_flexquant.format.record import CalibrationRecord
from vllm_flexquant.format.saved import SavedCheckpoint
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.quantize.integer_grid import compensated, nearest
from vllm_flexquant.quantize.one_width import EXPORT_RECORD, ExportOptions, export_checkpoint
from vllm_flexquant.quantize.pipeline import Rounded, quantize_checkpoint
from vllm_flexquant.quantize.rtn import quantize_rtn


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    """The tiny model as planes; tied output layer."""
    out = tmp_path_factory.mktemp("saved") / "tiny-flexquant"
    quantize_checkpoint(tiny_model, out, FlexQuantOptions())
    return out


def read_exported(folder):
    """Weights fp32 of an exported folder as compressed-tensors reads them, and its config."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    config = json.loads((folder / "config.json").read_text())
    read = quantization.QuantizationConfig.model_validate(config["quantization_config"])
    stored = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    for scheme in read.config_groups.values():
        for name in scheme.targets:
            parts = {
                key.rpartition(".")[2]: stored.pop(key)
                for key in list(stored)
                if key.startswith(f"{name}.weight")
            }
            parts["weight_scale"] = parts["weight_scale"].float()
            unpacked = compressors.PackedQuantizationCompressor.decompress(parts, scheme)
            stored[f"{name}.weight"] = unpacked["weight"]
    return stored, config


@pytest.mark.parametrize(("width", "symmetric"), [(4, False), (8, True)])
def test_compressed_tensors_reads_the_weights_that_were_meant(saved, tmp_path, width, symmetric):
    exported = export_checkpoint(saved, tmp_path / "out", ExportOptions(width=width, method="rtn"))
    source = SavedCheckpoint(saved)
    assert set(exported.layers) == set(source.modules)
    assert exported.plain == {"lm_head": "tied to the embedding"}
    weights, config = read_exported(tmp_path / "out")
    for name in exported.layers:
        meant = nearest(source.dequantize(name), width, source.group_size(name), symmetric)
        assert torch.equal(weights.pop(f"{name}.weight"), meant.dequantize())
    for name in source.plain_names():
        assert torch.equal(weights.pop(name), source.read(name))
    assert not weights
    assert config["tie_word_embeddings"] is True
    stored = config["quantization_config"]
    assert (stored["quant_method"], stored["format"]) == ("compressed-tensors", "pack-quantized")
    assert stored["ignore"] == ["lm_head"]


def test_gptq_follows_the_rounded_blocks_and_says_where_it_comes_from(
    saved, tiny_text, tmp_path, monkeypatch
):
    meant = {}

    def note(weight, hessian, *arguments):
        found = compensated(weight, hessian, *arguments)
        plain = nearest(weight, *arguments).dequantize()
        errors = [found.dequantize() - weight, plain - weight]
        meant[len(meant)] = (found, [float(((e @ hessian) * e).sum()) for e in errors])
        return found

    monkeypatch.setattr("vllm_flexquant.quantize.one_width.compensated", note)
    out = tmp_path / "out"
    arguments = ["--calibration", str(tiny_text), "--sequences", "16", "--length", "64"]
    result = CliRunner().invoke(app, ["export", str(saved), str(out), *arguments])
    assert result.exit_code == 0, result.output
    assert "21 layers at 4 bits, a zero for each group" in result.output
    assert "unquantized: lm_head (tied to the embedding)" in result.output
    weights, _ = read_exported(out)
    found = [pair[0].dequantize() for pair in meant.values()]
    assert len(found) == 21
    unmatched = [w for k, w in weights.items() if "_proj." in k]
    assert all(any(torch.equal(w, f) for f in found) for w in unmatched)
    assert sum(pair[1][0] for pair in meant.values()) < sum(p[1][1] for p in meant.values())
    record = json.loads((out / EXPORT_RECORD).read_text())
    assert record["source"] == "tiny-flexquant"
    assert (record["width"], record["method"]) == (4, "GPTQ")
    assert record["text"]["text"] == "words.txt"
    assert len(record["text"]["sha256"]) == 64
    assert not (out / "flexquant.json").exists()
    assert (out / "tokenizer.json").exists()
    assert "4 bit" in (out / "README.md").read_text()


def test_an_output_layer_of_its_own_is_written_plain(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.tie_word_embeddings = False
    torch.manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(96, 64).half())
    model.save_pretrained(tmp_path / "untied")
    quantize_checkpoint(tmp_path / "untied", tmp_path / "saved", FlexQuantOptions())
    exported = export_checkpoint(tmp_path / "saved", tmp_path / "out", ExportOptions(method="rtn"))
    assert exported.plain == {"lm_head": "output layer"}
    weights, config = read_exported(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    head = weights["lm_head.weight"]
    assert head.dtype == torch.float16
    torch.testing.assert_close(head, model.lm_head.weight.data, atol=0.02, rtol=0)


def test_a_tied_output_layer_with_planes_is_tied_again(tiny_model, tmp_path):
    embedding = load_file(tiny_model / "model.safetensors")["model.embed_tokens.weight"]
    options = FlexQuantOptions()

    def read(name):
        return quantize_rtn(embedding, options.layout, 64) if name == "lm_head" else None

    rounded = Rounded(read, "round to nearest", CalibrationRecord(), {})
    quantize_checkpoint(tiny_model, tmp_path / "saved", options, rounded=rounded)
    assert "lm_head" in SavedCheckpoint(tmp_path / "saved").modules
    exported = export_checkpoint(tmp_path / "saved", tmp_path / "out", ExportOptions(method="rtn"))
    assert exported.plain == {"lm_head": "tied to the embedding"}
    weights, config = read_exported(tmp_path / "out")
    assert config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in weights
    assert torch.equal(weights["model.embed_tokens.weight"], embedding)
    assert "nested" not in (tmp_path / "out" / "README.md").read_text()


def test_layers_that_vllm_fuses_are_exported_together_or_not_at_all(tiny_model, tmp_path):
    options = FlexQuantOptions(ignore=("layers.1.self_attn.k_proj", "layers.2.mlp.down_proj"))
    quantize_checkpoint(tiny_model, tmp_path / "saved", options)
    out = tmp_path / "out"
    exported = export_checkpoint(tmp_path / "saved", out, ExportOptions(method="rtn"))
    assert len(exported.layers) == 21 - 4
    reason = "vLLM fuses it with model.layers.1.self_attn.k_proj, which is unquantized"
    assert exported.plain["model.layers.1.self_attn.q_proj"] == reason
    weights, config = read_exported(out)
    assert set(config["quantization_config"]["ignore"]) == set(exported.plain)
    source = SavedCheckpoint(tmp_path / "saved")
    name = "model.layers.1.self_attn.v_proj"
    assert torch.equal(weights[f"{name}.weight"], source.dequantize(name).half())
    original = load_file(tiny_model / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(weights[name], original[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "6"], "width 6 cannot be exported: stock vLLM has kernels for .* 4 bits"),
        (["--width", "3"], "width 3 cannot be exported"),
        (["--format", "gguf"], "--format is 'gguf'; use compressed-tensors"),
        (["--method", "awq"], "--method is 'awq'; use rtn or gptq"),
        (["--calibration", "none"], "--method gptq needs calibration text"),
        (["--method", "rtn", "--calibration", "mix"], "--method rtn reads no text"),
        (["--calibration", "nothing.txt"], "calibration text nothing.txt is no file"),
    ],
)
def test_arguments_that_cannot_be_met_are_refused(saved, tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["export", str(saved), str(tmp_path / "out"), *arguments])
    with pytest.raises(ValueError, match=message):
        raise result.exception
    assert not any(tmp_path.iterdir())


def test_folders_that_cannot_be_used_are_refused(saved, tiny_model, tmp_path):
    options = ExportOptions(method="rtn")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="full exists and is not empty; name a new folder"):
        export_checkpoint(saved, tmp_path / "full", options)
    with pytest.raises(ValueError, match="is not quantized; give a checkpoint that 'flexquant"):
        export_checkpoint(tiny_model, tmp_path / "out", options)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        export_checkpoint(tmp_path / "full", tmp_path / "out", options)
    made = tmp_path / "made"
    export_checkpoint(saved, made, options)
    with pytest.raises(ValueError, match="is quantized by compressed-tensors"):
        export_checkpoint(made, tmp_path / "out", options)
    damaged = tmp_path / "damaged"
    shutil.copytree(saved, damaged)
    with (damaged / "model.safetensors").open("r+b") as stream:
        stream.seek(-500, 2)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ValueError, match=r"model\.safetensors is corrupted"):
        export_checkpoint(damaged, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
