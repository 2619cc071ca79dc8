# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexquant_kernels.state as layout
from flexquant_kernels.state import AGGREGATES
from vllm_flexquant.planner.figures import Probe
from vllm_flexquant.planner.state import LEDGER, empty_state, fill
from vllm_flexquant.policy import budget as module
from vllm_flexquant.policy.budget import (
    OTHER,
    Budget,
    correction,
    need_of,
    price_curve,
    price_of,
    step_kl,
)
from vllm_flexquant.policy.protocol import FIRST, LAST, LATER, StepFacts, least_move

LEVELS, ROWS = 101, 8
BITS = np.linspace(4, 8, LEVELS)
KL = 0.17 * np.exp(-1.3 * (BITS - 4))
COST = BITS / 8
NATS = (0.1, 0.5, 1.0, 1.5, 2.0)
"""Needs by entropy, in bins of one nat."""

WEIGHT, BIAS = torch.tensor([1.0, -0.5]), 0.2

numpy_view, as_it_is = torch.Tensor.numpy, lambda tensor: tensor
VIEWS = (numpy_view, as_it_is)
"""The arrays that policies see on a CPU, and those on a GPU."""


def make_state(
    budgets=(0.03,), view=numpy_view, kl=KL, early=0.25, hysteresis=0.0, aggregate="mean", **values
):
    """Accounts 0, 1, ... have these budgets."""
    figures = {
        "kl": kl.tolist(),
        "cost": COST.tolist(),
        "early_kl": (kl * early).tolist(),
        "early_cost": (COST * early).tolist(),
        "width_kl": [kl[0]] * 5 + [kl[50]] * 2 + [kl[-1]] * 2,
        "need_by_entropy": NATS,
        "need_by_average": NATS,
        "bin_nats": 1.0,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "view", view)
        table = torch.zeros(0, dtype=torch.int32)
        state = empty_state(table, figures, ROWS, ROWS, Probe("", 0, WEIGHT, BIAS))
    given = {"horizon": 256.0, "dwell": 1, "quantile": 0.5, "bounds": [2, 8]}
    given |= {"aggregate": AGGREGATES.index(aggregate)}
    given |= {"least_move": least_move(hysteresis, LEVELS)}
    curve = price_curve(state)
    asked = {"asked": list(budgets), "base_price": [price_of(b, curve) for b in budgets]}
    for name, value in (given | asked | values).items():
        size = state.tensor(name).numel()
        listed = name in (*asked, *LEDGER)
        fill(state, **{name: value + [0.0] * (size - len(value)) if listed else value})
    return state


def like(state, values, dtype):
    found = torch.tensor(values, dtype=dtype)
    return found.numpy() if isinstance(state.kl, np.ndarray) else found


def begin(state, accounts, policy=None):
    policy = policy or Budget(0)
    n = len(accounts)
    facts = like(state, [[*range(n)], [*range(n)], accounts, [*range(n)]], torch.int64)
    fill(state, probes=int(n > 0))
    policy.begin(state, StepFacts(facts.reshape(4, n), n))
    return policy


def decide(needs, accounts=None, last=(LEVELS - 1, 0), state=None, **values):
    """The level of the layers after the probe."""
    state = make_state(**values) if state is None else state
    policy = begin(state, accounts or [0] * len(needs))
    fill(state, decisions=[last] * 3)
    policy.decide(state, like(state, needs, torch.float32))
    return int(state.decisions[LATER, 0])


@pytest.mark.parametrize("budget", [0.002, 0.01, 0.03, 0.1])
def test_an_average_token_costs_about_what_is_asked(budget):
    assert KL[decide([1.0], budgets=[budget])] == pytest.approx(budget, rel=0.1)


def test_what_needs_more_runs_higher_and_all_at_the_same_kl():
    levels = [decide([need]) for need in (0.25, 0.5, 1.0, 2.0, 4.0)]
    assert levels == sorted(set(levels))
    spent = [KL[n] * need for n, need in zip(levels, (0.25, 0.5, 1.0, 2.0, 4.0), strict=True)]
    assert spent == pytest.approx([0.03] * 5, rel=0.12)


def test_a_level_that_is_no_bargain_is_never_taken():
    kl = KL.copy()
    kl[40:50] = KL[39]  # ten levels that cost more and save nothing
    taken = set()
    for budget in (0.01, 0.03, 0.1):
        state = make_state(kl=kl, budgets=[budget])
        taken |= {decide([need], state=state) for need in np.geomspace(0.2, 5, 60)}
    assert len(taken) > 20
    assert not taken & set(range(40, 50))


