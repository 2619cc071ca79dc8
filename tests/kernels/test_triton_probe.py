# SPDX-License-Identifier: Apache-2.0
"""The Triton probe against plain torch: interpreted, or on a GPU if there."""

from dataclasses import replace

import pytest
import torch

from flexquant_kernels import reference

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy's, of NaN and infinity
]

LAYERS = 7
KL = [0.5, 0.2, 0.1, 0.02, 0.001]


@pytest.fixture
def state(gpu, device):
    """5 levels of 7 layers, the last 4 of them the probe's; the third runs at 4 or 6 bits only."""
    ladder = torch.tensor([[4] * LAYERS, [6] * LAYERS, [4, 6, 4, 6, 4, 6, 4], [6, 8] * 3 + [8],
                           [8] * LAYERS], dtype=torch.int32)  # fmt: skip
    allowed = torch.tensor([[4] * 5 + [6] * 2 + [8] * 2] * LAYERS, dtype=torch.int32)
    allowed[4, 7:] = 6
    generator = torch.Generator().manual_seed(3)

    def of(values, dtype=torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return gpu.ProbeState(
        weight=(torch.randn(100, generator=generator) * 0.1).to(device),
        bias=of([-0.3], torch.float32),
        kl=of(KL, torch.float32),
        budget=of([0.1], torch.float32),
        bounds=of([2, 8, 1]),
        ladder=ladder.to(device),
        allowed=allowed.to(device),
        table=torch.full((LAYERS + 1,), -7, dtype=torch.int32, device=device),
        first=3,
        aggregate="mean",
        level=of([0]),
        counter=of([0]),
    )


def _x(rows: int, spread: float = 1.0, h: int = 100) -> torch.Tensor:
    return torch.randn(rows, h, generator=torch.Generator().manual_seed(rows)) * spread


def _expected(state, level: int) -> list[int]:
    low, high, _ = state.bounds.tolist()
    rung = state.ladder[level].tolist()
    later = [
        int(state.allowed[i, min(max(rung[i], low), high)]) for i in range(state.first, LAYERS)
    ]
    return [-7] * state.first + later + [-7]


@pytest.mark.parametrize("aggregate", ["mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_plain_torch(gpu, device, state, aggregate, dtype) -> None:
    state = replace(state, aggregate=aggregate)
    for rows, spread in ((1, 0.1), (3, 1.0), (17, 2.0), (70, 3.0)):
        x = _x(rows, spread).to(dtype).to(device)
        live = (torch.arange(rows) % 3 != 1).to(device)
        want = torch.exp(x.double() @ state.weight.double() + state.bias.double())
        whole = want[live].max() if aggregate == "max" else want[live].mean()
        for level, kl in enumerate(KL):
            state.budget.fill_(float(whole) * kl * 1.001)
            scores = gpu.probe(x, live, state)
            torch.testing.assert_close(scores.double(), want, rtol=2e-5, atol=0)
            assert int(state.level) == level
            budget = float(state.budget)
            assert level == reference.probe_level(scores, live, state.kl, budget, aggregate)
            assert state.table.tolist() == _expected(state, level)
            assert int(state.counter) == 0
        state.budget.fill_(float(whole) * KL[-1] * 0.99)
        gpu.probe(x, live, state)
        assert int(state.level) == len(KL) - 1  # none is within the budget


def test_rows_that_do_not_count(gpu, device, state) -> None:
    x = _x(9)
    x[2:] = torch.nan
    live = torch.tensor([True, True] + [False] * 7)
    scores = gpu.probe(x.to(device), live.to(device), state)
    assert scores.isnan().tolist() == [False] * 2 + [True] * 7
    level = reference.probe_level(scores[:2], live[:2], state.kl, 0.1, "mean")
    assert 0 < level < len(KL) - 1
    assert int(state.level) == level
    before = state.table.clone()
    state.budget.fill_(0.0)
    gpu.probe(x.to(device), torch.zeros_like(live).to(device), state)
    assert torch.equal(state.table, before)
    assert int(state.level) == level
    assert reference.probe_level(scores, torch.zeros_like(live), state.kl, 0.1, "mean") is None
    assert gpu.probe(x[:0].to(device), live[:0].to(device), state).shape == (0,)
    assert torch.equal(state.table, before)


@pytest.mark.parametrize("aggregate", ["mean", "max"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_asks_for_the_best(gpu, device, state, aggregate, bad) -> None:
    state = replace(state, aggregate=aggregate)
    state.budget.fill_(1e9)
    x = torch.zeros(4, 100)
    live = torch.ones(4, dtype=torch.bool)
    gpu.probe(x.to(device), live.to(device), state)
    assert int(state.level) == 0
    x[1, int(state.weight.abs().argmax())] = bad * float(state.weight[state.weight.abs().argmax()])
    scores = gpu.probe(x.to(device), live.to(device), state).cpu()
    assert int(state.level) == len(KL) - 1
    assert reference.probe_level(scores, live, state.kl.cpu(), 1e9, aggregate) == len(KL) - 1


def test_bounds_of_the_decision_hold(gpu, device, state) -> None:
    x, live = _x(3).to(device), torch.ones(3, dtype=torch.bool, device=device)
    state.budget.fill_(0.0)
    for bounds in ([4, 6, 1], [8, 8, 1], [2, 4, 1]):
        state.bounds.copy_(torch.tensor(bounds))
        gpu.probe(x, live, state)
        assert state.table.tolist() == _expected(state, len(KL) - 1)
    before = state.table.clone()
    state.bounds.copy_(torch.tensor([8, 8, 0]))
    gpu.probe(x, live, state)
    assert torch.equal(state.table, before)


def test_many_rows_and_strides(gpu, device, state) -> None:
    wide = _x(1200, 1.0, 130).to(device)
    live = torch.ones(1200, dtype=torch.bool, device=device)
    scores = gpu.probe(wide[:, :100], live, state)
    level = int(state.level)
    assert level == reference.probe_level(scores, live, state.kl, float(state.budget), "mean")
    back = torch.arange(1199, -1, -1)
    again = gpu.probe(wide[back, :100].contiguous(), live, state)
    assert torch.equal(again[back], scores)
    assert int(state.level) == level
    state = replace(state, weight=torch.ones(2100, device=device) / 2100)
    long = gpu.probe(torch.full((1, 2100), 2.0, device=device), live[:1], state)
    torch.testing.assert_close(long.cpu(), torch.tensor([1.7]).exp())


def test_hidden_states_at_odd_addresses(gpu, device, state) -> None:
    live = torch.ones(3, dtype=torch.bool, device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = _x(3).to(dtype).to(device)
        want = gpu.probe(x, live, state)
        for by in (1, 3):
            moved = x.new_empty(x.numel() + by)[by:].view(x.shape).copy_(x)
            assert torch.equal(gpu.probe(moved, live, state), want)


def test_no_hidden_units_leave_the_bias(gpu, device, state) -> None:
    state = replace(state, weight=state.weight[:0])
    live = torch.ones(2, dtype=torch.bool, device=device)
    scores = gpu.probe(torch.zeros(2, 0, device=device), live, state)
    torch.testing.assert_close(scores, state.bias.exp().expand(2))


def test_bad_inputs_say_what_to_do(gpu, device, state) -> None:
    x, live = _x(3).to(device), torch.ones(3, dtype=torch.bool, device=device)

    def refused(words: str, x: torch.Tensor = x, live: torch.Tensor = live) -> None:
        with pytest.raises(ValueError, match=words):
            gpu.probe(x, live, state)

    refused(r"x is torch.float64 .* give float32, bfloat16 or float16 \[rows, 100\]", x.double())
    refused(r"x is torch.float32 \(3, 99\)", x[:, :99])
    refused(r"x has strides \(1, 3\): pass x.contiguous", x.T.contiguous().T)
    refused("x is on meta but the table on", x.to("meta"))
    refused(r"live is torch.int32 .* give a contiguous torch.bool \[3\]", live=live.int())
    refused(r"live is .*strides \(2,\): give a contiguous", live=live.repeat(2)[::2])
    refused(r"live is torch.bool \(2,\).* give .*\[3\]", live=live[:2])
    refused("live is on meta but must be on", live=live.to("meta"))
    for words, changes in (
        ("kl is torch.float64", {"kl": state.kl.double()}),
        ("ladder is .* give .*\\[5, 7\\]", {"ladder": state.ladder[:4]}),
        (r"weight is .*strides \(2,\): give a contiguous", {"weight": state.weight[::2]}),
        ("first is 8 of 7 layers: give 0 to 7", {"first": 8}),
        ("aggregate is 'median'", {"aggregate": "median"}),
        ("kl has no level", {"kl": state.kl[:0]}),
        ("bias is on meta but must be on", {"bias": state.bias.to("meta")}),
    ):
        with pytest.raises(ValueError, match=words):
            replace(state, **changes)
