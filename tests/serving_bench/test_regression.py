# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from benchmarks.regression import LIMITS, judge

GOOD = {name: limit.most for name, limit in LIMITS.items()}


def test_figures_at_their_limits_pass():
    assert judge(GOOD) == []


@pytest.mark.parametrize("name", list(LIMITS))
@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_each_figure_can_fail(name, factor):
    (line,) = judge(GOOD | {name: GOOD[name] * factor})
    assert line.startswith(f"{name} is ")
    assert LIMITS[name].remedy in line


def test_a_figure_that_is_missing_fails():
    (line,) = judge({n: v for n, v in GOOD.items() if n != "machinery share"})
    assert "machinery share is None" in line
