# SPDX-License-Identifier: Apache-2.0
"""What a request asks for, and what it gets."""

import math
import pickle
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexquant_kernels.state import ACCOUNTS
from vllm_flexquant.format import PlaneLayout
from vllm_flexquant.options import CLASSES, XARGS, FlexQuantOptions, RequestClass
from vllm_flexquant.requests.accounts import (
    FIRST_OWN,
    GRID,
    LOWEST_BUDGET,
    OWN,
    asked,
    class_accounts,
    label,
    own_account,
)
from vllm_flexquant.requests.grant import Grant, Kept, Terms

KEPT = Kept(0.0016)
NONE = Kept(None, "this server keeps none under policy entropy")


def terms(kept=KEPT, **options):
    made = FlexQuantOptions(**options)
    return Terms.of(made, made.layout.widths, kept)


TERMS = terms()


def grant(made=TERMS, **given):
    return made.grant({f"flexquant_{k}": v for k, v in given.items()})


def test_a_request_without_wishes():
    plain = Grant(class_accounts(CLASSES)["balanced"], 0, skip_cache=False)
    assert TERMS.grant(None) == TERMS.grant({}) == TERMS.grant({"other": 1}) == plain


def test_wishes_are_read():
    assert grant(min_bits=6) == Grant(1, 6, skip_cache=False)
    assert grant(**{"class": "fast"}) == Grant(2, 0, skip_cache=False)
    assert grant(**{"class": "exact"}) == Grant(0, 8, skip_cache=True)
    assert grant(min_bits=6, budget=1, **{"class": "fast"}) == Grant(own_account(1.0), 6, False)


@contextmanager
def refused(message):
    with pytest.raises(ValueError, match=message) as error:
        yield
    assert len(str(error.value)) < 300


def ascii_short(value):
    return ascii(value)[:20]


