# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest

from vllm_flexquant.options import CLASSES, RequestClass
from vllm_flexquant.requests import grant as promise
from vllm_flexquant.requests.grant import ClassBook, Promise


def read(**given):
    return Promise.read({f"flexquant_{k}": v for k, v in given.items()}, CLASSES)


def test_a_request_without_wishes():
    assert Promise.read(None, CLASSES) == Promise.read({"other": 1}, CLASSES) == Promise()


def test_wishes_are_read():
    assert read(min_bits=6, budget=1, **{"class": "fast"}) == Promise("fast", 1.0, 6)


@pytest.mark.parametrize("value", [1, 9, "4", 4.0, True, None, [4]])
def test_a_bad_floor_is_refused(value):
    with pytest.raises(ValueError, match=r"flexquant_min_bits is .*; give an integer from 2 to 8"):
        read(min_bits=value)


@pytest.mark.parametrize("value", [0, -0.1, "0.1", True, [1], float("nan"), float("inf")])
def test_a_bad_budget_is_refused(value):
    with pytest.raises(ValueError, match=r"flexquant_budget is .*; give nats per token"):
        read(budget=value)


@pytest.mark.parametrize("value", ["golden", 3, ["fast"]])
def test_an_unknown_class_is_refused_and_the_known_are_named(value):
    with pytest.raises(ValueError, match=r"flexquant_class is .* has exact, balanced, fast"):
        read(**{"class": value})


def test_an_unknown_key_is_refused():
    with pytest.raises(ValueError, match="unknown key 'flexquant_bits'; known are"):
        read(bits=6)


def test_all_bits_are_not_begun_from_what_others_left_in_the_prefix_cache():
    promise.announce(CLASSES)

    def skips(**given):
        extra = {f"flexquant_{k}": v for k, v in given.items()}
        params = SimpleNamespace(extra_args=extra, skip_reading_prefix_cache=None)
        promise.check(params)
        return params.skip_reading_prefix_cache

    assert skips(**{"class": "exact"})
    assert skips(min_bits=8)
    assert skips(min_bits=7) is None
    assert skips() is None


def book(capacity=8, **classes):
    return ClassBook(classes or CLASSES, next(iter(classes), "balanced"), 0.01, capacity)


def test_classes_of_the_operator():
    made = book()
    assert made.budgets == {0: 0.01, 1: 0.01, 2: 0.1}
    assert made.names == {0: "exact", 1: "balanced", 2: "fast"}
    assert made.admit(Promise()) == (1, 2, False)
    assert made.admit(Promise("exact")) == (0, 8, False)
    assert made.admit(Promise("fast", min_bits=4)) == (2, 4, False)
    made.set_default_budget(0.02)
    assert made.budgets == {0: 0.02, 1: 0.02, 2: 0.1}


def test_requests_of_the_same_budget_share_a_number_until_the_last_has_ended():
    made = book()
    number, _, new = made.admit(Promise(budget=0.05))
    assert new
    assert made.admit(Promise(budget=0.05)) == (number, 2, False)
    other, _, _ = made.admit(Promise(budget=0.07))
    assert other != number
    assert made.names[number] == "budget 0.05"
    made.release(number)
    assert number in made.budgets
    made.release(number)
    assert number not in made.budgets
    assert made.admit(Promise(budget=0.2))[0] == number


def test_when_numbers_run_out_a_request_gets_no_less_than_it_asked_for():
    made = book(3, plain=RequestClass(budget=0.05))
    assert {made.admit(Promise(budget=b))[0] for b in (0.01, 0.02)} == {1, 2}
    assert made.admit(Promise(budget=0.04)) == (2, 2, False)
    assert made.admit(Promise(budget=0.001)) == (0, 8, False)
    made.release(2)
    assert 2 in made.budgets  # one of its two users goes on
