# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the Triton kernels, as far as it goes without a GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.kernels import gpu_baselines, gpu_libraries, gpu_plot, gpu_targets, run, run_gpu
from benchmarks.kernels.gpu_layers import activations, make_layer
from benchmarks.provenance import ROOT


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "speed.json"
    assert run.main(["--device", "cuda", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --device cuda needs a GPU, and torch ")
    assert error.endswith("or add --interpret\n")
    assert not out.exists()


@pytest.mark.slow
def test_interpreted_from_end_to_end(tmp_path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "speed.json"
    command = "-m benchmarks.kernels.run --device cpu --interpret --quick --out"
    done = subprocess.run(
        [sys.executable, *command.split(), str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "checks passed, interpreted: times mean nothing" in done.stdout
    results = json.loads(out.read_text())["results"]
    assert results["interpreted"]
    assert results["targets"] == []
    assert {(c.get("rows"), c.get("width")) for c in results["gate"]} >= {(1, 4), (300, 8)}
    assert all(check["passed"] for check in results["gate"])
    assert [cell["rows"] for cell in results["cells"]] == [1, 9]
    for cell in results["cells"]:
        assert set(cell["seconds"]["4|2|2"]) == {"4", "6", "8", "alternating"}
        assert cell["bytes_read"]["4|2|2"]["4"] == 96 * 256 // 2 + 96 * 16
        assert cell["baselines"]["torch bf16"] > 0
        assert set(cell["unavailable"]) | set(cell["baselines"]) == set(run_gpu.BASELINES)
        for name in ("torch int4 g128", "gemlite W4A16 g64", "Marlin W8A16 g64"):
            assert "needs a GPU" in cell["unavailable"][name]
            assert f"without {name} at 96x256: " in done.stderr


def test_a_bare_machine_is_enough() -> None:
    """With torch, triton and numpy; what this project needs elsewhere is not imported."""
    pytest.importorskip("triton")
    others = ("matplotlib", "pydantic", "rich", "safetensors", "transformers", "typer", "vllm")
    code = (
        "import sys, benchmarks.kernels.run, benchmarks.kernels.run_gpu, benchmarks.kernels.tune\n"
        "import flexquant_kernels.triton\n"
        f"print(sorted({{*{others!r}, 'vllm_flexquant'}} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_the_gate_is_red_for_a_wrong_weight(gpu, device) -> None:
    layer = make_layer(70, 256, (4, 2, 2), device)
    assert all(check["passed"] for check in run_gpu.gate(layer, [2]))
    layer.weight.planes[1].bitwise_xor_(1 << 7)
    wrong = {check["width"] for check in run_gpu.gate(layer, [2]) if not check["passed"]}
    assert wrong == {6, 8}


def test_baselines_hold_what_they_say(device) -> None:
    x = activations(3, 256, torch.bfloat16, device)
    baseline = gpu_baselines.cublas(64, 256, device)
    assert gpu_baselines.error_of(baseline, x) < 1e-2
    assert baseline.bytes_read == 64 * 256 * 2
    with pytest.raises(gpu_baselines.UnavailableError, match="k in multiples of 128"):
        gpu_baselines.torch_int4(64, 96, device)


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [n, k] of words [k * bits / 32, n], by GPTQ's definition."""
    parts = [(words.long() >> shift) & ((1 << bits) - 1) for shift in range(0, 32, bits)]
    return torch.stack(parts, dim=1).flatten(0, 1).T


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_libraries_are_packed_as_gptq_does(bits) -> None:
    codes, scales = gpu_libraries.quantized(48, 128, bits)
    assert (int(codes.min()), int(codes.max())) == (0, (1 << bits) - 1)
    words = gpu_libraries.gptq_words(codes, bits)
    assert torch.equal(_unpacked(words, bits), codes.long())
    weight = gpu_libraries.dequantized(codes, scales, bits)
    want = (int(codes[5, 70]) - 2 ** (bits - 1)) * float(scales[5, 1])
    assert float(weight[5, 70]) == pytest.approx(want, rel=2**-8)
    utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.quant_utils")
    assert torch.equal(words, utils.gptq_pack(codes.T.contiguous(), bits, 128, 48))


def test_libraries_that_are_not_there_are_left_out(monkeypatch) -> None:
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setitem(sys.modules, "gemlite", None)
    for make, words in (
        (gpu_libraries.gemlite, "gemlite cannot be imported: "),
        (gpu_libraries.marlin, "vLLM, which cannot be imported: |this build of vLLM has no gptq_m"),
    ):
        with pytest.raises(gpu_baselines.UnavailableError, match="W4A16 g64 needs a GPU"):
            make(64, 128, 4, cpu)
        with pytest.raises(gpu_baselines.UnavailableError, match="groups of 64, and k is 96"):
            make(64, 96, 8, cuda)
        if not torch.cuda.is_available():
            with pytest.raises(gpu_baselines.UnavailableError, match=words):
                make(64, 128, 4, cuda)


def test_a_baseline_that_fails_or_is_wrong_is_left_out(monkeypatch, capsys) -> None:
    pytest.importorskip("triton")

    def made(name: str, call) -> gpu_baselines.Baseline:
        return gpu_baselines.Baseline(name, 64, lambda: call, torch.eye(64))

    def breaks(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("no such launch")

    def many(x: torch.Tensor) -> torch.Tensor:
        return x * (1.04 if len(x) > 64 else 1.0)

    calls = {"right": lambda x: x, "broken": breaks, "wrong": many, "none": lambda x: x * torch.nan}
    one = {name: lambda n, k, device, name=name: made(name, calls[name]) for name in calls}
    monkeypatch.setattr(run_gpu, "BASELINES", one)
    found, missing = run_gpu.find_baselines(64, 64, torch.device("cpu"))
    assert [baseline.name for baseline in found] == ["right"]
    assert missing["broken"] == "it failed: 'no such launch'"
    assert missing["wrong"] == "wrong by 0.04 at 70 rows"
    assert "wrong by nan at 1 rows, " in missing["none"]
    assert "without wrong at 64x64: wrong by 0.04 at 70 rows" in capsys.readouterr().err
    baselines = [made(name, calls[name]) for name in ("right", "broken")]
    times, missing = run_gpu.time_baselines(baselines, 64, 3, torch.device("cpu"))
    assert (set(times), set(missing)) == ({"right"}, {"broken"})


def _results(**seconds) -> dict:
    def cell(rows: int, n: int = 14336) -> dict:
        return {
            "shape": f"{n}x4096", "n": n, "k": 4096, "rows": rows,
            "seconds": {"4|2|2": {"4": 5e-6, "8": 9e-6, "alternating": 7e-6}},
            "bytes_read": {"4|2|2": {"4": 4e6, "8": 8e6}},
            "baselines": {"torch bf16": 8.1e-6},
        }  # fmt: skip

    return {
        "copy_bytes_per_s": 1e12,
        "entropy_and_decision_seconds": 20e-6,
        "cells": [cell(1), cell(1, n=512), cell(256)],
    } | seconds


def test_targets_are_judged() -> None:
    judged = {one["target"]: one for one in gpu_targets.judge(_results())}
    share = judged["8 bit, 1 row, large: share of the memory limit"]
    assert (share["cases"], share["met"], share["worst"]) == (1, 1, pytest.approx(8 / 9))
    assert judged["4 bit, 1 row, large: share of the memory limit"]["met"] == 1
    assert judged["4 bit times faster than 8 bit, 1 row, large"]["worst"] == pytest.approx(1.8)
    assert judged["one width times faster than alternating widths, 1 row, large"]["met"] == 1
    many = judged["8 bit times faster than bf16, 256 rows and more"]
    assert (many["cases"], many["met"], many["worst"]) == (1, 0, pytest.approx(0.9))
    assert "met in 0 of 1, worst 0.9" in many["text"]
    int4 = judged["4 bit times faster than torch's int4, 1 to 16 rows"]
    assert (int4["cases"], int4["worst"], int4["text"]) == (0, None, "not measured")
    step = judged["entropy and decision: 15 us over their time"]
    assert (step["met"], step["worst"]) == (0, pytest.approx(0.75))


def test_times_are_plotted_by_rows(tmp_path, monkeypatch) -> None:
    cells = _results()["cells"]
    found = gpu_plot.lines([cell for cell in cells if cell["n"] == 14336][::-1])
    assert found == {
        "4|2|2 at 4 bit": ([1, 256], [pytest.approx(5.0)] * 2),
        "4|2|2 at 8 bit": ([1, 256], [pytest.approx(9.0)] * 2),
        "torch bf16": ([1, 256], [pytest.approx(8.1)] * 2),
    }
    picture = tmp_path / "speed.png"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not gpu_plot.plot(cells, picture, "a GPU")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert gpu_plot.plot(cells, picture, "a GPU")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bad_arguments_are_refused(capsys) -> None:
    for arguments, words in (
        (["--interpret", "--shapes", "5x5"], "write N x K, K a multiple of 64"),
        (["--interpret", "--layouts", "4|4"], "has no kernel; use 4|2|2, 2|2|4"),
    ):
        with pytest.raises(SystemExit):
            run.main(arguments)
        assert words in capsys.readouterr().err
