# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_flexquant.policy.budget import (
    CLASSES,
    NO_PAST,
    OTHER,
    BudgetPolicy,
    Calibrated,
    Ledger,
    price_of,
)
from vllm_flexquant.policy.decision import Decision

LEVELS = 101
BITS = np.linspace(4, 8, LEVELS)
KL = 0.17 * np.exp(-1.3 * (BITS - 4))
COST = BITS / 8
NATS = (0.1, 0.5, 1.0, 1.5, 2.0)
"""Needs by entropy, in bins of one nat."""


def calibrated(make=np.array, early=0.25, kl=KL):
    def of(values):
        return make(np.asarray(values, dtype=np.float64).tolist(), dtype=FP64[make])

    width_kl = [kl[0]] * 5 + [kl[50]] * 2 + [kl[-1]] * 2
    needs = of(NATS)
    return Calibrated(
        of(kl), of(COST), of(kl * early), of(COST * early), of(width_kl), needs, needs, 1.0
    )


FP64 = {np.array: np.float64, torch.tensor: torch.float64}
KINDS = {np.array: np, torch.tensor: torch}


def policy(make=np.array, **changes):
    values = {
        "levels": LEVELS,
        "horizon": 256,
        "hysteresis": 0.0,
        "dwell": 1,
        "aggregate": "mean",
        "quantile": 0.5,
    }
    early, kl = changes.pop("early", 0.25), changes.pop("kl", KL)
    return BudgetPolicy(calibrated=calibrated(make, early, kl), **values | changes)


def ledger(budgets, make=np.array, **sums):
    """Classes 0, 1, ... with these budgets."""
    empty = [0.0] * CLASSES

    def of(values):
        return make([*values, *empty[len(values) :]], dtype=FP64[make])

    given = {"asked": budgets, "price": [price_of(b, calibrated()) for b in budgets]}
    given |= {"needed": [NO_PAST] * CLASSES, "foreseen": [NO_PAST] * CLASSES} | sums
    return Ledger(**{f.name: of(given.get(f.name, [])) for f in fields(Ledger)})


def level(number=LEVELS - 1, held=0, make=np.array):
    return Decision(*(make([n], dtype=KINDS[make].int32) for n in (number, held)))


def decide(chosen, needs, classes=None, budgets=(0.03,), last=None, make=np.array, **sums):
    """The level of the layers after the probe."""
    classes = make(classes or [0] * len(needs), dtype=KINDS[make].int64)
    price = chosen.price(make(needs, dtype=FP64[make]), classes, ledger(budgets, make, **sums))
    top = level(make=make).level
    return chosen.later(price, top, last or level(make=make)).level.item()


@pytest.mark.parametrize("budget", [0.002, 0.01, 0.03, 0.1])
def test_an_average_token_costs_about_what_is_asked(budget):
    assert KL[decide(policy(), [1.0], budgets=[budget])] == pytest.approx(budget, rel=0.1)


def test_what_needs_more_runs_higher_and_all_at_the_same_kl():
    levels = [decide(policy(), [need]) for need in (0.25, 0.5, 1.0, 2.0, 4.0)]
    assert levels == sorted(set(levels))
    spent = [KL[n] * need for n, need in zip(levels, (0.25, 0.5, 1.0, 2.0, 4.0), strict=True)]
    assert spent == pytest.approx([0.03] * 5, rel=0.12)


def test_a_level_that_is_no_bargain_is_never_taken():
    kl = KL.copy()
    kl[40:50] = KL[39]  # ten levels that cost more and save nothing
    taken = {
        decide(policy(kl=kl), [need], budgets=[budget])
        for need in np.geomspace(0.2, 5, 60)
        for budget in (0.01, 0.03, 0.1)
    }
    assert len(taken) > 20
    assert not taken & set(range(40, 50))