HUGE = 10**400
LONG = "x" * 100_000
NO_NUMBERS = (True, False, None, [4], {}, "4", LONG, [LONG], b"4", math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("value", [1, 9, 4.0, -1, HUGE, -HUGE, 1e308, *NO_NUMBERS], ids=ascii_short)
def test_a_bad_floor_is_refused(value):
    with refused(r"flexquant_min_bits is .*; give an integer from 2 to 8"):
        grant(min_bits=value)


@pytest.mark.parametrize("value", [0, -0.1, -0.0, HUGE, -HUGE, *NO_NUMBERS], ids=ascii_short)
def test_a_bad_budget_is_refused(value):
    with refused(r"flexquant_budget is .*; give nats per token"):
        grant(budget=value)


@pytest.mark.parametrize("value", ["golden", 3, ["fast"], "", HUGE, *NO_NUMBERS], ids=ascii_short)
def test_an_unknown_class_is_refused_and_the_known_are_named(value):
    with refused(r"flexquant_class is .* has exact, balanced, fast"):
        grant(**{"class": value})


@pytest.mark.parametrize("key", ["bits", "budget ", "", "MIN_BITS", LONG, "\n"], ids=ascii_short)
def test_an_unknown_key_is_refused(key):
    with refused("unknown key 'flexquant_.*'; known are"):
        grant(**{key: 6})


@pytest.mark.parametrize(
    ("made", "given", "floor", "skips"),
    [
        (terms(default_class="exact"), {}, 8, True),
        (terms(), {"min_bits": 7}, 8, True),
        (terms(), {"min_bits": 8}, 8, True),
        (terms(), {"min_bits": 5}, 6, False),
        (terms(), {"min_bits": 4}, 0, False),
        (terms(), {"min_bits": 2}, 0, False),
        (terms(default_class="exact"), {"class": "fast"}, 0, False),
        (terms(default_class="exact"), {"budget": 0.1}, 8, True),
        (terms(classes={"balanced": {"min_bits": 7}}), {}, 8, True),
        (terms(classes={"balanced": {"min_bits": 5}}), {"min_bits": 4}, 6, False),
        (terms(layout=PlaneLayout.parse("2|1|1|2|2")), {"min_bits": 3}, 3, False),
        (Terms.of(FlexQuantOptions(), (4, 6), KEPT), {"class": "exact"}, 6, True),
    ],
)
def test_all_bits_are_not_begun_from_what_others_left_in_the_prefix_cache(
    made, given, floor, skips
):
    found = grant(made, **given)
    assert (found.floor, found.skip_cache) == (floor, skips)


@pytest.mark.parametrize(
    ("made", "given", "message"),
    [
        (terms(), {"budget": 1e-9}, "budget is 1e-09, which cannot be met: .* 0.0016 nats .* give"),
        (terms(), {"budget": 0.00159}, "which cannot be met"),
        (terms(Kept(1e-7)), {"budget": 1e-5}, "the lowest budget that is kept is 0.0001"),
        (terms(NONE), {"budget": 0.05}, "0.05, and this server keeps none under policy entropy"),
        (terms(NONE), {"class": "fast"}, "fast has a budget, and this server keeps none"),
        (terms(request_budget=0.01), {"budget": 0.005}, "allows 0.01 and more .*request_budget"),
        (terms(request_budget="deny"), {"budget": 0.05}, "allows none .*request_budget"),
        (terms(request_floor="deny"), {"min_bits": 4}, "allows none .*request_floor"),
        (terms(request_floor=6), {"min_bits": 7}, "allows at most 6 .*request_floor"),
        (terms(request_classes=("fast",)), {"class": "exact"}, "this server has fast"),
        (terms(request_classes=()), {"class": "balanced"}, "this server has none"),
    ],
)
def test_what_cannot_be_kept_or_is_not_allowed_is_refused(made, given, message):
    with refused(message):
        grant(made, **given)


def test_what_an_operator_limits_is_granted_within_the_limits():
    assert grant(terms(request_floor=6), min_bits=6).floor == 6
    assert grant(terms(request_budget=0.01), budget=0.01).account == own_account(0.01)
    assert grant(terms(request_classes=("fast",)), **{"class": "fast"}).account == 2
    # what the operator's own class has is no wish of the client
    assert grant(terms(request_floor="deny", default_class="exact")).floor == 8
    assert grant(terms(request_classes=())) == TERMS.grant(None)
    assert grant(terms(NONE), **{"class": "exact"}).floor == 8
    assert grant(terms(NONE)) == TERMS.grant(None)


def test_who_cannot_be_understood_gets_all_bits():
    assert TERMS.strictest() == Grant(1, 8, skip_cache=True)
    assert Terms.of(FlexQuantOptions(), (4, 6), KEPT).strictest().floor == 6


def test_accounts_are_those_of_classes_and_a_grid():
    assert class_accounts(CLASSES) == {"exact": 0, "balanced": 1, "fast": 2}
    found = asked(CLASSES, 0.01)
    assert len(found) == ACCOUNTS
    assert found[:4] == [0.01, 0.01, 0.1, 0.0]
    assert found[FIRST_OWN:] == list(GRID)
    assert GRID[0] == LOWEST_BUDGET
    assert GRID[-1] == pytest.approx(10)
    assert [label(CLASSES, n) for n in (0, 2, FIRST_OWN, ACCOUNTS - 1)] == [
        "exact",
        "fast",
        OWN,
        OWN,
    ]
    with pytest.raises(ValueError, match="there are 48 classes; have at most 47"):
        class_accounts({f"c{n}": RequestClass() for n in range(FIRST_OWN + 1)})


@pytest.mark.parametrize("pair", [(0.05000001, 0.05000002), (0.05, 0.0505), (10, 1e308), (7, 7.0)])
def test_requests_of_nearly_the_same_budget_share_an_account(pair):
    one, other = (grant(budget=b).account for b in pair)
    assert one == other


@given(st.floats(LOWEST_BUDGET, 1e308))
def test_an_account_of_the_grid_asks_for_no_more_than_the_request_and_little_less(budget):
    nats = asked(CLASSES, 0.01)[own_account(budget)]
    assert nats <= budget * (1 + 1e-9)
    assert nats >= min(budget, 9.99) / 10 ** (1 / 16) * (1 - 1e-9)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 9)
    | st.floats()
    | st.floats(0, 1)
    | st.text()
    | st.sampled_from(list(CLASSES))
    | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
keys = (
    st.sampled_from(list(XARGS)) | st.text() | st.text().map("flexquant_".__add__) | st.integers()
)


@given(
    st.none() | st.dictionaries(keys, anything, max_size=4),
    st.sampled_from(
        [
            TERMS,
            terms(NONE),
            terms(default_class="exact", request_floor=6, request_budget=0.01),
            terms(layout=PlaneLayout.parse("2|2|4"), request_classes=("fast",)),
            replace(TERMS, widths=(4,)),
        ]
    ),
)
def test_whatever_is_asked_is_granted_within_bounds_or_refused_in_a_short_sentence(given, made):
    refusal = ""
    try:
        found = made.grant(given)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert len(refusal) < 400
        assert refusal.isprintable()
        assert refusal.isascii()
    else:
        assert found.floor in (0, *made.widths)
        assert 0 <= found.account < ACCOUNTS
        assert found.skip_cache == (found.floor == made.widths[-1])


def test_terms_travel_in_an_engines_config():
    for made in (TERMS, terms(NONE, default_class="exact", request_classes=("fast",))):
        again = pickle.loads(pickle.dumps(made))
        assert again == made
        assert again.grant(None) == made.grant(None)
