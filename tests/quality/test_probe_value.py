# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from benchmarks.quality.probe import bits_at, bits_of_mix


def test_bits_at_a_kl_between_measured_levels():
    static = [(4.0, 0.4), (5.0, 0.1), (6.0, 0.01)]
    assert bits_at(0.1, static) == pytest.approx(5.0)
    assert bits_at(0.2, static) == pytest.approx(4.5)
    assert bits_at(0.4, static) == 4.0
    assert math.isnan(bits_at(0.5, static))
    assert math.isnan(bits_at(0.001, static))


def test_a_mix_goes_from_end_to_end():
    static = [(4.0, 0.4), (5.0, 0.1), (6.0, 0.02)]
    assert bits_of_mix(0.4, static) == 4.0
    assert bits_of_mix(0.02, static) == pytest.approx(6.0)
    assert bits_of_mix(0.21, static) == pytest.approx(5.0)
