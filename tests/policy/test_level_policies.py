# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexquant_kernels.state as layout
from flexquant_kernels.state import AGGREGATES
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner.figures import without_calibration
from vllm_flexquant.planner.state import empty_state, fill
from vllm_flexquant.policy.choose import make_policy, parameters, resolve_policy
from vllm_flexquant.policy.entropy import Entropy
from vllm_flexquant.policy.protocol import FIRST, LATER, StepFacts, least_move

LEVELS, SLOTS = 101, 8
BITS = [4 + n / 2 for n in range(10)]


def policy(hysteresis=0.0, aggregate="mean", **changes):
    values = {"entropy_low": 1.0, "entropy_high": 2.0, "dwell": 1, "quantile": 0.5} | changes
    move = least_move(hysteresis, LEVELS)
    return Entropy(), values | {"aggregate": AGGREGATES.index(aggregate), "least_move": move}


def of_options(levels=BITS, **options):
    made = FlexQuantOptions(**options)
    return make_policy(made.policy, 0), parameters(made, levels)


def decide(
    chosen, entropies, known=None, level=0, held=0, position=None, levels=LEVELS, ceiling=None
):
    """In NumPy and in torch, which must agree."""
    made, values = chosen
    found = set()
    for view in (torch.Tensor.numpy, lambda tensor: tensor):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "view", view)
            table = torch.zeros(0, dtype=torch.int32)
            cost = np.linspace(0.5, 1, levels).tolist()
            state = empty_state(table, without_calibration(cost), SLOTS, rows=SLOTS)
        slots = list(range(len(entropies)))
        fill(state, **values, ceiling=levels - 1 if ceiling is None else ceiling)
        state.tensor("average")[slots] = torch.tensor(entropies, dtype=torch.float32)
        seen = [True] * len(slots) if known is None else known
        state.tensor("seen")[slots] = torch.tensor(seen, dtype=torch.bool)
        fill(state, decisions=[[level, held]] * 3)
        facts = view(torch.tensor([slots] * 4, dtype=torch.int64))
        made.begin(state, StepFacts(facts, len(slots), position or [0] * len(slots)))
        assert state.tensor("decisions").dtype == torch.int32
        decisions = state.tensor("decisions").tolist()
        assert decisions[FIRST] == decisions[LATER]
        found.add(tuple(decisions[FIRST]))
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


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_rows_never_seen_do_not_count(aggregate):
    chosen = policy(aggregate=aggregate)
    assert decide(chosen, [1.5, 9.0], known=[True, False])[0] == 50
    assert decide(chosen, [9.0, 9.0], known=[False, False], level=33)[0] == 33
    assert decide(chosen, [], level=33)[0] == 33


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


@pytest.mark.parametrize(
    "chosen",
    [policy(), of_options([4.0] * LEVELS, policy="static")],
    ids=["entropy", "static"],
)
def test_steps_without_a_change_are_counted_up_to_a_limit(chosen):
    """An int32 would wrap after 2**31 of them, and the level be frozen."""
    most = 2**30
    assert decide(chosen, [2.0], level=100, held=most - 1) == (100, most)
    assert decide(chosen, [2.0], level=100, held=most) == (100, most)
    assert decide(chosen, [2.0], level=3, held=most) == (100, 0)


@given(
    st.lists(st.floats(0, 12), min_size=1, max_size=8),
    st.integers(0, LEVELS - 1),
    st.sampled_from(AGGREGATES),
)
def test_level_stays_on_the_ladder_and_follows_the_entropy(entropies, level, aggregate):
    chosen = policy(aggregate=aggregate)
    result, _ = decide(chosen, entropies, level=level)
    assert 0 <= result < LEVELS
    higher, _ = decide(chosen, [e + 0.5 for e in entropies], level=level)
    assert higher >= result


@pytest.mark.parametrize(
    ("chosen", "level"),
    [
        (policy(), 30),
        (of_options([4.0] * LEVELS, policy="static"), 30),
        (of_options([4.0] * LEVELS, policy="progressive"), 30),
        (of_options([4.0] * LEVELS, policy="load", target_ms=1), 30),
    ],
    ids=["entropy", "static", "progressive", "load"],
)
def test_nothing_runs_above_the_ceiling(chosen, level):
    assert decide(chosen, [9.0], level=60, ceiling=30)[0] == level
    assert decide(chosen, [9.0], level=60)[0] == LEVELS - 1


def test_policies_from_options():
    top = of_options(policy="static")
    assert decide(top, [0.0], level=2, levels=10)[0] == 9
    assert decide(of_options(policy="manual", level=4), [9.0], levels=10)[0] == 4
    with pytest.raises(ValueError, match="level 10 is not on the ladder, which has levels 0 to 9"):
        of_options(policy="manual", level=10)


def test_progressive_lowers_the_level_as_the_youngest_answer_grows():
    chosen = of_options(
        policy="progressive", progressive_full=10, progressive_tokens=100, progressive_bits=4.9
    )
    levels = [
        decide(chosen, [0.0], position=[at], level=3, levels=10)[0] for at in range(0, 200, 5)
    ]
    assert levels[:3] == [9, 9, 9]
    assert levels == sorted(levels, reverse=True)
    assert levels[-1] == levels[23] == 2  # 5 bits
    assert decide(chosen, [0.0, 0.0], position=[500, 0], levels=10)[0] == 9
    assert decide(chosen, [], level=4, levels=10)[0] == 4


def test_auto_is_the_budget_where_kl_is_known_and_entropy_elsewhere():
    options = FlexQuantOptions()
    assert resolve_policy(options, calibrated=True).policy == "budget"
    assert resolve_policy(options, calibrated=False).policy == "entropy"
    with pytest.raises(ValueError, match=r"needs a calibrated checkpoint.*flexquant quantize"):
        resolve_policy(FlexQuantOptions(policy="budget"), calibrated=False)
