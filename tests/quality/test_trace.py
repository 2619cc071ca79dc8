# SPDX-License-Identifier: Apache-2.0
import pytest

from benchmarks import trace

LAYERS = [
    {"shape": [10, 64], "group_size": 64},
    {"shape": [30, 64], "group_size": 32},
]


def step(widths, prompt=(False,), average=(1.0,)):
    return {
        "request_ids": ["r"] * len(prompt),
        "prompt": list(prompt),
        "widths": list(widths),
        "average": list(average),
    }


STEPS = [
    step([8, 8], prompt=[True, False], average=[None, 9.0]),
    step([4, 4], prompt=[False, False], average=[1.0, 3.0]),
    step([4, 4], average=[None]),
    step([8, 6], average=[4.0]),
    step([8, 8], prompt=[], average=[]),
]


def test_layers_count_by_their_size():
    assert trace.mean_bits(LAYERS, [8, 4]) == 5
    assert trace.bytes_read(LAYERS, [8, 4]) == 640 + 10 * 4 + 960 + 30 * 2 * 4


def test_only_decode_steps_are_summed_up():
    summary = trace.summarise(LAYERS, STEPS)
    assert summary["steps"] == 3
    assert summary["mean_bits"] == pytest.approx((4 + 4 + 6.5) / 3)
    assert summary["entropy_nats"] == pytest.approx((2 + 4) / 2)
    assert summary["rows"] == pytest.approx(4 / 3)
    assert summary["switches"] == 1
    assert summary["widths"] == pytest.approx({"4": 2 / 3, "6": 0.25, "8": 0.25 / 3})


def test_no_decode_step():
    summary = trace.summarise(LAYERS, STEPS[:1])
    assert summary["steps"] == 0
    assert summary["mean_bits"] is None
