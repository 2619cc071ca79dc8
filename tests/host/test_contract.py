# SPDX-License-Identifier: Apache-2.0
import pytest

from vllm_flexquant.host import contract


class Owner:
    def method(self, value, *, times=1):
        return value * times

    def __call__(self, value):
        return value


@pytest.fixture
def owner():
    return type("Owner", (Owner,), {"method": Owner.method})


def doubling(original):
    return lambda *args, **kwargs: 2 * original(*args, **kwargs)


def test_a_wrap_is_put_in_once_and_listed(owner):
    assert contract.wrap(owner, "method", doubling, why="test", parameters=("value", "times"))
    assert not contract.wrap(owner, "method", doubling, why="test")
    assert owner().method(3) == 6
    assert owner.method.__name__ == "method"
    assert contract.Patch("Owner", "method", "test") in contract.installed()


def test_what_others_put_over_it_stays(owner):
    contract.wrap(owner, "method", doubling, why="test")
    below = owner.method
    owner.method = lambda self, value: 1 + below(self, value)
    assert not contract.wrap(owner, "method", doubling, why="test")
    assert owner().method(3) == 7


def test_a_wrap_of_an_object_changes_no_other(owner):
    one, other = owner(), owner()
    contract.wrap(one, "method", doubling, why="test")
    contract.wrap_call(one, doubling, why="test")
    contract.wrap_call(one, doubling, why="test")
    assert (one.method(3), other.method(3)) == (6, 3)
    assert (one(3), other(3)) == (6, 3)
    assert isinstance(one, owner)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("gone", (), r"vLLM .* has no Owner.gone, which flexquant needs to test; use vLLM 0.31 to"),
        ("method", ("rows",), "Owner.method of vLLM .* takes no rows, which flexquant needs"),
    ],
)
def test_what_is_missing_is_named(owner, name, parameters, message):
    with pytest.raises(contract.ContractError, match=message):
        contract.wrap(owner, name, doubling, why="test", parameters=parameters)


def test_paths_are_followed():
    contract.require(Owner, ["method.__name__"], "test")
    with pytest.raises(contract.ContractError, match=r"has no Owner\.method\.rows"):
        contract.require(Owner, ["method", "method.rows.first"], "test")
