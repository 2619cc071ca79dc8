# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from vllm_flexquant.cli import app
from vllm_flexquant.format.checkpoint import StoredConfig, read_sidecar, validate_checkpoint
from vllm_flexquant.format.record import read_calibration
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.quantize.calibrate import CalibrationOptions, calibrate_checkpoint
from vllm_flexquant.quantize.pipeline import quantize_checkpoint
from vllm_flexquant.quantize.prune import prune_checkpoint, prune_record


@pytest.fixture(scope="module")
def calibrated(tiny_model, tiny_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibrated") / "out"
    settings = CalibrationOptions(
        text=str(tiny_text), sequences=12, length=64, measured_rungs=5, measured_units=4
    )
    return out, calibrate_checkpoint(tiny_model, out, FlexQuantOptions(), settings)


def tensors(folder):
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def data_bytes(folder):
    return sum(t.numel() * t.element_size() for t in tensors(folder).values())


def test_a_pruned_checkpoint_is_a_part_of_the_whole_one(calibrated, tmp_path):
    folder, record = calibrated
    out = tmp_path / "out"
    pruned = prune_checkpoint(folder, out, 6.0)
    assert read_calibration(read_sidecar(out)) == pruned
    assert validate_checkpoint(out).keys() == validate_checkpoint(folder).keys()
    rungs = pruned.ladder.rungs
    assert rungs[0].mean_bits <= 6.0
    assert record.ladder.rungs[len(record.ladder.rungs) - len(rungs) - 1].mean_bits > 6.0
    assert rungs[-1] == record.ladder.rungs[-1].model_copy(update={"steps": len(rungs) - 1})
    # every level of it is a level of the whole one
    skipped = len(record.ladder.rungs) - len(rungs)
    for steps in range(len(rungs)):
        assert pruned.widths_after(steps) == record.widths_after(steps + skipped)
    before, after = tensors(folder), tensors(out)
    config = StoredConfig.read(json.loads((out / "config.json").read_text())["quantization_config"])
    for name, tensor in after.items():
        if name.endswith(".scales"):
            module = name.removesuffix(".scales")
            sets = [(4, 6, 8).index(width) for width in config.widths_of(module)]
            assert (tensor == before[name][:, :, sets]).all()
        else:
            assert (tensor == before[name]).all()
    left_out = {name for name in before if name not in after}
    tops = {layer: unit.highest for unit in pruned.units for layer in unit.layers}
    assert left_out == {
        f"{module}.plane{i}"
        for module, top in tops.items()
        for i, width in enumerate((4, 6, 8))
        if width > top and f"{module}.plane0" in before
    }
    assert read_sidecar(out)["provenance"]["pruned"]["top_bits"] == 6.0


def test_what_a_level_is_said_to_store_is_what_the_files_hold(calibrated, tmp_path):
    folder, record = calibrated
    assert record.ladder.rungs[0].bytes_stored == data_bytes(folder)
    for bits in (7.0, 4.0):
        out = tmp_path / f"{bits}"
        pruned = prune_checkpoint(folder, out, bits)
        assert pruned.ladder.rungs[0].bytes_stored == data_bytes(out)
    stored = [rung.bytes_stored for rung in record.ladder.rungs]
    assert stored == sorted(stored, reverse=True)


def test_pruned_twice_is_pruned_once(calibrated, tmp_path):
    folder, _ = calibrated
    prune_checkpoint(folder, tmp_path / "seven", 7.0)
    twice = prune_checkpoint(tmp_path / "seven", tmp_path / "twice", 5.0)
    once = prune_checkpoint(folder, tmp_path / "once", 5.0)
    assert twice == once
    a, b = tensors(tmp_path / "twice"), tensors(tmp_path / "once")
    assert a.keys() == b.keys()
    assert all((a[name] == b[name]).all() for name in a)


def test_the_rest_of_the_record_stays(calibrated):
    _, record = calibrated
    timed = record.ladder.model_copy(update={"cost": "times.json at 4 rows"})
    pruned = prune_record(record.model_copy(update={"ladder": timed}), 6.0)
    assert pruned.ladder.cost == timed.cost
    # the score is relative; the two levels that it was judged by are not both there any more
    assert pruned.probe == record.probe.model_copy(update={"levels": None})
    within = record.probe.model_copy(update={"levels": (0, 1)})
    assert prune_record(record.model_copy(update={"probe": within}), 6.0).probe == within


def test_drafts_that_are_left_keep_their_level(calibrated):
    _, record = calibrated
    pruned = prune_record(record, 6.0)
    best = pruned.ladder.rungs[0].mean_bits
    before = {level: (draft, bits) for draft, level, bits in record.draft_levels()}
    after = {level: (draft, bits) for draft, level, bits in pruned.draft_levels()}
    assert 0 < len(after) < len(before)
    assert after.keys() == {level for level, (_, bits) in before.items() if bits < best}
    for level, (draft, bits) in after.items():
        assert bits == before[level][1]
        assert draft == before[level][0].model_copy(update={"steps": draft.steps})
    # the new best level is no draft, and so may none be left
    assert prune_record(record, 4.0).drafts is None
    assert prune_record(record.model_copy(update={"drafts": None}), 6.0).drafts is None


def test_widths_to_keep(tiny_model, tiny_text, tmp_path):
    out = tmp_path / "out"
    settings = CalibrationOptions(
        text=str(tiny_text),
        sequences=12,
        length=64,
        measured_rungs=3,
        measured_units=4,
        keep_widths=(4, 6),
        method="rtn",
    )
    record = calibrate_checkpoint(tiny_model, out, FlexQuantOptions(), settings)
    assert set(record.uniform_kl) == {4, 6}
    assert {step.width for step in record.ladder.steps} == {4}
    assert len(record.ladder.rungs) == len(record.units) + 1
    assert record.ladder.rungs[0].mean_bits == 6
    assert record.ladder.rungs[0].bytes_stored == data_bytes(out)
    assert not any(name.endswith("plane2") for name in tensors(out))
    assert len(validate_checkpoint(out)) == 3 * 7
    # rounding to nearest without text gives the same planes
    quantize_checkpoint(tiny_model, tmp_path / "rtn", FlexQuantOptions(), keep_widths=(4, 6))
    a, b = tensors(out), tensors(tmp_path / "rtn")
    assert a.keys() == b.keys()
    assert all((a[name] == b[name]).all() for name in a)


def test_the_command_line_and_bad_input(calibrated, tiny_model, tmp_path):
    folder, _ = calibrated
    run = CliRunner().invoke(app, ["prune", str(folder), str(tmp_path / "a"), "--top-bits", "5.5"])
    assert run.exit_code == 0, run.output
    assert "MB of" in run.output
    quantize_checkpoint(tiny_model, tmp_path / "plain", FlexQuantOptions())
    for source, out, bits, message in (
        (folder, tmp_path / "a", "5", "is not empty; name a new folder"),
        (folder, tmp_path / "b", "3.5", "below the cheapest level, which has 4 mean bits"),
        (folder, tmp_path / "b", "8", "prunes nothing: the best level has 8 mean bits"),
        (tmp_path / "plain", tmp_path / "b", "6", "has no ladder; quantize the model with"),
        (tmp_path / "no", tmp_path / "b", "6", "has no config.json; give a checkpoint folder"),
    ):
        run = CliRunner().invoke(app, ["prune", str(source), str(out), "--top-bits", bits])
        assert message in str(run.exception)
    assert not (tmp_path / "b").exists()
    for widths, message in (("4,x", "--keep-widths has 'x'"), ("4,5", "width 5 cannot be kept")):
        command = ["quantize", str(tiny_model), str(tmp_path / "b"), "--keep-widths", widths]
        assert message in str(CliRunner().invoke(app, command).exception)