def test_budgets_beyond_the_ladder_take_its_ends():
    assert decide(policy(), [1.0], budgets=[1e-9]) == LEVELS - 1
    assert decide(policy(), [1.0], budgets=[10.0]) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_a_usable_score_asks_for_the_best_level(bad):
    assert decide(policy(), [bad, 0.1, 0.1, 0.1]) == LEVELS - 1


def test_aggregates():
    needs = [0.2, 0.4, 3.0]
    mean, quantile, most = (
        decide(policy(aggregate=name), needs) for name in ("mean", "quantile", "max")
    )
    assert quantile < mean < most
    assert mean == decide(policy(), [1.2])
    assert quantile == decide(policy(), [0.4])
    assert most == decide(policy(), [3.0])


def test_the_strictest_class_rules_and_rows_of_none_do_not_count():
    strict, lax = (
        decide(policy(), [1.0], [0], [0.01, 0.1]),
        decide(policy(), [1.0], [1], [0.01, 0.1]),
    )
    assert lax < strict
    assert decide(policy(), [1.0, 1.0, 1.0], [1, 0, 1], [0.01, 0.1]) == strict
    assert decide(policy(), [1.0, 9.0], [1, OTHER], [0.01, 0.1]) == lax
    assert decide(policy(), [9.0], [OTHER], last=level(33)) == 33


@pytest.mark.parametrize("aggregate", ["mean", "quantile", "max"])
@pytest.mark.parametrize("make", KINDS)
def test_without_any_row_the_level_stays(aggregate, make):
    nobody = make([], dtype=FP64[make]), make([], dtype=KINDS[make].int64)
    chosen = policy(make, aggregate=aggregate)
    price = chosen.price(*nobody, ledger([0.03], make))
    assert price.tolist() == [-1.0]
    assert chosen.first(price, level(make=make).level, level(42, make=make)).level.item() == 42


def test_what_is_owed_raises_the_level_and_what_is_left_lowers_it():
    even = decide(policy(), [1.0])
    assert decide(policy(), [1.0], balance=[-4.0]) > even
    assert decide(policy(), [1.0], balance=[4.0]) < even
    # bounded: not more than a factor of 4 in price
    assert decide(policy(), [1.0], balance=[-1e6]) == decide(policy(), [4.0])


def test_nothing_runs_above_the_ceiling():
    ceiling, dear, cheap = level(30).level, np.array([1e4]), np.array([1e-4])
    for decided in (policy().first, policy().later):
        assert decided(dear, ceiling, level(20)).level == 30
        assert decided(cheap, ceiling, level(20)).level == 0
        assert decided(np.array([-1.0]), ceiling, level(20)).level == 20
    slow = policy(hysteresis=0.5)
    assert slow.first(dear, ceiling, level(40)).level == 30  # although so little may not change


def test_hysteresis_and_dwell_hold_the_level():
    chosen = policy(hysteresis=0.1)
    wanted = decide(policy(), [1.0])
    assert decide(chosen, [1.0], last=level(wanted - 8)) == wanted - 8
    assert decide(chosen, [1.0], last=level(wanted - 15)) == wanted
    assert decide(policy(dwell=3), [1.0], last=level(5, held=1)) == 5
    assert decide(policy(dwell=3), [1.0], last=level(5, held=2)) == wanted


def simulate(chosen, budget, needs, actual, entropy=1.5):
    """Mean KL spent on tokens that are foreseen to need `needs` and need `actual`."""
    books, first, later, spent = ledger([budget]), level(), level(), []
    nobody = np.array([0])
    bounds = np.array([2]), np.array([8])
    for foreseen, really in zip(needs, actual, strict=True):
        price = chosen.price(np.array([1.0]), nobody, books)
        first = chosen.first(price, level().level, first)
        later = chosen.later(
            chosen.price(np.array([foreseen]), nobody, books), level().level, later
        )
        kl = chosen.kl(first, later, *bounds)
        spent.append(kl.item() * really)
        books = chosen.book(
            kl, np.array([foreseen]), np.array([entropy], dtype=np.float32), nobody, books
        )
    return np.array(spent), books


