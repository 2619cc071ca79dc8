# SPDX-License-Identifier: Apache-2.0
"""The tuner without a GPU: what it would try, how it chooses, that its table can be read."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.kernels import gpu_timing, tune
from benchmarks.kernels.gpu_layers import activations, make_layer
from flexquant_kernels import reference

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.fixture
def tuning(gpu):
    return gpu.tuning


def test_without_a_gpu_it_says_so_and_writes_nothing(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "sm_90.json"
    assert tune.main(["--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: tuning needs a GPU, and torch ")
    assert "run it on the GPU that it is for" in error
    assert not out.exists()


def test_what_is_tried_can_be_launched(tuning) -> None:
    for target in ("sm_90", "sm_100", "gfx942"):
        for rows in (1, 8, 9, 64):
            tried = list(tune.launches(rows, 1024, target))
            assert len(tried) == len(set(tried))
            assert {one.block for one in tried} <= set(tuning.row_blocks(target))
            assert {one.splits for one in tried} == {1, 2, 3, 4}
            heuristic = tuning.heuristic(rows, 64, 1024, target, 132)
            assert heuristic in tried
            assert set(tune.launches(rows, 1024, target, quick=True)) < set(tried)


def test_the_launch_that_serves_all_widths_best_is_taken() -> None:
    times = {
        "good at 4": {4: 1.0, 8: 4.0},
        "good at 8": {4: 3.0, 8: 2.0},
        "good at both": {4: 1.2, 8: 2.2},
        "wrong": {},
    }
    assert tune.best(times) == "good at both"
    assert tune.best({"wrong": {}}) is None


def test_the_threshold_lies_where_the_fused_kernel_is_first_slower() -> None:
    def threshold(*fused: float) -> int:
        return tune.threshold({64 * (i + 1): (one, 1.0) for i, one in enumerate(fused)})

    assert threshold(0.5, 0.8, 1.2, 1.5) == 128
    assert threshold(0.5, 1.1, 0.9) == 64
    assert threshold(0.5, 0.6, 0.7) == 192
    assert threshold(1.2, 0.9) == 63
    assert threshold(1.2, 1.3) == 63


def test_a_table_is_made_and_read(tuning, tmp_path, device) -> None:
    def measure(layer, rows, launch):
        if launch.warps == 2:
            return {}
        penalty = abs(launch.splits - min(rows, 4)) + launch.stages + launch.warps
        return {width: width * (1.0 + penalty) for width in layer.widths}

    def make(n, k, layout):
        return SimpleNamespace(k=k, widths=(4, 6, 8))

    made = list(tune.entries([(128, 1024)], [(4, 2, 2)], "sm_90", make, measure))
    assert [entry["rows"] for entry in made] == [1, 2, 4, 8, 16, 32, 64]
    assert [entry["splits"] for entry in made] == [1, 2, 4, 4, 4, 4, 4]
    quick = tune.entries([(128, 1024)], [(4, 2, 2)], "sm_90", make, measure, quick=True)
    assert [entry["rows"] for entry in quick] == [1, 8, 16, 64]
    out = tmp_path / "tuned" / "sm_90.json"
    tune.write_table(out, "sm_90", made, {64: (1.0, 2.0), 128: (2.0, 1.0)}, "a GPU")
    table = tuning.read_table(out)
    assert table.dequantize_above == 64
    chosen = tuning.choose(table, (4, 2, 2), 3, 128, 1024, "sm_90", 132)
    assert chosen == tuning.Launch(8, 4, 4, 1)
    assert json.loads(out.read_text())["provenance"]["gpu"] == "a GPU"
    with pytest.raises(RuntimeError, match="no launch is right for 128x1024, 1 rows"):
        list(tune.entries([(128, 1024)], [(4, 2, 2)], "sm_90", make, lambda *_: {}))


def test_a_launch_is_measured_only_where_it_is_right(gpu, device, tuning, capsys) -> None:
    layer = make_layer(70, 256, (4, 2, 2), device)
    launch = tuning.heuristic(2, 70, 256, "sm_90", 1)
    found = tune.measured(layer, 2, launch)
    assert set(found) == {4, 6, 8}
    assert all(one > 0 for one in found.values())
    layer.weight.planes[0].bitwise_xor_(1 << 7)
    assert tune.measured(layer, 2, launch) == {}
    assert "is wrong at 4 bit" in capsys.readouterr().err


def test_layers_to_be_timed_have_codes_of_all_widths(gpu, device) -> None:
    layer = make_layer(70, 256, (2, 2, 4), device)
    assert layer.bytes_read(8) == 70 * 256 + 70 * 4 * 4
    full = reference.dequantize(layer.planes, layer.scales, layer.layout, 8, 64, 70)
    for width in layer.widths:
        some = reference.dequantize(layer.planes, layer.scales, layer.layout, width, 64, 70)
        assert float((some - full).abs().max()) <= 1.2e-3 * 2 ** (7 - width) * 2
    first, second = layer.copies(2)
    assert first.planes[0].data_ptr() != second.planes[0].data_ptr()
    assert torch.equal(first.planes[0], second.planes[0])
    assert activations(2, 64, torch.float16, device).dtype == torch.float16
    assert gpu_timing.copies_for_cold_cache(1000, torch.device("cpu")) == 1


@pytest.mark.parametrize("words", ["64", "0x64", "64x100", "axb"])
def test_bad_shapes_are_refused(words, capsys) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--shapes", words])
    assert "write N x K, K a multiple of 64" in capsys.readouterr().err
