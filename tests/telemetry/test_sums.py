# SPDX-License-Identifier: Apache-2.0
"""What a worker reports to `/metrics`."""

from itertools import pairwise

import pytest
import torch

from tests.planner.test_budget_control import LAYERS, batch, controller, step
from vllm_flexquant.telemetry.sums import SinceAsked

pytestmark = pytest.mark.usefixtures("machinery")


def test_bits_and_switches_are_those_of_the_steps():
    made = controller()
    bits, tables = 0.0, []
    for log in (-2.0, -2.0, 2.0, 0.0):
        _, after = step(made, logs=[log])
        bits, tables = bits + sum(after) / LAYERS, [*tables, after]
    step(made, "ab", prompt=[False, True])  # no decode step
    found = made.metrics()
    assert found["counters"]["decode_steps"] == 4
    assert found["counters"]["decode_step_bits"] == pytest.approx(bits)
    changes = sum(a != b for a, b in pairwise(tables))
    assert found["counters"]["switches"] == changes > 0
    assert found["gauges"]["mean_bits"] == 8
    assert found["gauges"]["entropy_nats"] > 0


def test_an_addition_is_handed_out_once():
    made = controller()
    for _ in range(3):
        step(made)
    first, second = made.metrics(), made.metrics()
    assert first["counters"]["decode_steps"] == 3
    assert first["classes"]["balanced"]["tokens"] == 3
    assert first["classes"]["balanced"]["booked_nats"] > 0
    assert second["counters"] == dict.fromkeys(first["counters"], 0)
    assert second["classes"]["balanced"]["tokens"] == 0
    made.update({"width": 4})
    step(made)
    step(made)
    found = made.metrics()
    assert found["counters"]["decode_step_bits"] == 8
    assert found["classes"] == {}


def test_an_account_that_begins_anew_is_counted_from_there():
    told = SinceAsked()
    assert told({"tokens": 5.0}) == {"tokens": 5.0}
    assert told({"tokens": 2.0}) == {"tokens": 2.0}
    assert told({"tokens": 3.0}) == {"tokens": 1.0}


def test_rows_without_a_distribution_are_counted():
    made = controller()
    made.before_forward(batch("ab"))
    logits = torch.zeros(2, 30)
    logits[1, 3] = float("nan")
    made.after_logits(logits)
    assert made.metrics()["counters"]["unknown_rows"] == 1


def test_promises_show():
    made = controller(target_ms=5.0)
    made.admit(0, {"flexquant_class": "exact"})
    made.admit(1, {"flexquant_budget": 1e-5})
    step(made, "ab")
    found = made.metrics()
    assert found["gauges"]["request_floor_bits"] == 8
    assert found["gauges"]["load_target_seconds"] == 0.005
    assert found["classes"]["budget 1e-05"]["can_be_met"] is False
    assert found["classes"]["exact"]["tokens"] == 1