def test_budgets_beyond_the_ladder_take_its_ends():
    assert decide([1.0], budgets=[1e-9]) == LEVELS - 1
    assert decide([1.0], budgets=[10.0]) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_a_usable_score_asks_for_the_best_level(bad):
    assert decide([bad, 0.1, 0.1, 0.1]) == LEVELS - 1


def test_aggregates():
    needs = [0.2, 0.4, 3.0]
    mean, quantile, most = (decide(needs, aggregate=n) for n in ("mean", "quantile", "max"))
    assert quantile < mean < most
    assert mean == decide([1.2])
    assert quantile == decide([0.4])
    assert most == decide([3.0])


def test_the_strictest_account_rules_and_rows_of_none_do_not_count():
    budgets = (0.01, 0.1)
    strict, lax = (decide([1.0], [n], budgets=budgets) for n in (0, 1))
    assert lax < strict
    assert decide([1.0, 1.0, 1.0], [1, 0, 1], budgets=budgets) == strict
    assert decide([1.0, 9.0], [1, OTHER], budgets=budgets) == lax
    assert decide([9.0], [OTHER], last=(33, 0)) == 33


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("view", VIEWS)
def test_without_any_row_the_level_stays(aggregate, view):
    state = make_state(view=view, aggregate=aggregate)
    fill(state, decisions=[(42, 0)] * 3)
    begin(state, [])
    assert state.price.tolist() == [-1.0]
    assert state.decisions[:, 0].tolist() == [42] * 3


def test_what_is_owed_raises_the_level_and_what_is_left_lowers_it():
    even = decide([1.0])
    assert decide([1.0], balance=[-4.0]) > even
    assert decide([1.0], balance=[4.0]) < even
    # bounded: not more than a factor of 4 in price
    assert decide([1.0], balance=[-1e6]) == decide([4.0])


@pytest.mark.parametrize("balance", [1e308, -1e308, math.inf, math.nan])
def test_an_account_at_its_limits_does_not_rule_the_others(balance):
    alone = decide([1.0], [1], budgets=(100.0, 0.03))
    beside = decide([1.0, 1.0], [0, 1], budgets=(100.0, 0.03), balance=[balance])
    assert beside == alone


@pytest.mark.parametrize("moment", [FIRST, LAST])
def test_nothing_runs_above_the_ceiling(moment):
    def decided(price_of_nat, last, **values):
        state = make_state(**values)
        begin(state, [0])
        fill(state, ceiling=30, base_price=price_of_nat, decisions=[(last, 0)] * 3)
        policy = begin(state, [0] if price_of_nat else [OTHER])
        if moment == LAST:
            policy.decide(state, like(state, [1.0], torch.float32))
        return int(state.decisions[LATER, 0])

    assert decided(1e6, 20) == 30
    assert decided(1e-4, 20) == 0
    assert decided(0.0, 20) == 20
    assert decided(1e6, 40, hysteresis=0.5) == 30  # although so little may not change


def test_hysteresis_and_dwell_hold_the_level():
    wanted = decide([1.0])
    assert decide([1.0], last=(wanted - 8, 0), hysteresis=0.1) == wanted - 8
    assert decide([1.0], last=(wanted - 15, 0), hysteresis=0.1) == wanted
    assert decide([1.0], last=(5, 1), dwell=3) == 5
    assert decide([1.0], last=(5, 2), dwell=3) == wanted


def test_steps_without_a_change_are_counted_up_to_a_limit():
    """An int32 would wrap after 2**31 of them, and the level be frozen."""
    state, most = make_state(), 2**30
    wanted = decide([1.0], state=state)
    for held in (most - 1, most):
        assert decide([1.0], last=(wanted, held), state=state) == wanted
        assert state.decisions[:, 1].tolist() == [held, most, most]  # `begin` was before
    assert decide([1.0], last=(5, most), state=state) == wanted


def simulate(budget, needs, actual, entropy=1.5):
    """Mean KL spent on tokens that are foreseen to need `needs` and need `actual`."""
    state, policy, spent = make_state([budget]), Budget(0), []
    for foreseen, really in zip(needs, actual, strict=True):
        begin(state, [0], policy)
        policy.decide(state, like(state, [foreseen], torch.float32))
        spent.append(step_kl(state).item() * really)
        policy.book(state, like(state, [entropy], torch.float32))
    return np.array(spent), state


@pytest.mark.parametrize("budget", [0.01, 0.03, 0.1])
def test_the_mean_spent_meets_the_mean_asked(budget):
    pick = np.random.default_rng(0)
    need = np.exp(0.6 * pick.standard_normal(3000) - 0.18)
    spent, state = simulate(budget, need, need)
    assert 0.85 <= spent.mean() / budget <= 1.0
    assert state.spent[0] == pytest.approx(spent.sum())
    assert state.tokens[0] == 3000


