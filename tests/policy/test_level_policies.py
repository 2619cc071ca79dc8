# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.policy.choose import make_policy, resolve_policy
from vllm_flexquant.policy.decision import Decision, StepSignals
from vllm_flexquant.policy.entropy import EntropyPolicy

LEVELS = 101
BITS = [4 + n / 2 for n in range(10)]


def policy(**changes):
    values = {
        "low": 1.0,
        "high": 2.0,
        "hysteresis": 0.0,
        "dwell": 1,
        "aggregate": "mean",
        "quantile": 0.5,
    }
    return EntropyPolicy(levels=LEVELS, **values | changes)


def decide(chosen, entropies, known=None, level=0, held=0, position=None):
    """In NumPy and in torch, which must agree."""
    found = set()
    for make in (np.array, torch.tensor):
        kind = np if make is np.array else torch
        entropy = make(entropies, dtype=kind.float32)
        seen = make([True] * len(entropies) if known is None else known)
        at = make(position or [0] * len(entropies), dtype=kind.int64)
        last = Decision(*(make([n], dtype=kind.int32) for n in (level, held)))
        decision = chosen.decide(StepSignals(entropy, seen, at), last)
        assert decision.level.dtype == kind.int32
        assert decision.level.shape == (1,)
        found.add((decision.level.item(), decision.held.item()))
    [decided] = found
    return decided


@pytest.mark.parametrize(("nats", "level"), [(0.0, 0), (1.0, 0), (1.5, 50), (2.0, 100), (9.0, 100)])
def test_entropy_maps_linearly_to_the_ladder(nats, level):
    assert decide(policy(), [nats], level=7)[0] == level


def test_aggregates():
    batch = [1.0, 1.2, 2.0]
    assert decide(policy(), batch)[0] == 40
    assert decide(policy(aggregate="max"), batch)[0] == 100
    assert decide(policy(aggregate="quantile"), batch)[0] == 20
    assert decide(policy(aggregate="quantile", quantile=0.0), batch, level=5)[0] == 0


@pytest.mark.parametrize("aggregate", ["mean", "quantile", "max"])
def test_rows_never_seen_do_not_count(aggregate):
    chosen = policy(aggregate=aggregate)
    assert decide(chosen, [1.5, 9.0], known=[True, False])[0] == 50
    assert decide(chosen, [9.0, 9.0], known=[False, False], level=33)[0] == 33


@pytest.mark.parametrize("aggregate", ["mean", "max"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_without_a_usable_entropy_asks_for_the_best_level(aggregate, bad):
    assert decide(policy(aggregate=aggregate), [bad, 0.0, 0.0])[0] == LEVELS - 1


def test_hysteresis_and_dwell_hold_the_level():
    slow = policy(hysteresis=0.1)
    assert decide(slow, [1.55], level=50)[0] == 50
    assert decide(slow, [1.65], level=50)[0] == 65
    assert decide(slow, [2.0], level=95)[0] == 100  # an end is always reached
    patient = policy(dwell=3)
    assert decide(patient, [2.0], level=0, held=1) == (0, 2)
    assert decide(patient, [2.0], level=0, held=2) == (100, 0)


@given(
    st.lists(st.floats(0, 12), min_size=1, max_size=8),
    st.integers(0, LEVELS - 1),
    st.sampled_from(["mean", "quantile", "max"]),
)
def test_level_stays_on_the_ladder_and_follows_the_entropy(entropies, level, aggregate):
    chosen = policy(aggregate=aggregate)
    result, _ = decide(chosen, entropies, level=level)
    assert 0 <= result < LEVELS
    higher, _ = decide(chosen, [e + 0.5 for e in entropies], level=level)
    assert higher >= result


def test_policies_from_options():
    top = make_policy(FlexQuantOptions(policy="static"), BITS)
    assert decide(top, [0.0], level=2)[0] == 9
    assert decide(make_policy(FlexQuantOptions(policy="manual", level=4), BITS), [9.0])[0] == 4
    with pytest.raises(ValueError, match="level 10 is not on the ladder, which has levels 0 to 9"):
        make_policy(FlexQuantOptions(policy="manual", level=10), BITS)


def test_progressive_lowers_the_level_as_the_youngest_answer_grows():
    options = FlexQuantOptions(
        policy="progressive", progressive_full=10, progressive_tokens=100, progressive_bits=4.9
    )
    chosen = make_policy(options, BITS)
    levels = [decide(chosen, [0.0], position=[at], level=3)[0] for at in range(0, 200, 5)]
    assert levels[:3] == [9, 9, 9]
    assert levels == sorted(levels, reverse=True)
    assert levels[-1] == levels[23] == 2  # 5 bits
    assert decide(chosen, [0.0, 0.0], position=[500, 0])[0] == 9


def test_auto_is_the_budget_where_kl_is_known_and_entropy_elsewhere():
    options = FlexQuantOptions()
    assert resolve_policy(options, calibrated=True).policy == "budget"
    assert resolve_policy(options, calibrated=False).policy == "entropy"
    with pytest.raises(ValueError, match=r"needs a calibrated checkpoint.*flexquant quantize"):
        resolve_policy(FlexQuantOptions(policy="budget"), calibrated=False)
