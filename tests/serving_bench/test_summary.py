# SPDX-License-Identifier: Apache-2.0
"""Ratios, targets, the gate's judgement, the command line and the picture."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.provenance import machine
from benchmarks.serving import run
from benchmarks.serving.configurations import (
    CONFIGURATIONS,
    QUICK,
    default_names,
    engine_specs,
    unquantized,
)
from benchmarks.serving.gate import judge
from benchmarks.serving.plot import plot_speeds
from benchmarks.serving.process import reason
from benchmarks.serving.summary import (
    TARGETS,
    check_targets,
    compare,
    spread,
    summarise_speeds,
    tokens_per_second,
)


def test_ratios_are_taken_within_a_round():
    # the machine was twice as slow in the second round, for both
    ratio = compare([30.0, 15.0, 33.0], [20.0, 10.0, 20.0])
    assert ratio["rounds"] == [1.5, 1.5, 1.65]
    assert ratio["median"] == 1.5
    assert ratio["quartiles"] == pytest.approx([1.5, 1.575])
    with pytest.raises(ValueError, match="zip"):
        compare([1.0], [1.0, 2.0])


def test_spread_of_one_round():
    assert spread([2.0]) == {"median": 2.0, "quartiles": [2.0, 2.0], "rounds": [2.0]}


def test_decode_speed_counts_every_row():
    assert tokens_per_second(4, [0.1, 0.3]) == pytest.approx(20.0)


def test_targets_are_met_by_the_median():
    rates = {"bf16": [10.0, 10.0, 10.0], "w8a8": [14.0, 14.0, 14.0]}
    rates["flexquant-4"] = [15.9, 16.1, 16.2]
    speeds = {1: summarise_speeds(rates)}
    rows = {(r["configuration"], r["baseline"], r["batch"]): r for r in check_targets(speeds)}
    assert len(rows) == len(TARGETS)
    assert rows["flexquant-4", "bf16", 1]["met"] is True
    assert rows["flexquant-4", "w8a8", 1]["met"] is False
    assert rows["flexquant-4", "w8a8", 1]["median"] == pytest.approx(1.15)
    assert rows["flexquant-4", "bf16", 16]["met"] is None
    assert rows["flexquant-8", "w8a8", 1]["met"] is None
    assert "bf16" not in speeds[1]["bf16"]["against"]


def chosen(*names):
    return [CONFIGURATIONS[name] for name in names]


def test_gate_is_green_when_engines_do_what_the_plain_implementation_does():
    planes = {w: {"int8": {"kl": [0.3, 0.5, 0.4, 0.4]}} for w in ("4", "8")}
    kl = {
        "bf16": [0.01, 0.01, 0.01, 0.01],
        "flexquant-4": [0.31, 0.5, 0.41, 0.4],
        "flexquant-bf16-output-4": [0.1, 0.2, 0.1, 0.2],
        # further off than `agreement` allows, but not by more than bf16 rounds
        "flexquant-8": [0.36, 0.56, 0.46, 0.46],
    }
    assert judge(chosen(*kl), kl, planes) == {}


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("flexquant-4", [0.6, 0.8, 0.71, 0.7], "is not the plain implementation's 0.4000"),
        ("flexquant-4", [0.1, 0.3, 0.21, 0.2], "is not the plain implementation's"),
        ("flexquant-bf16-output-4", [0.6, 0.8, 0.71, 0.7], "is not the plain"),
        ("flexquant-4", [3.0, 3.0, 3.1, 3.0], "is above 2"),
        ("w4a16", [9.0, 10.0, 9.0, 10.0], "is above 2"),
        ("w8a8", [0.9, 0.6, 0.9, 0.6], "is above 0.5"),
        ("fp32", [float("nan")] * 4, "KL nan"),
        ("bf16", [0.1] * 4, "is above 0.05"),
    ],
)
def test_gate_is_red(name, values, words):
    planes = {"4": {"int8": {"kl": [0.3, 0.5, 0.4, 0.4]}}}
    kl = {"bf16": [0.01] * 4} | {name: values}
    wrong = judge(chosen(*kl), kl, planes)
    assert list(wrong) == [name]
    assert words in wrong[name]


def test_a_part_of_the_measurement_does_not_overwrite_the_results():
    assert run.read_options([]).out == run.RESULTS / "serving-cpu.json"
    assert run.read_options(["--compiled"]).out == run.RESULTS / "serving-cpu-compiled.json"
    for part in ("--quick", "--configurations w8a8", "--rounds 9", "--batches 1 16"):
        assert run.RESULTS not in run.read_options(part.split()).out.parents


def test_bf16_is_always_there_and_rows_have_a_bound(capsys):
    assert run.read_options(["--configurations", "w8a8"]).configurations == ["bf16", "w8a8"]
    calibrated = {n for n in QUICK if n.startswith(("calibrated", "budget"))}
    few = {*QUICK, unquantized(machine()["flags"])}
    assert set(run.read_options(["--quick"]).configurations) == few - calibrated
    quick = run.read_options(["--quick", "--calibrated", "x"])
    assert set(quick.configurations) == few
    for wrong in (["--batches", "0"], ["--batches", "33"], ["--configurations", "w3a3"]):
        with pytest.raises(SystemExit):
            run.read_options(wrong)
    assert "not all from 1 to 32" in capsys.readouterr().err


def test_weights_only_is_measured_where_it_differs():
    assert "w4a16-weights-only" in default_names(["amx_tile"], calibrated=True)
    by_name = {n for n in CONFIGURATIONS if "bf16-output" in n} | {"w4a16-weights-only"}
    assert set(default_names([], calibrated=True)) == set(CONFIGURATIONS) - by_name
    left_out = set(default_names([], calibrated=True)) - set(default_names([], calibrated=False))
    assert left_out == {n for n in CONFIGURATIONS if n.startswith(("calibrated", "budget"))}


def test_a_calibrated_engine_needs_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="need a calibrated checkpoint"):
        engine_specs("model", ["budget-0.03"], tmp_path, compiled=False)
    specs = engine_specs(
        "model", ["budget-0.03", "calibrated-4"], tmp_path, False, calibrated=Path("saved")
    )
    assert [(name, spec.model) for name, spec in specs.items()] == [("calibrated", "saved")]


def test_a_budget_far_exceeded_is_red():
    budget = CONFIGURATIONS["budget-0.03"]
    kl = {"bf16": [0.001] * 4, "budget-0.03": [0.05] * 4}
    assert judge([budget], kl, {}) == {}
    kl["budget-0.03"] = [0.06] * 4
    assert "far above 0.03" in judge([budget], kl, {})["budget-0.03"]


def test_another_model_has_no_gguf(tmp_path):
    unavailable: dict[str, str] = {}
    names = ["llama-q8_0"]
    specs = engine_specs(str(tmp_path), names, tmp_path, False, unavailable=unavailable)
    assert specs == {}
    assert list(unavailable) == names


def test_a_reason_is_the_last_line_that_names_an_error():
    message = "engine x ended with status 1\n  | ValueError: no kernel for w4\n  |   at exit"
    assert reason(message) == "ValueError: no kernel for w4"
    assert reason("it ended\n  | killed") == "killed"


def test_all_widths_share_an_engine(tmp_path):
    names = [n for n in CONFIGURATIONS if n.startswith(("flexquant", "bf16", "fp32"))]
    specs = engine_specs("model", names, tmp_path, compiled=False)
    assert list(specs) == ["bf16", "fp32", "flexquant", "flexquant-bf16-output"]
    outputs = [specs[n].environ["VLLM_FLEXQUANT_OUTPUT_LAYER"] for n in list(specs)[2:]]
    assert outputs == ["true", "false"]
    assert specs["fp32"].dtype == "float32"
    assert json.loads(specs["flexquant"].to_json())["arguments"] == {"quantization": "flexquant"}


def test_orders_differ_between_rounds_and_not_between_runs():
    configurations = list(CONFIGURATIONS.values())
    orders = [run.shuffled(configurations, f"{n} 1") for n in range(5)]
    assert len({tuple(c.name for c in order) for order in orders}) == 5
    assert orders[0] == run.shuffled(configurations, "0 1")
    assert sorted(c.name for c in orders[0]) == sorted(CONFIGURATIONS)


def test_results_have_a_picture_and_tables(tmp_path):
    configurations = chosen("bf16", "w8a8", "flexquant-4", "flexquant-8")
    quality = {c.name: {"kl": 0.01 * i} for i, c in enumerate(configurations)}
    steps = {c.name: [[0.02 / (1 + i), 0.02], [0.03]] for i, c in enumerate(configurations)}
    prefill = {c.name: [0.1, 0.2] for c in configurations}
    bits = {1: {"flexquant-4": 4.0}, 16: {}}
    stored = {"bf16": 100, "w8a8": 50, "flexquant": None}
    results = run.collect(configurations, quality, {1: steps, 16: steps}, prefill, bits, stored)
    entries = results["configurations"]
    assert entries["flexquant-4"]["decode_tokens_per_second"]["1"]["mean_bits"] == 4.0
    assert "mean_bits" not in entries["bf16"]["decode_tokens_per_second"]["1"]
    assert [e["stored_bytes"] for e in entries.values()] == [100, 50, None, None]
    entry = results["configurations"]["flexquant-4"]["decode_tokens_per_second"]["1"]
    assert entry["against"]["bf16"]["rounds"] == pytest.approx([0.04 / (0.02 / 3 + 0.02), 1.0])
    assert entry["step_ms"]["rounds"][1] == pytest.approx(30.0)
    paths = plot_speeds(results, tmp_path / "speeds.json")
    assert [p.name for p in paths] == ["speeds.png", "speeds.svg"]
    assert all(p.stat().st_size > 1000 for p in paths)
    results |= {
        "settings": {"prefill_tokens": 256},
        "cpu_while_measuring": {"other_processes": 0.4},
    }
    written = StringIO()
    run.show(results, Console(file=written, width=100))
    text = written.getvalue()
    assert "batch 16" in text
    assert "1.25 1.12-1.38" in text
    assert "flexquant-4 against bf16, batch 1: 1.25 (1.12 to 1.38), to reach 1.6: not met" in text
    assert "Other processes used 40%" in text
