# SPDX-License-Identifier: Apache-2.0
import json
import sys

import pytest

from benchmarks.quality import calibrated, probe
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.quantize.calibrate import CalibrationOptions, calibrate_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tiny_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibrated") / "out"
    settings = CalibrationOptions(
        text=str(tiny_text), sequences=24, length=64, measured_rungs=3, measured_units=4
    )
    return out, calibrate_checkpoint(tiny_model, out, FlexQuantOptions(), settings)


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(module, *arguments):
        out = tmp_path / "results.json"
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments), "--out", str(out)])
        module.main()
        return json.loads(out.read_text())["results"], out

    return run


def test_the_table_of_a_calibrated_checkpoint(checkpoint, tiny_model, tiny_text, run):
    folder, record = checkpoint
    results, out = run(
        calibrated, "--model", tiny_model, "--checkpoint", folder, "--text", tiny_text,
        "--rungs", 3, "--tokens", 1024,
    )  # fmt: skip
    entries = results["entries"]
    assert {name for name in entries if name.endswith("4")} == {
        "calibrated 4", "nested to nearest 4", "dedicated to nearest 4",
    }  # fmt: skip
    # the ends of the ladder are uniform widths, of the same codes
    top = len(record.ladder.rungs) - 1
    assert entries[f"level {top}"]["kl_nats"] == entries["calibrated 8"]["kl_nats"]
    assert entries["level 0"]["kl_nats"] == entries["calibrated 4"]["kl_nats"]
    assert entries["calibrated 4"]["kl_nats"] < entries["nested to nearest 4"]["kl_nats"]
    assert entries["nested to nearest 8"]["kl_nats"] == pytest.approx(
        entries["dedicated to nearest 8"]["kl_nats"], rel=0.01
    )
    stored = results["storage"]
    assert stored["checkpoint_bytes"] == (folder / "model.safetensors").stat().st_size
    assert stored["static_8_bit_bytes"] < stored["checkpoint_bytes"]
    assert stored["levels"] == top + 1
    assert {target["bound"] for target in results["targets"]} == {0.6, 1.1, 0.7, 1.08}
    pictures = {file.name for file in out.parent.glob("*.png")}
    assert pictures == {
        "results.png", "results-kl.png", "results-sensitivity.png", "results-storage.png",
    }  # fmt: skip


def test_the_probe_on_a_text(checkpoint, tiny_model, tiny_text, tmp_path, run):
    folder, _ = checkpoint
    text = tmp_path / "words.txt"
    text.write_text(" ".join([tiny_text.read_text()] * 2))
    results, _ = run(
        probe, "--model", tiny_model, "--checkpoint", folder, "--text", f"words={text}",
        "--sequences", 5,
    )  # fmt: skip
    found = results["texts"]["words"]
    static = [level["kl_nats"] for level in found["static"]]
    assert static[0] > static[-1]
    assert found["policy_kl_nats"] == pytest.approx(
        found["relative_kl"] * (static[0] + static[-1]) / 2
    )
    with pytest.raises(SystemExit, match="--text is words; give it as NAME=FILE"):
        run(probe, "--model", tiny_model, "--checkpoint", folder, "--text", "words")
