# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace

import pytest

from benchmarks.quality.calibrated import RESULTS
from vllm_flexquant.format import PlaneLayout
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.quantize.calibrate import CalibrationOptions, calibrate_checkpoint
from vllm_flexquant.quantize.cost import KernelTimes, read_kernel_times, unit_prices

KERNELS = RESULTS / "kernels-cpu.json"


def test_times_are_interpolated_between_sizes_and_proportional_beyond_them():
    times = KernelTimes({4: [(100, 2.0), (10_000, 20.0)]}, "test")
    assert times.seconds(100, 4) == 2.0
    assert times.seconds(50, 4) == 1.0
    assert times.seconds(1000, 4) == pytest.approx(40**0.5)
    assert times.seconds(20_000, 4) == 40.0


@pytest.mark.parametrize("layout", ["4|2|2", "2|2|4", "2|1|1|2|2"])
def test_the_results_of_the_kernel_benchmark_are_such_a_table(layout):
    layout = PlaneLayout.parse(layout)
    times = read_kernel_times(KERNELS, layout, rows=1)
    assert "1 rows, 2 threads (kernels-cpu.json)" in times.source
    for weights in (1000, 1536 * 576, 10**7, 10**10):
        assert times.seconds(weights, 8) > times.seconds(weights, layout.lowest) > 0
    assert "4 rows" in read_kernel_times(KERNELS, layout, rows=5).source
    prices = unit_prices(4096, 4096, 64, layout.widths, times)
    assert prices[8] == times.seconds(4096 * 4096, 8)
    assert unit_prices(32, 64, 64, (4, 8), None) == {4: 32 * 32 + 128, 8: 32 * 64 + 128}


def test_a_ladder_by_time(tiny_model, tiny_text, tmp_path):
    settings = CalibrationOptions(
        text=str(tiny_text), sequences=12, length=64, measured_rungs=3, measured_units=4,
        method="rtn", cost=str(KERNELS), cost_rows=16,
    )  # fmt: skip
    record = calibrate_checkpoint(tiny_model, tmp_path / "out", FlexQuantOptions(), settings)
    assert record.ladder.cost == "time of kernels at 16 rows, 2 threads (kernels-cpu.json)"
    assert record.ladder.rungs[-1].mean_bits == 4


def test_what_is_no_table_is_refused_before_anything_is_done(tiny_model, tiny_text, tmp_path):
    broken, other, layout = (tmp_path / f"{i}.json" for i in range(3))
    broken.write_text("{")
    other.write_text(json.dumps({"results": {}}))
    layout.write_text(json.dumps({"results": {"cells": []}}))
    settings = CalibrationOptions(text=str(tiny_text), sequences=12, length=64)
    for file, message in (
        (tmp_path / "none.json", "is no file; write one with"),
        (broken, "has no results of"),
        (other, "has no results of"),
        (layout, r"has no times of layout 4\|2\|2 from memory"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate_checkpoint(
                tiny_model,
                tmp_path / "out",
                FlexQuantOptions(),
                replace(settings, cost=str(file)),
            )
    assert not (tmp_path / ".out.partial").exists()
