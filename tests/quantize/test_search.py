# SPDX-License-Identifier: Apache-2.0
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flexquant.quantize.search import greedy, rungs, tree

WIDTHS = (4, 6, 8)


def additive(costs):
    """A measure for which the sensitivities do add up."""
    return lambda choices: [sum(costs[n][w] for n, w in c.items()) for c in choices]


@st.composite
def cost_tables(draw):
    count = draw(st.integers(1, 8))
    value = st.floats(0.0, 1.0)
    table = {}
    for i in range(count):
        at8 = draw(value) * 1e-3
        at6 = at8 + draw(value) * 0.1
        table[f"unit{i}"] = {4: at6 + draw(value), 6: at6, 8: at8}
    weights = {n: draw(st.integers(1, 50)) * 64 for n in table}
    return table, weights


def in_bytes(weights):
    return {name: {w: count * w / 8 for w in (4, 6, 8)} for name, count in weights.items()}


def test_a_step_that_saves_no_time_is_taken_only_on_the_way_to_one_that_does():
    costs = {"a": {4: 0.2, 6: 0.1, 8: 0.0}, "b": {4: 0.4, 6: 0.3, 8: 0.0}}
    prices = {"a": {4: 1.0, 6: 3.0, 8: 2.0}, "b": {4: 2.0, 6: 1.0, 8: 3.0}}
    steps = greedy(costs, prices)
    assert [(s.unit, s.width) for s in steps] == [("b", 6), ("a", 6), ("a", 4), ("b", 4)]
    measured = tree(costs, prices, additive(costs), branch=2, stem=2, bundle=0.01)
    assert len(measured) == 4


@given(cost_tables())
def test_greedy_lowers_every_unit_to_the_lowest_width_one_plane_at_a_time(problem):
    costs, weights = problem
    found = rungs(dict.fromkeys(costs, 8), greedy(costs, in_bytes(weights)))
    assert found[0] == dict.fromkeys(costs, 8)
    assert found[-1] == dict.fromkeys(costs, 4)
    for higher, lower in pairwise(found):
        changed = [n for n in costs if lower[n] != higher[n]]
        assert len(changed) == 1
        assert higher[changed[0]] - lower[changed[0]] == 2


@given(cost_tables(), st.integers(1, 3), st.integers(1, 3))
def test_tree_ends_where_greedy_ends(problem, branch, stem):
    costs, weights = problem
    steps = tree(costs, in_bytes(weights), additive(costs), branch, stem, bundle=0.2)
    assert len(steps) == 2 * len(costs)
    assert rungs(dict.fromkeys(costs, 8), steps)[-1] == dict.fromkeys(costs, 4)


def test_the_cheapest_step_comes_first_and_a_dear_one_does_not_hide_a_cheap_one():
    costs = {
        "a": {4: 0.010, 6: 0.009, 8: 0.0},  # 6 is dear, but 4 costs hardly more
        "b": {4: 0.100, 6: 0.006, 8: 0.0},
    }
    order = [(s.unit, s.width) for s in greedy(costs, in_bytes({"a": 64, "b": 64}))]
    assert order == [("a", 6), ("a", 4), ("b", 6), ("b", 4)]
    assert sum(s.kl for s in greedy(costs, in_bytes({"a": 64, "b": 64}))) == pytest.approx(0.11)


def test_a_units_size_counts():
    costs = {"small": {4: 0.1, 8: 0.0}, "large": {4: 0.2, 8: 0.0}}
    assert greedy(costs, in_bytes({"small": 64, "large": 640}))[0].unit == "large"


def test_the_tree_believes_what_it_measures_more_than_the_estimate():
    estimate = {n: {4: kl, 8: 0.0} for n, kl in {"a": 0.1, "b": 0.2, "c": 0.3}.items()}
    truth = {n: {4: kl, 8: 0.0} for n, kl in {"a": 0.9, "b": 0.1, "c": 0.4}.items()}
    weights = dict.fromkeys(estimate, 64)
    steps = tree(estimate, in_bytes(weights), additive(truth), branch=3, stem=2, bundle=0.01)
    assert [s.unit for s in steps] == ["b", "c", "a"]
    assert [s.unit for s in greedy(estimate, in_bytes(weights))] == ["a", "b", "c"]


def test_bad_tree_sizes():
    with pytest.raises(ValueError, match="branch 0 and stem 2 must be at least 1"):
        tree({}, {}, additive({}), branch=0)


def test_candidates_of_a_node_differ_however_large_the_bundle():
    costs = {f"unit{i}": {4: 0.1 + i / 100, 8: 0.0} for i in range(8)}
    asked = []

    def measure(choices):
        asked.append(len({tuple(c.items()) for c in choices}))
        return additive(costs)(choices)

    tree(costs, in_bytes(dict.fromkeys(costs, 64)), measure, branch=3, stem=1, bundle=0.25)
    assert asked[:3] == [3, 3, 3]
