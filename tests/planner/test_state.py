# SPDX-License-Identifier: Apache-2.0
"""The native form of policy `budget` against the one in arrays, step by step."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flexquant_kernels import load_native
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner.figures import Probe
from vllm_flexquant.planner.sequences import SequenceEntropy
from vllm_flexquant.planner.state import ArraySteps, BudgetState, NativeSteps
from vllm_flexquant.planner.table import LevelTable
from vllm_flexquant.policy.budget import CLASSES, NO_PAST, OTHER, BudgetPolicy, Calibrated

LEVELS, LAYERS, TOKENS, SLOTS, HIDDEN, PROBE_LAYER = 9, 7, 40, 24, 37, 3


@pytest.fixture(scope="module", autouse=True)
def native():
    status = load_native()
    if not status.loaded:
        pytest.skip(status.reason)


def make_state(seed, pruned=False):
    pick = np.random.default_rng(seed)
    kl = np.sort(pick.exponential(0.05, LEVELS))[::-1].copy()
    cost = np.linspace(0.4, 1, LEVELS)
    rungs = np.sort(pick.integers(2, 9, (LEVELS, LAYERS)), axis=0).astype(np.int32)
    allowed = np.maximum(np.arange(9), pick.integers(2, 5, (LAYERS, 1))).astype(np.int32)
    ledgers = np.zeros((7, CLASSES))
    used = pick.choice(CLASSES, 9, replace=False)
    ledgers[0, used] = pick.exponential(0.05, 9)
    ledgers[1, used] = pick.exponential(30.0, 9)
    ledgers[5:] = NO_PAST
    sequences = SequenceEntropy(SLOTS, torch.device("cpu"))
    sequences.set(
        np.arange(SLOTS), pick.exponential(2, SLOTS).astype(np.float32), pick.random(SLOTS) < 0.7
    )
    weight = torch.from_numpy(pick.standard_normal(HIDDEN).astype(np.float32) / HIDDEN**0.5)
    state = BudgetState(
        calibrated=Calibrated(
            kl=kl,
            cost=cost,
            early_kl=0.3 * kl,
            early_cost=0.4 * cost,
            width_kl=np.linspace(0.3, 0.001, 9),
            by_entropy=np.linspace(0.1, 3, 12),
            by_average=np.linspace(0.3, 2, 5),
            bin_nats=0.5,
        ),
        listening=Probe("probe", PROBE_LAYER, weight, -0.3),
        sequences=sequences,
        table=LevelTable(rungs, np.full(LAYERS, 8, dtype=np.int32), allowed if pruned else None),
        ledgers=ledgers,
        decisions=np.array([[LEVELS - 1, 0]] * 3, dtype=np.int32),
        row_class=np.full(TOKENS, OTHER),
        scores=np.zeros(TOKENS),
        price=np.array([-1.0]),
        bounds=np.array([2, 8]),
        ceiling=np.array([LEVELS - 1], dtype=np.int32),
        active=np.array([True]),
    )
    return state, used


def policy(state, options):
    return BudgetPolicy(
        calibrated=state.calibrated,
        levels=LEVELS,
        horizon=200,
        hysteresis=options.hysteresis,
        dwell=options.dwell,
        aggregate=options.aggregate,
        quantile=options.quantile,
    )


def facts_of(pick, used):
    n = pick.integers(0, 13)
    order = [pick.permutation(size)[:n] for size in (SLOTS, TOKENS, 13)]
    return np.stack([order[0], order[1], pick.choice(used[:5], n), order[2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aggregate": "max", "hysteresis": 0.2, "dwell": 3},
        {"aggregate": "quantile", "quantile": 0.7, "signal": "both"},
        {"signal": "entropy"},
        {"pruned": True},
    ],
    ids=str,
)
def test_both_decide_and_book_the_same(options, dtype):
    pruned = options.pop("pruned", False) if (options := dict(options)) else False
    options = FlexQuantOptions(**options)
    (one, used), (other, _) = (make_state(3, pruned) for _ in range(2))
    both = ArraySteps(one), NativeSteps(other)
    for steps in both:
        steps.adopt(policy(one, options), options)
    pick = np.random.default_rng(5)
    before, levels = facts_of(pick, used)[:, :0], set()
    for number in range(200):
        facts = facts_of(pick, used) if number % 3 else before
        bounds, ceiling = np.sort(pick.integers(2, 9, 2)), pick.integers(0, LEVELS)
        x = torch.from_numpy(2 * pick.standard_normal((TOKENS, 2 * HIDDEN))).to(dtype)[:, :HIDDEN]
        entropy = pick.exponential(2, 13).astype(np.float32)
        if number % 20 == 7:
            entropy[::2] = pick.choice([np.nan, np.inf, -np.inf])
            x[::3] = float(pick.choice([np.nan, np.inf, -np.inf]))
        for state, steps in zip((one, other), both, strict=True):
            state.bounds[:] = bounds if number % 4 == 0 else (2, 8)
            state.ceiling[:] = ceiling if number % 4 == 1 else LEVELS - 1
            steps.begin(facts, before)
            if facts.shape[1]:
                if number % 2:
                    steps.probe(x)
                else:
                    steps.decide(x.float().exp()[:, 0].contiguous().numpy())
                steps.book(entropy)
        before = facts
        levels.add(one.decisions[1, 0])
        np.testing.assert_array_equal(other.decisions, one.decisions)
        np.testing.assert_array_equal(other.table.written, one.table.written)
        np.testing.assert_array_equal(other.row_class, one.row_class)
        for name in ("ledgers", "scores", "price"):
            got, expected = getattr(other, name), getattr(one, name)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert len(levels) >= 3


def test_what_the_native_form_is_given_is_checked():
    state, _ = make_state(0)
    with pytest.raises(ValueError, match=r"scores is torch.float32 .* give torch.float64"):
        NativeSteps(replace(state, scores=state.scores.astype(np.float32)))
    with pytest.raises(ValueError, match=r"decisions has 4 elements, not 6"):
        NativeSteps(replace(state, decisions=state.decisions[:2]))
    steps = NativeSteps(state)
    with pytest.raises(ValueError, match=r"facts are \(3, 2\): give \[4, n\]"):
        steps.begin(np.zeros((3, 2), dtype=np.int64), np.zeros((4, 0), dtype=np.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_are_read_the_same(dtype):
    pick = np.random.default_rng(2)
    plain, kernel = (SequenceEntropy(6, torch.device("cpu")) for _ in range(2))
    kernel.use_kernels()
    for number in range(60):
        slots = pick.permutation(7)[: pick.integers(0, 7)]
        logits = torch.from_numpy(3 * pick.standard_normal((len(slots), 50))).to(dtype)
        if number % 9 == 4:
            logits[:1] = np.nan
        read = [sequences.read(logits, slots, 0.6) for sequences in (plain, kernel)]
        np.testing.assert_array_equal(*read)
        if number % 11 == 3:
            plain.forget([2, 3])
            kernel.forget([2, 3])
        torch.testing.assert_close(kernel.average, plain.average, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(kernel.seen, plain.seen)