@pytest.mark.parametrize("budget", [0.01, 0.03, 0.1])
def test_the_mean_spent_meets_the_mean_asked(budget):
    pick = np.random.default_rng(0)
    need = np.exp(0.6 * pick.standard_normal(3000) - 0.18)
    spent, books = simulate(policy(), budget, need, need)
    assert 0.85 <= spent.mean() / budget <= 1.0
    assert books.spent[0] == pytest.approx(spent.sum())
    assert books.tokens[0] == 3000


def test_text_that_needs_twice_as_much_is_followed_within_a_thousand_tokens():
    """Entropy tells: 2 nats is a bin of twice the average need."""
    calm, hard = np.ones(1500), np.full(2000, 2.0)
    spent, books = simulate(policy(), 0.03, np.ones(2000), hard, entropy=4.5)
    assert books.correction[0] == pytest.approx(2.0, rel=0.1)
    assert spent[1000:].mean() == pytest.approx(0.95 * 0.03, rel=0.1)
    spent, _ = simulate(policy(), 0.03, calm, calm, entropy=2.5)
    assert spent[1000:].mean() == pytest.approx(0.95 * 0.03, rel=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_entropy_that_is_no_number_asks_for_the_best_level_and_is_not_booked(bad):
    chosen, nats = policy(), np.array([1.5, bad], dtype=np.float32)
    need = chosen.calibrated.need(chosen.calibrated.by_average, nats)
    assert need[0] == 0.5
    assert decide(chosen, need.tolist()) == LEVELS - 1
    books = chosen.book(np.array([0.03]), need, nats, np.array([0, 0]), ledger([0.03]))
    assert books.spent[0] == pytest.approx(0.03 * (0.5 + 1.0), rel=0.01)
    assert np.isfinite(books.correction[0])


def test_low_entropy_buys_nothing():
    _, books = simulate(policy(), 0.03, np.ones(500), np.ones(500), entropy=0.0)
    assert books.correction[0] == 1.0


def test_bounds_limit_what_is_booked():
    chosen = policy()
    kl = chosen.kl(level(0), level(0), np.array([8]), np.array([8]))
    assert kl.item() == pytest.approx(KL[-1])
    kl = chosen.kl(level(LEVELS - 1), level(LEVELS - 1), np.array([2]), np.array([4]))
    assert kl.item() == pytest.approx(KL[0])
    kl = chosen.kl(level(10), level(60), np.array([2]), np.array([8]))
    assert kl.item() == pytest.approx(0.25 * KL[10] + 0.75 * KL[60])


@given(
    st.lists(
        st.tuples(st.floats(0.01, 50), st.integers(-1, 2), st.floats(0, 9)), min_size=1, max_size=6
    ),
    st.sampled_from(["mean", "quantile", "max"]),
    st.lists(st.floats(-5, 5), min_size=3, max_size=3),
)
def test_numpy_and_torch_agree(rows, aggregate, balance):
    found = []
    for make, kind in KINDS.items():
        chosen = policy(make, aggregate=aggregate)
        needs, classes, nats = zip(*rows, strict=True)
        needs, classes = make(needs, dtype=FP64[make]), make(classes, dtype=kind.int64)
        books = ledger([0.01, 0.03, 0.1], make, balance=balance, spent=[3.0])
        price = chosen.price(needs, classes, books)
        later = chosen.later(price, level(90, make=make).level, level(20, make=make))
        kl = chosen.kl(level(20, make=make), later, *(make([n]) for n in (2, 8)))
        entropy = make(nats, dtype=kind.float32)
        after = chosen.book(kl, needs, entropy, classes, books)
        found.append([price, later.level, kl, *(getattr(after, f.name) for f in fields(Ledger))])
    for own, other in zip(*found, strict=True):
        np.testing.assert_allclose(own, np.asarray(other), rtol=1e-9, atol=1e-12)
