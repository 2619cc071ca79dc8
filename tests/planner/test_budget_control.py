# SPDX-License-Identifier: Apache-2.0
"""Policy `budget` in a controller, with layers that are only described."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_flexquant.format.record import (
    CalibrationRecord,
    LadderRecord,
    NeedRecord,
    ProbeRecord,
    RungRecord,
    StepRecord,
    UnitRecord,
)
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner import probe_op as probe
from vllm_flexquant.planner.planner import Controller
from vllm_flexquant.planner.step import Batch
from vllm_flexquant.planner.table import LayerRecord, WeightError

pytestmark = pytest.mark.usefixtures("machinery")

LAYERS, PROBE_LAYER, HIDDEN = 6, 2, 4
BEST = 0.00165
"""KL at all bits."""

NAMES = [f"model.layers.{i}.o_proj" for i in range(LAYERS)]


def kl_of(unit, width):
    """Nats that a layer costs at a width."""
    return {4: 0.01, 6: 0.0008, 8: 0.00005}[width] * (3 + unit)


def record(with_probe=True):
    steps = [StepRecord(unit=u, width=w) for w in (6, 4) for u in range(LAYERS)]
    widths = [8] * LAYERS
    rungs = []
    for n in range(len(steps) + 1):
        if n:
            widths[steps[n - 1].unit] = steps[n - 1].width
        rungs.append(
            RungRecord(
                steps=n,
                mean_bits=sum(widths) / LAYERS,
                bytes_read=sum(widths) * 1000,
                kl_nats=sum(map(kl_of, range(LAYERS), widths)),
                measured=True,
            )
        )
    return CalibrationRecord(
        units=[
            UnitRecord(
                layers=(name,),
                weights=2048,
                sensitivity={w: (kl_of(i, w), 0.0) for w in (4, 6, 8)},
            )
            for i, name in enumerate(NAMES)
        ],
        uniform_kl={w: (sum(kl_of(i, w) for i in range(LAYERS)), 0.0) for w in (4, 6, 8)},
        ladder=LadderRecord(search="greedy", steps=steps, rungs=rungs),
        probe=ProbeRecord(
            layer=NAMES[PROBE_LAYER],
            weight=(1.0, 0.0, 0.0, 0.0),
            bias=0.0,
            levels=(0, 1),
            relative_kl=0.7,
            correlation=0.4,
        )
        if with_probe
        else None,
        need=NeedRecord(bin_nats=1.0, by_entropy=(0.2, 1.0, 2.0), by_average=(0.5, 1.0, 1.5)),
    )


def controller(calibration=None, layers=range(LAYERS), **options):
    made = Controller(
        FlexQuantOptions(**{"hysteresis": 0.0, "budget": 0.03, "up_for_free": False} | options)
    )
    made.allocate(torch.device("cpu"), slots=8, tokens=16)
    for i in layers:
        index, _ = made.table.reserve()
        layout = made.options.layout
        made.table.describe(
            index,
            LayerRecord(
                NAMES[i], 32, 64, 64, layout, layout.widths, "any", "test", WeightError(1, 1, {})
            ),
        )
    made.start(calibration=calibration or record())
    return made


def batch(ids, prompt=None, rows=None):
    n = len(ids)
    slots = [ord(i) - ord("a") for i in ids]
    prompt = prompt or [False] * n
    return Batch(list(ids), slots, prompt, prompt, rows or list(range(n)), [0] * n)


def step(made, ids="a", logs=None, entropy=1.5, **changes):
    """One step; `logs` are the logarithms of the scores of the rows that the probe sees."""
    made.before_forward(batch(ids, **changes))
    before = made.table.widths.tolist()
    logs = [0.0] * len(ids) if logs is None else logs
    made.probe(torch.tensor([[v, 9.0, 9.0, 9.0] for v in logs]))
    after = made.table.widths.tolist()
    temperature = torch.full((len(ids), 1), entropy)
    made.after_logits(torch.linspace(0, 8, 50) / temperature)
    return before, after


def budget(made, name="balanced"):
    return made.status()["budget"]["classes"][name]


def test_it_is_the_default_of_a_calibrated_checkpoint():
    made = controller()
    assert made.options.policy == "budget"
    assert made.status()["budget"]["probe"] == NAMES[PROBE_LAYER]


def test_the_probe_decides_the_layers_after_it_in_the_same_step():
    made = controller()
    start, calm = step(made, logs=[-2.0])
    _, hard = step(made, logs=[2.0])
    assert start[:PROBE_LAYER] == calm[:PROBE_LAYER]
    assert sum(calm[PROBE_LAYER:]) < sum(start[PROBE_LAYER:]) < sum(hard[PROBE_LAYER:])


def test_padding_and_prompt_rows_have_no_say():
    made = controller(prefill="policy")
    _, alone = step(made, "a", logs=[0.0])
    _, padded = step(made, "a", logs=[0.0, 9.0, 9.0])
    assert padded == alone
    _, mixed = step(made, "ab", logs=[9.0, 9.0, 0.0], prompt=[True, False], rows=[1, 2])
    assert mixed == alone


def test_steps_with_prompt_tokens_run_at_all_bits_and_are_booked_as_that():
    made = controller()
    _, widths = step(made, "ab", prompt=[False, True])
    assert widths == [8] * LAYERS
    assert budget(made)["tokens"] == 1
    assert budget(made)["booked_nats"] == pytest.approx(BEST)
    assert step(made, "a", prompt=[True])[1] == [8] * LAYERS


def test_a_class_keeps_its_own_account():
    made = controller()
    made.admit(0, {"flexquant_class": "fast"})
    made.admit(1, {"flexquant_budget": 0.005})
    _, fast = step(made, "a")
    _, both = step(made, "ab")
    _, strict = step(made, "b")
    assert sum(fast) < sum(both) == sum(strict)
    assert budget(made, "fast")["tokens"] == 2
    assert budget(made, "budget 0.005")["tokens"] == 2
    assert budget(made)["tokens"] == 0
    made.admit(1, None)
    assert "budget 0.005" not in made.status()["budget"]["classes"]


def test_an_exact_request_has_the_whole_step_at_all_bits():
    made = controller()
    made.admit(0, {"flexquant_class": "fast"})
    made.admit(1, {"flexquant_class": "exact"})
    assert step(made, "ab", logs=[-3.0, -3.0]) == ([8] * LAYERS, [8] * LAYERS)
    assert budget(made, "fast")["booked_nats"] == pytest.approx(BEST * np.exp(-3))
    assert sum(step(made, "a")[1]) < 8 * LAYERS


def test_what_is_spent_meets_what_is_asked_and_a_new_budget_is_a_new_account():
    made = controller(budget=0.03)
    pick = np.random.default_rng(0)
    for log in 0.5 * pick.standard_normal(3000) - 0.125:
        step(made, logs=[log])
    assert budget(made)["booked_nats"] == pytest.approx(0.0285, rel=0.08)
    made.update({"budget": 0.1})
    assert budget(made)["tokens"] == 0
    assert budget(made)["asked_nats"] == 0.1
    assert budget(made, "fast")["asked_nats"] == 0.1


def test_signals():
    none, entropy = (controller(signal=s, budget=0.08) for s in ("none", "entropy"))
    for made in (none, entropy):
        before, after = step(made, logs=[3.0], entropy=0.1)
        assert before == after  # the probe is not asked
    assert sum(step(entropy, entropy=0.1)[1]) < sum(step(none, entropy=0.1)[1])
    both = controller(signal="both")
    step(both, entropy=0.1)
    before, after = step(both, logs=[3.0])
    assert before[:PROBE_LAYER] == after[:PROBE_LAYER]
    assert sum(after) > sum(before)


def test_a_hidden_state_that_is_no_number_asks_for_all_bits():
    made = controller()
    _, widths = step(made, logs=[float("nan")])
    assert widths[PROBE_LAYER:] == [8] * (LAYERS - PROBE_LAYER)
    for _ in range(1000):
        step(made)
    before = budget(made)
    for _ in range(1000):
        step(made)
    after = budget(made)
    booked = [account["booked_nats"] * account["tokens"] for account in (before, after)]
    assert (booked[1] - booked[0]) / 1000 == pytest.approx(0.0285, rel=0.05)


def test_a_stage_without_the_probe_decides_before_the_step():
    made = controller(layers=range(PROBE_LAYER + 1, LAYERS))
    before, after = step(made, logs=[3.0])
    assert before == after
    assert made.status()["budget"]["probe"] is None
    assert budget(made)["tokens"] == 1


def test_bounds_and_pins_hold_under_the_budget():
    made = controller(min_bits=6)
    assert min(step(made, logs=[-9.0])[1]) == 6
    made.update({"width": 4})
    assert step(made, logs=[9.0])[1] == [4] * LAYERS  # the probe has no say
    made.update({"policy": "budget", "min_bits": 2, "max_bits": 6})
    assert max(step(made, logs=[9.0])[1]) == 6


def test_an_uncalibrated_checkpoint_refuses_a_budget():
    made = Controller(FlexQuantOptions(policy="budget"))
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

    made = controller()
    layer = torch.nn.Module()
    method = type("Method", (FlexLinearMethod,), {"create_weights": None})
    layer.quant_method = method.__new__(method)
    layer.quant_method.index, layer.quant_method.prefix = PROBE_LAYER, NAMES[PROBE_LAYER]
    worker = FlexWorkerMixin()
    worker.vllm_config = SimpleNamespace(quant_config=SimpleNamespace(controller=made))
    worker.model_runner = SimpleNamespace(model=torch.nn.ModuleList([layer]))
    layer.flexquant_columns = HIDDEN
    worker._install_probe()
    assert layer.quant_method.probes
    layer.flexquant_columns = HIDDEN + 1
    with pytest.raises(ValueError, match=r"flexquant.json reads 4 numbers, but .* given 5"):
        worker._install_probe()


def test_a_trace_tells_levels_and_scores():
    made = controller(trace_steps=4)
    step(made, "ab", logs=[0.0, 1.0])
    [record] = made.trace()
    assert record["scores"] == pytest.approx([1.0, np.exp(1.0)])
    assert record["level"] != record["first_level"]
    assert record["widths"] == made.table.widths.tolist()


def test_the_operator_calls_the_controller_and_leaves_its_argument_alone():
    made = controller()
    probe.connect(made)
    x = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    made.before_forward(batch("a"))
    before = made.table.widths.tolist()
    torch.ops.flexquant.probe(x)
    assert x.tolist() == [[2.0, 0.0, 0.0, 0.0]]
    assert made.table.widths.tolist() != before
    torch.library.opcheck(torch.ops.flexquant.probe.default, (x,))


def test_compiled_code_keeps_the_probe_before_the_layers_that_it_decides():
    made = controller()
    probe.connect(made)
    width = made.table.tensor[LAYERS - 1 : LAYERS]
    weights = [torch.zeros(8, 64 * b // 8, dtype=torch.uint8) for b in (4, 2, 2)]
    for plane in weights:
        plane.random_(0, 256)
    scales = torch.ones(8, 1, 3, 2, dtype=torch.float16)

    def layer(x):
        torch.ops.flexquant.probe(x)
        y = torch.nn.functional.pad(x, (0, 60))
        return torch.ops.flexquant.linear(y, weights, scales, width, None, (4, 2, 2), 64, 8, 0)

    compiled = torch.compile(layer, fullgraph=True)
    for log in (-3.0, 3.0, 0.0):
        x = torch.tensor([[log, 1.0, 1.0, 1.0]])
        made.before_forward(batch("a"))
        expected = layer(x)
        made.table.widths.fill_(4 if log > 0 else 8)  # what is not rewritten shows
        made.budget.later.level[:] = 0
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize(
    "options", [{}, {"signal": "both"}, {"signal": "none"}, {"policy": "entropy"}]
)
def test_on_tensors_as_on_a_gpu_the_same_is_decided(options, monkeypatch):
    """What a GPU runs, on the CPU's tensors: in torch, without NumPy's views of them."""
    pick = np.random.default_rng(1)
    steps = [
        (sorted(pick.choice(list("abcd"), size=n, replace=False)), 0.6 * pick.standard_normal(n))
        for n in pick.integers(1, 5, size=60)
    ]

    def run():
        made = controller(entropy_low=2.0, entropy_high=3.5, **options)
        made.admit(2, {"flexquant_class": "fast"})
        widths = [
            step(made, ids, logs=logs.tolist(), entropy=float(1 + logs[0])) for ids, logs in steps
        ]
        accounts = made.status()["budget"]["classes"]
        return widths, {name: account["booked_nats"] for name, account in accounts.items()}

    own, booked = run()
    for module in ("budget_control", "state", "planner", "sequences"):
        monkeypatch.setattr(f"vllm_flexquant.planner.{module}.view", lambda tensor: tensor)
    on_tensors, booked_on_tensors = run()
    assert on_tensors == own
    assert booked_on_tensors == pytest.approx(booked)
    assert len({tuple(after) for _, after in own}) >= 2
