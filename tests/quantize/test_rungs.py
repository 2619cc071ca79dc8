# SPDX-License-Identifier: Apache-2.0
"""Levels of a ladder: what is not measured of them."""

from itertools import pairwise

import pytest

from vllm_flexquant.quantize.blocks import Unit
from vllm_flexquant.quantize.rungs import Sizes, rung_records
from vllm_flexquant.quantize.search import Step


def records(kl_of_steps, known):
    units = [Unit((f"l{i}",), (64,), 64) for i in range(len(kl_of_steps))]
    steps = [Step(f"l{i}", 4, kl) for i, kl in enumerate(kl_of_steps)]
    return rung_records(steps, Sizes(units, 64, (4, 8)), known)


def test_kl_between_measured_levels_grows_as_the_sensitivities_add_up():
    found = records([0.01, 0.0, 0.03, 0.5, 0.1], {0: (0.002, 0.0), 3: (0.05, 0.01), 5: (0.74, 0.1)})
    kl = [rung.kl_nats for rung in found]
    assert kl == pytest.approx([0.002, 0.014, 0.014, 0.05, 0.625, 0.74])
    assert [rung.measured for rung in found] == [True, False, False, True, False, True]
    assert [rung.error for rung in found] == [0.0, None, None, 0.01, None, 0.1]


def test_sensitivities_that_say_nothing_leave_the_level_as_good_as_the_one_above():
    kl = [rung.kl_nats for rung in records([0.0, -0.1, 0.0], {0: (0.001, 0.0), 3: (0.3, 0.0)})]
    assert kl == [0.001, 0.001, 0.001, 0.3]


def test_a_level_between_is_no_bargain():
    """Equal steps of equal size: none of them buys more than its share."""
    kl = [rung.kl_nats for rung in records([0.1] * 4, {0: (0.001, 0.0), 4: (0.401, 0.0)})]
    assert [b - a for a, b in pairwise(kl)] == pytest.approx([0.1] * 4)
