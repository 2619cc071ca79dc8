# SPDX-License-Identifier: Apache-2.0
"""Policy `budget` in a planner, with layers that are only described."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from by_hand import (
    BEST,
    CALIBRATED,
    HIDDEN,
    NAMES,
    PROBE_LAYER,
    batch,
    calibrated,
    start,
    step,
    telemetry,
    terms,
    widths,
)

from flexquant_kernels.state import ACCOUNTS
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner import ledger, probe_op
from vllm_flexquant.planner.planner import Planner
from vllm_flexquant.planner.table import LayerRecord, WeightError
from vllm_flexquant.requests.accounts import FIRST_OWN

pytestmark = pytest.mark.usefixtures("machinery")


def budget(made, name="balanced"):
    return telemetry(made).now()["budget"]["classes"][name]


def test_it_is_the_default_of_a_calibrated_checkpoint():
    made = calibrated()
    assert made.options.policy == "budget"
    assert telemetry(made).now()["budget"]["probe"] == NAMES[PROBE_LAYER]


def test_the_probe_decides_the_layers_after_it_in_the_same_step():
    made = calibrated()
    begun, calm = step(made, logs=[-2.0])
    _, hard = step(made, logs=[2.0])
    assert begun[:PROBE_LAYER] == calm[:PROBE_LAYER]
    assert sum(calm[PROBE_LAYER:]) < sum(begun[PROBE_LAYER:]) < sum(hard[PROBE_LAYER:])


def test_padding_and_prompt_rows_have_no_say():
    made = calibrated(prefill="policy")
    _, alone = step(made, "a", logs=[0.0])
    _, padded = step(made, "a", logs=[0.0, 9.0, 9.0])
    assert padded == alone
    _, mixed = step(made, "ab", logs=[9.0, 9.0, 0.0], prompt=[True, False], rows=[1, 2])
    assert mixed == alone


def test_steps_with_prompt_tokens_run_at_all_bits_and_are_booked_as_that():
    made = calibrated()
    _, found = step(made, "ab", prompt=[False, True])
    assert found == [8] * CALIBRATED
    assert budget(made)["tokens"] == 1
    assert budget(made)["booked_nats"] == pytest.approx(BEST)
    assert step(made, "a", prompt=[True])[1] == [8] * CALIBRATED


def test_a_class_keeps_its_own_account():
    made = calibrated()
    start(made, 0, {"flexquant_class": "fast"})
    start(made, 1, {"flexquant_budget": 0.005})
    _, fast = step(made, "a")
    _, both = step(made, "ab")
    _, strict = step(made, "b")
    assert sum(fast) < sum(both) == sum(strict)
    assert budget(made, "fast")["tokens"] == 2
    [own] = telemetry(made).now()["budget"]["own"]
    assert own["tokens"] == 2
    assert 0.0043 < own["asked_nats"] <= 0.005
    assert budget(made)["tokens"] == 0
    made.ended(1)
    start(made, 1)
    step(made, "b")
    assert budget(made)["tokens"] == 1
    assert telemetry(made).now()["budget"]["own"] == [own]  # the account outlives its requests


def test_an_exact_request_has_the_whole_step_at_all_bits():
    made = calibrated()
    start(made, 0, {"flexquant_class": "fast"})
    start(made, 1, {"flexquant_class": "exact"})
    assert step(made, "ab", logs=[-3.0, -3.0]) == ([8] * CALIBRATED, [8] * CALIBRATED)
    assert budget(made, "fast")["booked_nats"] == pytest.approx(BEST * np.exp(-3))
    assert sum(step(made, "a")[1]) < 8 * CALIBRATED


def test_what_is_spent_meets_what_is_asked_and_a_new_budget_is_a_new_account():
    made = calibrated(budget=0.03)
    pick = np.random.default_rng(0)
    for log in 0.5 * pick.standard_normal(3000) - 0.125:
        step(made, logs=[log])
    assert budget(made)["booked_nats"] == pytest.approx(0.0285, rel=0.08)
    made.change({"budget": 0.1})
    assert budget(made)["tokens"] == 0
    assert budget(made)["asked_nats"] == 0.1
    assert budget(made)["balance_nats"] == 0
    assert budget(made, "fast")["asked_nats"] == 0.1
    assert telemetry(made).now()["accounts"]["balanced"]["counters"]["tokens"] == 3000


@pytest.mark.parametrize("kind", [{"flexquant_budget": 0.05}, {"flexquant_class": "half"}])
def test_requests_one_after_another_keep_the_budget_that_each_asks_for(kind):
    """Of text that needs e^1.5 of the average: what is owed outlives a request."""
    made = calibrated(classes={"balanced": {}, "half": {"budget": 0.05}})
    before, found = telemetry(made).now(), []
    for _ in range(100):
        start(made, 0, kind)
        for _ in range(20):
            step(made, logs=[1.5])
        made.ended(0)
        found.append(telemetry(made).now()["accounts"])
    label = "half" if "flexquant_class" in kind else "own"
    counters = [accounts[label]["counters"] for accounts in (before["accounts"], *found)]
    assert [c["tokens"] for c in counters] == [20 * n for n in range(101)]
    nats = [c["booked_nats"] for c in counters]
    assert nats == sorted(nats)
    assert nats[-1] / 2000 == pytest.approx(0.05, rel=0.15)


def test_every_budget_of_a_client_has_an_account_that_is_no_operators():
    made = calibrated(budget=0.2)
    for nats in np.geomspace(0.002, 20, 200):
        start(made, 0, {"flexquant_budget": float(nats)})
        step(made)
        made.ended(0)
    classes = {name: budget(made, name)["tokens"] for name in ("exact", "balanced", "fast")}
    start(made, 0, {"flexquant_budget": 0.5})
    account = made.grants[0].account
    before = float(made.state.tokens[account])
    step(made)
    assert made.state.tokens[account] == before + 1
    assert 0.5 / 10 ** (1 / 16) < made.state.asked[account] <= 0.5
    assert account >= FIRST_OWN
    assert classes == {"exact": 0, "balanced": 0, "fast": 0}
    assert {n: budget(made, n)["tokens"] for n in classes} == classes


def test_budgets_of_clients_take_no_room_and_no_time(monkeypatch, caplog):
    """Ten thousand of them leave the tables as ten did, and no price is computed for one."""
    made = calibrated()
    told, calls = telemetry(made), []
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    for name in ("price_of", "price_curve"):
        plain = getattr(ledger, name)
        counted = lambda *args, plain=plain: calls.append(args) or plain(*args)  # noqa: E731
        monkeypatch.setattr(ledger, name, counted)

    def serve(budgets):
        for nats in budgets:
            start(made, 0, {"flexquant_budget": float(nats)})
            step(made)
            made.ended(0)

    def room():
        snapshot = told.now()
        return {
            "labels": sorted(snapshot["accounts"]),
            "own": len(snapshot["budget"]["own"]) <= ACCOUNTS - FIRST_OWN,
            "state": len(made.state.buffer),
            "grants": len(made.grants),
            "sums": len(told.sums._bits_of),
            "classes": len(snapshot["budget"]["classes"]),
            "records": len(caplog.records),
        }

    serve(np.geomspace(0.002, 50, 10))
    after_ten = room()
    serve(np.geomspace(0.002, 50, 10_000))
    assert room() == after_ten
    assert after_ten["labels"] == ["balanced", "exact", "fast", "own"]
    assert after_ten["grants"] == after_ten["records"] == 0
    assert calls == []
    made.change({"budget": 0.05})
    assert calls  # by the operator's change they are, so this test can fail


def test_signals():
    none, entropy = (calibrated(signal=s, budget=0.08) for s in ("none", "entropy"))
    for made in (none, entropy):
        before, after = step(made, logs=[3.0], entropy=0.1)
        assert before == after  # the probe is not asked
    assert sum(step(entropy, entropy=0.1)[1]) < sum(step(none, entropy=0.1)[1])
    both = calibrated(signal="both")
    step(both, entropy=0.1)
    before, after = step(both, logs=[3.0])
    assert before[:PROBE_LAYER] == after[:PROBE_LAYER]
    assert sum(after) > sum(before)


def test_a_hidden_state_that_is_no_number_asks_for_all_bits():
    made = calibrated()
    _, found = step(made, logs=[float("nan")])
    assert found[PROBE_LAYER:] == [8] * (CALIBRATED - PROBE_LAYER)
    for _ in range(1000):
        step(made)
    before = budget(made)
    for _ in range(1000):
        step(made)
    after = budget(made)
    booked = [account["booked_nats"] * account["tokens"] for account in (before, after)]
    assert (booked[1] - booked[0]) / 1000 == pytest.approx(0.0285, rel=0.05)


def test_a_stage_without_the_probe_decides_before_the_step():
    made = calibrated(layers=range(PROBE_LAYER + 1, CALIBRATED))
    before, after = step(made, logs=[3.0])
    assert before == after
    assert telemetry(made).now()["budget"]["probe"] is None
    assert budget(made)["tokens"] == 1


def test_bounds_and_pins_hold_under_the_budget():
    made = calibrated(min_bits=6)
    assert min(step(made, logs=[-9.0])[1]) == 6
    made.change({"width": 4})
    assert step(made, logs=[9.0])[1] == [4] * CALIBRATED  # the probe has no say
    made.change({"policy": "budget", "min_bits": 2, "max_bits": 6})
    assert max(step(made, logs=[9.0])[1]) == 6


def test_what_the_policy_goes_by_is_changed_while_it_runs():
    made = calibrated()
    mean, _ = step(made, "ab", logs=[-2.0, 2.0]), made.change({"aggregate": "max"})
    most = step(made, "ab", logs=[-2.0, 2.0])
    assert sum(mean[1]) < sum(most[1])
    made.change({"aggregate": "mean", "dwell": 1000})
    assert step(made, "ab", logs=[-3.0, -3.0])[1][PROBE_LAYER:] == most[1][PROBE_LAYER:]


def test_an_uncalibrated_checkpoint_refuses_a_budget():
    options = FlexQuantOptions(policy="budget")
    made = Planner(options, terms(options))
    made.allocate(torch.device("cpu"), slots=2)
    index, _ = made.table.reserve()
    layout = made.options.layout
    error = WeightError(1, 1, {4: 2.0, 6: 1.0, 8: 0.0})
    made.table.describe(
        index, LayerRecord("a", 32, 64, 64, layout, layout.widths, "any", "test", error)
    )
    with pytest.raises(ValueError, match=r"needs a calibrated checkpoint.*flexquant quantize"):
        made.start()


def test_a_probe_that_does_not_fit_the_model_is_refused():
    from vllm_flexquant.host.linear import FlexLinearMethod
    from vllm_flexquant.host.worker import FlexWorkerMixin

    made = calibrated()
    layer = torch.nn.Module()
    method = type("Method", (FlexLinearMethod,), {"create_weights": None})
    layer.quant_method = method.__new__(method)
    layer.quant_method.index, layer.quant_method.prefix = PROBE_LAYER, NAMES[PROBE_LAYER]
    worker = FlexWorkerMixin()
    worker.model_runner = SimpleNamespace(model=torch.nn.ModuleList([layer]))
    layer.flexquant_columns = HIDDEN
    worker._install_probe(made)
    assert layer.quant_method.probes
    layer.flexquant_columns = HIDDEN + 1
    with pytest.raises(ValueError, match=r"flexquant.json reads 4 numbers, but .* given 5"):
        worker._install_probe(made)


def test_a_record_tells_levels_and_scores():
    made = calibrated(trace_steps=4)
    told = telemetry(made)
    step(made, "ab", logs=[0.0, 1.0])
    [record] = told.recorder.views()
    assert record["scores"] == pytest.approx([1.0, np.exp(1.0)])
    assert record["level"] != record["first_level"]
    assert record["widths"] == widths(made)


def test_the_operator_calls_the_planner_of_its_table_and_leaves_its_argument_alone():
    made, other = calibrated(), calibrated()
    probe_op.connect(made)
    probe_op.connect(other)
    x, width = torch.tensor([[2.0, 0.0, 0.0, 0.0]]), made.table.tensor[PROBE_LAYER:][:1]
    for planner in (made, other):
        planner.step(batch("a"))
    before = widths(made)
    torch.ops.flexquant.probe(x, width)
    assert x.tolist() == [[2.0, 0.0, 0.0, 0.0]]
    assert widths(made) != before
    assert widths(other) == before
    torch.library.opcheck(torch.ops.flexquant.probe.default, (x, width))


@pytest.mark.parametrize("probed", [True, False])
def test_a_forward_pass_that_no_step_announced_is_not_read(probed):
    """As vLLM runs one for an idle rank: of fewer rows than the step before had."""
    made, hard = calibrated(), torch.full((1, 4), 3.0)
    made.step(batch("abcdefgh"))
    if probed:
        made.probe(torch.zeros(8, 4))
    else:
        made.logits(torch.zeros(8, 30))
    decided, scores = widths(made), made.state.scores.copy()
    made.probe(hard)
    assert widths(made) == decided
    np.testing.assert_array_equal(made.state.scores, scores)
    made.step(batch("a"))
    made.probe(hard)
    assert made.state.scores[0] == pytest.approx(np.exp(3.0))


def test_compiled_code_keeps_the_probe_before_the_layers_that_it_decides():
    made = calibrated()
    probe_op.connect(made)
    width = made.table.tensor[CALIBRATED - 1 : CALIBRATED]
    own = made.table.tensor[PROBE_LAYER : PROBE_LAYER + 1]
    weights = [torch.zeros(8, 64 * b // 8, dtype=torch.uint8) for b in (4, 2, 2)]
    for plane in weights:
        plane.random_(0, 256)
    scales = torch.ones(8, 1, 3, 2, dtype=torch.float16)

    def layer(x):
        torch.ops.flexquant.probe(x, own)
        y = torch.nn.functional.pad(x, (0, 60))
        return torch.ops.flexquant.linear(y, weights, scales, width, None, (4, 2, 2), 64, 8, 0)

    compiled = torch.compile(layer, fullgraph=True)
    for log in (-3.0, 3.0, 0.0):
        x = torch.tensor([[log, 1.0, 1.0, 1.0]])
        made.step(batch("a"))
        expected = layer(x)
        made.step(batch("a"))
        made.table.widths.fill_(4 if log > 0 else 8)  # what is not rewritten shows
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"signal": "both"},
        {"signal": "none"},
        {"policy": "entropy"},
        {"policy": "progressive", "progressive_full": 1, "progressive_tokens": 8},
    ],
    ids=str,
)
def test_on_tensors_as_on_a_gpu_the_same_is_decided(options, monkeypatch):
    """What a GPU runs, on the CPU's tensors: in torch, without NumPy's views of them."""
    pick = np.random.default_rng(1)
    steps = [
        (sorted(pick.choice(list("abcd"), size=n, replace=False)), 0.6 * pick.standard_normal(n))
        for n in pick.integers(1, 5, size=60)
    ]

    def run():
        made = calibrated(entropy_low=2.0, entropy_high=3.5, **options)
        told, on_tensors = telemetry(made), isinstance(made.state.kl, torch.Tensor)
        start(made, 2, {"flexquant_class": "fast"})
        found = [
            step(made, ids, logs.tolist(), entropy=float(1 + logs[0]), positions=n % 9)
            for n, (ids, logs) in enumerate(steps)
        ]
        return on_tensors, found, told.now()

    on_tensors, own, before = run()
    assert not on_tensors
    as_it_is = lambda tensor: tensor  # noqa: E731
    for module in ("policy.arrays", "policy.budget", "planner.planner", "planner.sequences"):
        monkeypatch.setattr(f"vllm_flexquant.{module}.view", as_it_is)
    monkeypatch.setattr("flexquant_kernels.state.view", as_it_is)
    on_tensors, found, after = run()
    assert on_tensors
    assert found == own
    assert after["counters"] == before["counters"]
    assert before["counters"]["decode_steps"] == 60
    for name, account in before["budget"]["classes"].items():
        assert after["budget"]["classes"][name] == pytest.approx(account)
    assert len({tuple(widths) for _, widths in own}) >= 2
