# SPDX-License-Identifier: Apache-2.0
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from vllm_flexquant.cli import app
from vllm_flexquant.cli.quantize import describe
from vllm_flexquant.format.checkpoint import validate_checkpoint
from vllm_flexquant.format.layout import PlaneLayout
from vllm_flexquant.format.record import read_calibration
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.quantize.calibrate import CalibrationOptions, calibrate_checkpoint


@pytest.fixture(scope="module")
def settings(tiny_text):
    return CalibrationOptions(
        text=str(tiny_text), sequences=24, length=64, measured_rungs=5, measured_units=4
    )


@pytest.fixture(scope="module")
def finished(tiny_model, settings, tmp_path_factory):
    """Folder, record, and the stages that were reported."""
    out = tmp_path_factory.mktemp("finished") / "out"
    stages = []
    record = calibrate_checkpoint(
        tiny_model, out, FlexQuantOptions(), settings, advance=lambda name, _: stages.append(name)
    )
    return out, record, list(dict.fromkeys(stages))


def weights_of(folder):
    """As bytes, tensor by tensor: safetensors writes its metadata in any order."""
    return {
        name: tensor.numpy().tobytes()
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_the_checkpoint_holds_what_was_found(finished):
    out, record, stages = finished
    assert len(validate_checkpoint(out)) == 3 * 7
    assert not list(out.parent.glob(".*"))
    sidecar = json.loads((out / "flexquant.json").read_text())
    assert read_calibration(sidecar) == record
    assert sidecar["provenance"]["method"] == "nested GPTQ"
    card = (out / "README.md").read_text()
    assert f"| uniform 4 bit | 4 | | | {record.uniform_kl[4][0]:.5f} |" in card
    assert card.count("| level ") == 5
    cheapest = record.drafts.levels[-1]
    assert f"| 0 | 4.00 | {cheapest.kl_nats:.5f} | {cheapest.mean_greedy:.3f} |" in card
    for name in ("kl.png", "sensitivity.png", "storage.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in card
    assert sidecar["provenance"]["run"]["seconds"].keys() == set(stages) - {"writing"}
    assert sidecar["provenance"]["run"]["peak_memory_bytes"] > 1e8
    assert stages == [
        "rounding", "sensitivity, estimated", "sensitivity, measured", "ladder, greedy",
        "ladder, measured", "probe", "drafts", "writing",
    ]  # fmt: skip


def test_the_ladder_is_one_plane_of_one_unit_at_a_time(finished):
    _, record, _ = finished
    assert len(record.units) == 3 * 4 + 1
    rungs = record.ladder.rungs
    assert len(rungs) == 2 * len(record.units) + 1
    assert rungs[0].mean_bits == 8
    assert rungs[-1].mean_bits == 4
    assert sum(r.measured for r in rungs) == 5
    assert all(a.bytes_read > b.bytes_read for a, b in pairwise(rungs))
    # the ends of the ladder are the uniform widths
    assert rungs[0].kl_nats == pytest.approx(record.uniform_kl[8][0], rel=1e-3)
    assert rungs[-1].kl_nats == pytest.approx(record.uniform_kl[4][0], rel=1e-3)
    assert record.uniform_kl[4][0] > record.uniform_kl[6][0] > record.uniform_kl[8][0]
    assert len(record.probe.weight) == 64
    assert record.probe.relative_kl < 1.2


def test_levels_of_the_ladder_are_measured_as_drafts(finished):
    _, record, _ = finished
    rungs, levels = record.ladder.rungs, record.drafts.levels
    assert len(levels) == 6
    assert levels[0].steps > 0
    assert levels[-1].steps == len(rungs) - 1
    assert [rungs[level.steps].mean_bits for level in levels] == pytest.approx(
        [8 - 4 * i / 6 for i in range(1, 7)], abs=0.2
    )
    # the best level is near enough to the reference for both to see a draft alike
    assert levels[-1].kl_nats == pytest.approx(rungs[-1].kl_nats, rel=0.2)
    assert 0.5 < levels[-1].mean_greedy < levels[0].mean_greedy < 1
    assert 0.5 < levels[-1].mean_sampled < levels[0].mean_sampled < 1
    lines = list(describe(record))
    assert sum(line.startswith("level ") and "bits, KL" in line for line in lines) == 6
    assert any("self-speculation with up to 4 drafts would take level" in line for line in lines)


def test_an_interrupted_run_goes_on_and_comes_to_the_same(tiny_model, settings, finished, tmp_path):
    class InterruptedRunError(Exception):
        pass

    out = tmp_path / "out"
    for stage, share in (("rounding", 2 / 3), ("sensitivity, measured", 0.5), ("probe", 0.5),
        ("drafts", 0.5)):  # fmt: skip

        def interrupt(name, done, stage=stage, share=share):
            if name == stage and done >= share:
                raise InterruptedRunError

        with pytest.raises(InterruptedRunError):
            calibrate_checkpoint(
                tiny_model, out, FlexQuantOptions(), settings, resume=True, advance=interrupt
            )
        assert not out.exists()
    reported = []
    record = calibrate_checkpoint(
        tiny_model, out, FlexQuantOptions(), settings, resume=True,
        advance=lambda name, _: reported.append(name),
    )  # fmt: skip
    assert "sensitivity, estimated" not in reported
    assert "probe" not in reported  # a work folder without drafts measures only them
    assert "drafts" in reported
    assert record == finished[1]
    assert weights_of(out) == weights_of(finished[0])


def test_a_killed_command_can_be_resumed(tiny_model, tiny_text, finished, tmp_path):
    out = tmp_path / "out"
    work = tmp_path / ".out.partial"
    command = [sys.executable, "-m", "vllm_flexquant.cli", "quantize", str(tiny_model), str(out)]
    command += ["--calibration", str(tiny_text), "--sequences", "24", "--length", "64"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (work / "block-00000.safetensors").exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "left from an interrupted run; add --resume" in refused.stderr.replace("\n", " ")
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert weights_of(out) == weights_of(finished[0])
    assert not work.exists()


@pytest.mark.parametrize("stage", ["rounding", "writing"])
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    tiny_model, settings, finished, tmp_path, stage
):
    """A limit on the size of files fails writes as a full disk does."""
    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(name, _):
        if name == stage:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    try:
        with pytest.raises(ValueError, match=r"cannot write .*; make room for it"):
            calibrate_checkpoint(tiny_model, out, FlexQuantOptions(), settings, advance=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not out.exists()
    assert not list(tmp_path.rglob("*.new"))
    record = calibrate_checkpoint(tiny_model, out, FlexQuantOptions(), settings, resume=True)
    assert record == finished[1]
    assert weights_of(out) == weights_of(finished[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_tree_search_and_another_layout(tiny_model, settings, tmp_path):
    record = calibrate_checkpoint(
        tiny_model,
        tmp_path / "out",
        FlexQuantOptions(layout=PlaneLayout.parse("2|1|1|2|2")),
        replace(settings, search="tree", branch=2, stem=1, measured_rungs=3, method="rtn"),
    )
    assert record.ladder.search == "tree"
    assert len(record.ladder.steps) == 4 * len(record.units)
    assert set(record.uniform_kl) == {2, 3, 4, 6, 8}


def test_a_tied_output_layer_can_be_stored(tiny_model, settings, finished, tmp_path):
    out = tmp_path / "out"
    record = calibrate_checkpoint(
        tiny_model, out, FlexQuantOptions(), replace(settings, store_output=True)
    )
    assert len(validate_checkpoint(out)) == 3 * 7 + 1
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["output_layer"] == "planes"
    before, after = (
        {unit.layers[0]: unit.sensitivity for unit in r.units}["lm_head"]
        for r in (finished[1], record)
    )
    assert after[4][0] < 0.8 * before[4][0]


SHAPE = {"vocab_size": 96, "intermediate_size": 128, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("kind", "config", "first"),
    [
        ("phi3", {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}, ["qkv_proj"]),
        ("gemma3_text", {"head_dim": 32}, ["q_proj", "k_proj", "v_proj"]),
        ("olmo2", {}, ["q_proj", "k_proj", "v_proj"]),
    ],
)
def test_other_architectures_and_the_least_text(
    save_model, save_tokenizer, tiny_text, tmp_path, kind, config, first
):
    save_model(tmp_path / "model", torch.bfloat16, kind, **SHAPE, **config)
    save_tokenizer(tmp_path / "model")
    settings = CalibrationOptions(
        text=str(tiny_text), sequences=6, length=32, measured_rungs=2, measured_units=2
    )
    record = calibrate_checkpoint(
        tmp_path / "model", tmp_path / "out", FlexQuantOptions(), settings
    )
    assert [layer.rpartition(".")[2] for layer in record.units[0].layers] == first
    assert record.uniform_kl[4][0] > record.uniform_kl[8][0]


def test_experts_are_refused_with_the_remedy(save_model, save_tokenizer, tiny_text, tmp_path):
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
    folder = tmp_path / "model"
    save_model(folder, torch.bfloat16, "qwen3_moe", head_dim=32, **SHAPE, **experts)
    save_tokenizer(folder)
    settings = CalibrationOptions(text=str(tiny_text), sequences=6, length=32)
    with pytest.raises(ValueError, match=r"experts.*round it without calibration: --method rtn"):
        calibrate_checkpoint(folder, tmp_path / "out", FlexQuantOptions(), settings)


def test_inspect_prints_it(finished):
    out, record, _ = finished
    result = CliRunner().invoke(app, ["inspect", str(out)])
    assert result.exit_code == 0, result.output
    assert "nested GPTQ" in result.output
    assert f"{record.uniform_kl[4][0]:.4f}" in result.output
    assert f"{record.drafts.levels[-1].mean_greedy:.3f}" in result.output
    assert "27 levels by greedy search, least KL for bytes read saved" in result.output
    assert "a static checkpoint for each level would take" in result.output
    as_json = CliRunner().invoke(app, ["inspect", str(out), "--json"])
    assert json.loads(as_json.output)["calibration"]["ladder"]["search"] == "greedy"


def test_bad_input_names_the_thing_and_the_remedy(tiny_model, tiny_text, settings, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("w1 w2 w3")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "w1"}\n{"words": 1}\n')
    for source, message in (
        (short, r"short\.txt has 4 tokens, 0 sequences of 64; give at least 512"),
        (empty, r"empty\.txt is empty"),
        (lines, r"lines\.jsonl, line 2: expected an object with 'text' or 'messages'"),
        (tmp_path / "none.txt", "is no file; name a .txt or .jsonl file"),
        ("owner/unknown-dataset", "dataset"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate_checkpoint(
                tiny_model,
                tmp_path / "out",
                FlexQuantOptions(),
                replace(settings, text=str(source)),
            )
    with pytest.raises(ValueError, match="cannot be calibrated; use per_width"):
        calibrate_checkpoint(
            tiny_model, tmp_path / "out", FlexQuantOptions(scales="shared"), settings
        )
    assert not (tmp_path / "out").exists()
    for arguments, message in (
        (["--method", "awq"], "--method is 'awq'; use rtn or gptq"),
        (["--search", "best"], "--search is 'best'; use greedy or tree"),
        (["--calibration", "none"], "--method gptq needs calibration text"),
    ):
        command = ["quantize", str(tiny_model), str(tmp_path / "out"), *arguments]
        result = CliRunner().invoke(app, command)
        assert message in str(result.exception)


def test_a_quantized_model_and_a_full_folder_are_refused(finished, settings, tmp_path, tiny_model):
    with pytest.raises(ValueError, match="is already quantized"):
        calibrate_checkpoint(finished[0], tmp_path / "again", FlexQuantOptions(), settings)
    with pytest.raises(ValueError, match="is not empty; name a new folder"):
        calibrate_checkpoint(tiny_model, finished[0], FlexQuantOptions(), settings)
