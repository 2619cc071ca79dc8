# SPDX-License-Identifier: Apache-2.0
"""The native form of policy `budget` against the one in arrays, on two states, step by step."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexquant_kernels import load_native, ops
from flexquant_kernels.cpu.decide import NativeSteps
from flexquant_kernels.state import ACCOUNTS, AGGREGATES, FIELDS
from vllm_flexquant.planner.figures import Probe
from vllm_flexquant.planner.native import NativeBudget
from vllm_flexquant.planner.sequences import SequenceEntropy
from vllm_flexquant.planner.state import carried, empty_state, fill, restore
from vllm_flexquant.policy.budget import Budget
from vllm_flexquant.policy.protocol import StepFacts, least_move, write_widths

LEVELS, LAYERS, TOKENS, SLOTS, HIDDEN, PROBE_LAYER = 9, 7, 40, 24, 37, 3
_EXACT = ("decisions", "table", "row_account", "seen", "unknown", "tokens", "bounds", "average")


@pytest.fixture(scope="module", autouse=True)
def native():
    status = load_native()
    if not status.loaded:
        pytest.skip(status.reason)


def make_state(seed, pruned=False, **parameters):
    pick = np.random.default_rng(seed)
    kl = np.sort(pick.exponential(0.05, LEVELS))[::-1].copy()
    cost = np.linspace(0.4, 1, LEVELS)
    weight = torch.from_numpy(pick.standard_normal(HIDDEN).astype(np.float32) / HIDDEN**0.5)
    figures = {
        "kl": kl,
        "cost": cost,
        "early_kl": 0.3 * kl,
        "early_cost": 0.4 * cost,
        "width_kl": np.linspace(0.3, 0.001, 9),
        "need_by_entropy": np.linspace(0.1, 3, 12),
        "need_by_average": np.linspace(0.3, 2, 5),
        "bin_nats": 0.5,
    }
    table = torch.full((LAYERS,), 8, dtype=torch.int32)
    listening = Probe("probe", PROBE_LAYER, weight, -0.3)
    state = empty_state(table, figures, SLOTS, TOKENS, listening)
    rungs = np.sort(pick.integers(2, 9, (LEVELS, LAYERS)), axis=0)
    least = pick.integers(2, 5, (LAYERS, 1)) if pruned else 0
    used = pick.choice(ACCOUNTS, 9, replace=False)
    state.asked[used], state.base_price[used] = pick.exponential(0.05, 9), pick.exponential(30.0, 9)
    given = {"horizon": 200.0, "least_move": 0.0, "dwell": 1, "quantile": 0.5, "by_average": 0}
    fill(state, rungs=rungs, allowed=np.maximum(np.arange(9), np.full((LAYERS, 1), least)))
    fill(
        state,
        average=pick.exponential(2, SLOTS + 1),
        seen=pick.random(SLOTS + 1) < 0.7,
        **given | parameters,
    )
    return state, used


def both_forms(*args, **parameters):
    """The two policies, each with a state of its own, of the same values; and accounts in use."""
    (one, used), (other, _) = (make_state(*args, **parameters) for _ in range(2))
    return [(one, Budget(PROBE_LAYER)), (other, NativeBudget(NativeSteps(other)))], used


def assert_same(one, other):
    for name in (*(field.name for field in FIELDS), "table"):
        got, expected = getattr(other, name), getattr(one, name)
        if name in _EXACT:
            np.testing.assert_array_equal(got, expected, err_msg=name)
        else:
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def facts_of(pick, used):
    n = pick.integers(0, 13)
    order = [pick.permutation(size)[:n] for size in (SLOTS, TOKENS, 13)]
    return np.stack([order[0], order[1], pick.choice(used[:5], n), order[2]])


def facts_and_moments(pick, facts, dtype, bad):
    """What the model does in a step: hidden states of the probe's layer, and entropies."""
    x = torch.from_numpy(2 * pick.standard_normal((TOKENS, 2 * HIDDEN))).to(dtype)[:, :HIDDEN]
    entropy = pick.exponential(2, 13).astype(np.float32)
    if bad:
        entropy[::2] = pick.choice([np.nan, np.inf, -np.inf])
        x[::3] = float(pick.choice([np.nan, np.inf, -np.inf]))
    return x, entropy


def begin(state, policy, facts):
    policy.begin(state, StepFacts(facts, facts.shape[1]))
    if not policy.writes:
        write_widths(state)


def run_step(state, policy, facts, x, entropy, scored):
    state.probes[:] = facts.shape[1] > 0
    begin(state, policy, facts)
    if facts.shape[1]:
        if scored:
            policy.decide(state, x.float().exp()[:, 0].contiguous().numpy())
        else:
            policy.probe(state, x)
        policy.book(state, entropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"aggregate": AGGREGATES.index("max"), "least_move": least_move(0.2, LEVELS), "dwell": 3},
        {"aggregate": AGGREGATES.index("quantile"), "quantile": 0.7, "by_average": 1},
        {"by_average": 1},
        {"pruned": True},
    ],
    ids=str,
)
def test_both_decide_and_book_the_same(parameters, dtype):
    both, used = both_forms(3, **parameters)
    pick = np.random.default_rng(5)
    facts, levels = facts_of(pick, used)[:, :0], set()
    for number in range(200):
        facts = facts_of(pick, used) if number % 3 else facts
        bounds, ceiling = np.sort(pick.integers(2, 9, 2)), pick.integers(0, LEVELS)
        x, entropy = facts_and_moments(pick, facts, dtype, bad=number % 20 == 7)
        for state, policy in both:
            state.bounds[:] = bounds if number % 4 == 0 else (2, 8)
            state.ceiling[:] = ceiling if number % 4 == 1 else LEVELS - 1
            run_step(state, policy, facts, x, entropy, scored=number % 2 == 0)
        levels.add(both[0][0].decisions[1, 0])
        assert_same(*(state for state, _ in both))
    assert len(levels) >= 3


numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)
accounts = st.lists(
    st.tuples(st.integers(-1, 3), numbers, numbers, numbers), min_size=0, max_size=6
)
sums = st.tuples(
    st.floats(0, 100),  # asked
    st.floats(-1, 1),  # balance, of a full bucket
    st.floats(0, 1e300),  # needed
    st.floats(1e-3, 1e6),  # foreseen
)


@given(
    accounts,
    st.lists(sums, min_size=4, max_size=4),
    st.sampled_from(range(len(AGGREGATES))),
    st.floats(0, 1),
    st.integers(2, 8),
    st.integers(0, LEVELS - 1),
    st.sampled_from([0, 1, 2**30 - 1, 2**30]),
)
@settings(deadline=None, max_examples=150)
def test_both_agree_whatever_they_are_given(rows, lines, aggregate, quantile, low, ceiling, held):
    """Also of what is no number, of balances at limits and of counts that would wrap."""
    both, _ = both_forms(1, aggregate=aggregate, quantile=quantile)
    n = len(rows)
    facts = np.array([[i, i + 3, row[0], i] for i, row in enumerate(rows)], dtype=np.int64)
    facts = np.ascontiguousarray(facts.reshape(n, 4).T)
    scores = np.ones(TOKENS, dtype=np.float32)
    entropy = np.zeros(13, dtype=np.float32)
    for state, policy in both:
        for line, values in enumerate(lines):
            for name, value in zip(("asked", "balance", "needed", "foreseen"), values, strict=True):
                getattr(state, name)[line] = value
            state.balance[line] *= state.asked[line] * state.horizon[0]
            state.base_price[line] = 30.0
        state.bounds[:], state.ceiling[:], state.decisions[:, 1] = (low, 8), ceiling, held
        state.probes[:] = n > 0
        for i, (_, average, score, nats) in enumerate(rows):
            state.average[i], state.seen[i] = average, True
            scores[i + 3], entropy[i] = score, nats
        with np.errstate(all="ignore"):
            for _ in range(2):
                begin(state, policy, facts)
                policy.decide(state, scores)
                policy.book(state, entropy)
    one, other = (state for state, _ in both)
    np.testing.assert_array_equal(other.decisions, one.decisions)
    np.testing.assert_array_equal(other.table, one.table)
    assert ((one.decisions[:, 1] >= 0) & (one.decisions[:, 1] <= 2**30)).all()
    assert ((one.decisions[:2, 0] >= 0) & (one.decisions[:2, 0] <= ceiling)).all()
    for name in ("price", "balance", "spent", "tokens", "needed", "foreseen"):
        np.testing.assert_allclose(
            getattr(other, name), getattr(one, name), rtol=1e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("form", range(2), ids=["arrays", "native"])
@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({"aggregate": AGGREGATES.index("max")}, "higher"),
        ({"horizon": 1e6}, "higher"),  # what is left over is then nothing
        ({"dwell": 1000}, "same"),
        ({"least_move": 100.0}, "same"),
        ({"quantile": 1.0, "aggregate": AGGREGATES.index("quantile")}, "higher"),
    ],
    ids=str,
)
def test_parameters_are_data_of_which_the_probe_reads_the_newest(changes, level, form):
    """As a captured graph would: `begin` and `probe` are the same calls, the state has changed."""

    def run(**between):
        state, policy = both_forms(3)[0][form]
        state.decisions[2, 0] = 1
        state.late_kl[:] = 0.17 * np.exp(-0.6 * np.arange(LEVELS))
        state.asked[0], state.base_price[0], state.balance[0] = 0.03, 5.0, 150 * 0.03
        facts = np.array([[0, 1], [0, 1], [0, 0], [0, 1]])
        state.probes[:] = 1
        begin(state, policy, facts)
        fill(state, **between)
        policy.decide(state, np.array([0.3, 6.0] + [1.0] * (TOKENS - 2), dtype=np.float32))
        return int(state.decisions[1, 0])

    plain, found = run(), run(**changes)
    if level == "same":
        assert found == 1 != plain
    else:
        assert found > plain


def test_a_state_goes_on_from_what_was_carried():
    both, used = both_forms(3)
    (one, policy), (other, again) = both
    pick = np.random.default_rng(2)
    for number in range(60):
        facts = facts_of(pick, used)
        x, entropy = facts_and_moments(pick, facts, torch.float32, bad=False)
        run_step(one, policy, facts, x, entropy, scored=False)
        if number < 30:
            restore(other, carried(one))
        else:
            run_step(other, again, facts, x, entropy, scored=False)
            np.testing.assert_array_equal(other.decisions, one.decisions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_are_read_the_same(dtype, monkeypatch):
    pick = np.random.default_rng(2)
    states = [make_state(2)[0] for _ in range(2)]
    kernel = SequenceEntropy(states[1])
    monkeypatch.setattr(ops, "native_status", lambda: ops.NativeStatus(False, "as asked"))
    plain = SequenceEntropy(states[0])
    for number in range(60):
        slots = pick.permutation(SLOTS + 1)[: pick.integers(0, 7)]
        logits = torch.from_numpy(3 * pick.standard_normal((len(slots), 50))).to(dtype)
        if number % 9 == 4:
            logits[:1] = np.nan
        read = [sequences.read(logits, slots, 0.6) for sequences in (plain, kernel)]
        np.testing.assert_array_equal(*read)
        if number % 11 == 3:
            plain.forget([2, 3])
            kernel.forget([2, 3])
        assert_same(*states)
    assert states[0].unknown[0] > 0