def test_text_that_needs_twice_as_much_is_followed_within_a_thousand_tokens():
    """Entropy tells: 2 nats is a bin of twice the average need."""
    calm, hard = np.ones(1500), np.full(2000, 2.0)
    spent, state = simulate(0.03, np.ones(2000), hard, entropy=4.5)
    assert correction(state)[0] == pytest.approx(2.0, rel=0.1)
    assert spent[1000:].mean() == pytest.approx(0.95 * 0.03, rel=0.1)
    spent, _ = simulate(0.03, calm, calm, entropy=2.5)
    assert spent[1000:].mean() == pytest.approx(0.95 * 0.03, rel=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_entropy_that_is_no_number_asks_for_the_best_level_and_is_not_booked(bad):
    state, nats = make_state(by_average=1), np.array([1.5, bad], dtype=np.float32)
    state.average[:2], state.seen[:2] = nats, True
    need = need_of(state, state.need_by_average, nats)
    assert need[0] == 0.5
    policy = begin(state, [0, 0])
    assert state.decisions[FIRST, 0] == LEVELS - 1
    policy.book(state, nats)
    assert state.spent[0] == pytest.approx(KL[-1] * (0.5 + 1.0), rel=0.01)
    assert np.isfinite(correction(state)).all()


def test_low_entropy_buys_nothing():
    _, state = simulate(0.03, np.ones(500), np.ones(500), entropy=0.0)
    assert correction(state)[0] == 1.0


def test_bounds_limit_what_is_booked():
    def booked(first, later, bounds):
        state = make_state(bounds=bounds)
        fill(state, decisions=[(first, 0), (later, 0), (later, 0)])
        return step_kl(state).item()

    assert booked(0, 0, [8, 8]) == pytest.approx(KL[-1])
    assert booked(LEVELS - 1, LEVELS - 1, [2, 4]) == pytest.approx(KL[0])
    assert booked(10, 60, [2, 8]) == pytest.approx(0.25 * KL[10] + 0.75 * KL[60])


@given(
    st.lists(
        st.tuples(st.floats(0.01, 50), st.integers(-1, 2), st.floats(0, 9)), min_size=1, max_size=6
    ),
    st.sampled_from(AGGREGATES),
    st.lists(st.floats(-5, 5), min_size=3, max_size=3),
)
def test_numpy_and_torch_agree(rows, aggregate, balance):
    found = []
    needs, accounts, nats = zip(*rows, strict=True)
    for view in VIEWS:
        given = {"balance": balance, "spent": [3.0]}
        state = make_state((0.01, 0.03, 0.1), view, aggregate=aggregate, **given)
        policy = begin(state, list(accounts))
        fill(state, decisions=[(20, 0)] * 3, ceiling=90)
        policy.decide(state, like(state, needs, torch.float32))
        kl = step_kl(state)
        policy.book(state, like(state, nats, torch.float32))
        names = ("price", "decisions", "scores", "row_account", *LEDGER)
        found.append([kl, *(getattr(state, name) for name in names)])
    for own, other in zip(*found, strict=True):
        assert isinstance(own, np.ndarray)
        assert isinstance(other, torch.Tensor)
        np.testing.assert_allclose(own, np.asarray(other), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_reads_the_rows_that_there_are(view, dtype, monkeypatch):
    """Of a pass that is padded above the rows of the state, or has fewer of them."""
    state = make_state(view=view)
    monkeypatch.setattr(module, "view", view)
    policy = begin(state, [0, 0])
    x = torch.arange(2.0 * (ROWS + 4)).reshape(-1, 2).to(dtype) / 32
    for rows in (1, 2, ROWS, ROWS + 4):
        policy.probe(state, x[:rows])
        seen = min(rows, 2)
        expected = np.exp(x[:seen].float().numpy() @ WEIGHT.numpy() + BIAS)
        np.testing.assert_allclose(np.asarray(state.scores)[:seen], expected, rtol=1e-6)
        assert (np.asarray(state.scores)[2:] == 0).all()


def test_a_price_meets_its_budget_and_prices_rise_as_budgets_fall():
    curve = price_curve(make_state())
    prices, mean = curve
    assert (np.diff(prices) > 0).all()
    assert (np.diff(mean) <= 1e-12).all()
    budgets = np.geomspace(KL[-1] * 1.1, KL[0] * 0.9, 30)
    found = [price_of(b, curve) for b in budgets]
    assert found == sorted(found, reverse=True)
    np.testing.assert_allclose(np.interp(found, prices, mean), budgets, rtol=0.05)
    assert math.isfinite(price_of(1e-300, curve))
