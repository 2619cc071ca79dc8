# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from by_hand import LAYERS, batch, planner, start, telemetry, widths

from flexquant_kernels import reference
from vllm_flexquant.format import PlaneLayout


def step_with_floors(made, ids, floors):
    for slot, bits in enumerate(floors):
        start(made, slot, {"flexquant_min_bits": bits} if bits else None)
    made.step(batch(ids))
    for slot in range(len(floors)):
        made.ended(slot)
        start(made, slot)


def logits(*temperatures):
    """Rows whose entropy grows with the temperature."""
    row = torch.linspace(0, 20, 50)
    return torch.stack([row / t for t in temperatures])


def test_a_pruned_layer_never_runs_above_what_it_has():
    tops = (8, 6, 4, 6, 8)
    made = planner(tops, policy="static")
    assert widths(made) == list(tops)
    for width, expected in ((8, tops), (6, (6, 6, 4, 6, 6)), (4, (4,) * 5)):
        made.change({"width": width})
        assert widths(made) == list(expected)
    made.change({"width": 4})
    step_with_floors(made, "a", [8])
    assert widths(made) == list(tops)
    assert [layer["widths"] for layer in telemetry(made).now()["layers"]][1:3] == [[4, 6], [4]]
    assert len(made.model.ladder) == 1 + 2 + 1 + 0 + 1 + 2


def test_entropy_of_one_step_sets_the_widths_of_the_next():
    made = planner(hysteresis=0.0, entropy_decay=0.0)
    made.step(batch("a", prompt=[True]))
    assert widths(made) == [8] * LAYERS
    rows = logits(1.0)
    made.logits(rows)
    assert widths(made) == [8] * LAYERS  # the running step keeps what it started with
    made.step(batch("a"))
    nats = float(reference.entropy(rows)[0])
    top = len(made.model.ladder) - 1
    options = made.options
    share = (nats - options.entropy_low) / (options.entropy_high - options.entropy_low)
    expected = round(min(max(share, 0), 1) * top)
    assert 0 < expected < top
    assert widths(made) == made.model.ladder.widths[expected].tolist()


def test_prompt_tokens_run_at_all_bits_unless_the_policy_rules_them():
    for prefill, expected in (("full", 8), ("policy", 4)):
        made = planner(prefill=prefill, entropy_decay=0.0)
        made.step(batch("a", prompt=[True]))
        made.logits(torch.tensor([[50.0, 0.0]]))
        made.step(batch("ab", prompt=[False, True]))
        assert widths(made) == [expected] * LAYERS


def test_prompt_chunks_that_are_not_the_last_teach_nothing():
    made = planner()
    made.step(batch("a", prompt=[True], discarded=[True]))
    made.logits(logits(1.0))
    assert not made.state.seen[:8].any()


def test_a_request_that_takes_a_slot_begins_anew_in_it():
    made = planner(entropy_decay=0.9)
    start(made, 0)
    for heat in (9.0, 1.0):
        made.step(batch("a"))
        made.logits(logits(heat))
    kept = float(made.state.average[0])
    made.ended(0)
    start(made, 0)
    made.step(batch("a"))
    made.logits(logits(1.0))
    nats = float(reference.entropy(logits(1.0))[0])
    assert float(made.state.average[0]) == pytest.approx(nats)
    assert nats < kept - 0.1


def test_pins_bounds_and_floors():
    made = planner()
    made.change({"width": 4})
    assert widths(made) == [4] * LAYERS
    step_with_floors(made, "ab", [0, 6])
    assert widths(made) == [6] * LAYERS  # a floor that was promised wins over the pin
    made.step(batch("a"))
    assert widths(made) == [4] * LAYERS
    step_with_floors(made, "a", [5])
    assert widths(made) == [6] * LAYERS  # the next width of the layout
    made.change({"policy": "entropy", "min_bits": 5, "max_bits": 7})
    made.logits(torch.tensor([[50.0, 0.0]]))
    made.step(batch("a"))
    assert widths(made) == [6] * LAYERS


def test_a_refused_change_changes_nothing():
    made = planner()
    before = (made.options, widths(made))
    for bad, message in (
        ({"level": 10_000}, "level 10000 is not on the ladder"),
        ({"width": 5}, "width 5 is not in layout"),
        ({"min_bits": 8, "max_bits": 4}, "min_bits 8 is above max_bits 4"),
        ({"policy": "guess"}, "option 'policy' is 'guess'"),
        ({"policy": "budget"}, "policy budget needs a calibrated checkpoint"),
        ({"policy": "load"}, "policy load has no target"),
        ({"bits": 4}, "unknown option 'bits'; options that can be changed are policy"),
        ({"layout": "2|2|4"}, "option 'layout' cannot be changed while serving; .* are policy"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            made.change(bad)
        assert "\n" not in str(error.value)
    assert (made.options, widths(made)) == before


def test_snapshot_and_records_are_plain_values():
    import json

    made = planner(trace_steps=2)
    told = telemetry(made)
    for slot in range(2):
        start(made, slot)
    for number in range(4):
        made.step(batch("ab", prompt=[number == 0] * 2))
        made.logits(logits(1.0, 3.0))
    snapshot = json.loads(json.dumps(told.now(), allow_nan=False))
    assert snapshot["steps"] == 4
    nats = reference.entropy(logits(1.0, 3.0)).tolist()
    of_request = {entry["request"]: entry["entropy_nats"] for entry in snapshot["requests"]}
    assert of_request == {"a": pytest.approx(nats[0]), "b": pytest.approx(nats[1])}
    assert snapshot["mean_bits"] == sum(widths(made)) / LAYERS
    assert [layer["name"] for layer in snapshot["layers"]] == [f"layer{i}" for i in range(LAYERS)]
    records = json.loads(json.dumps(told.recorder.views(), allow_nan=False))
    assert [record["step"] for record in records] == [2, 3]
    assert records[1]["widths"] == widths(made)
    assert records[0]["entropy"] == pytest.approx(nats)


def test_snapshots_count_widths_outside_the_layout():
    made = planner()
    before = telemetry(made).now()["clamped_widths"]
    weight = [torch.zeros(1, 32 * bits // 8, dtype=torch.uint8) for bits in (4, 2, 2)]
    scales = torch.ones(1, 1, 3, 2, dtype=torch.float16)
    for width in (4, 5):
        torch.ops.flexquant.linear(
            torch.ones(1, 32), weight, scales, torch.tensor([width], dtype=torch.int32),
            None, (4, 2, 2), 32, 1, 0,
        )  # fmt: skip
    assert telemetry(made).now()["clamped_widths"] == before + 1


def test_table_addresses_never_change():
    made = planner()
    view, address = made.table.tensor[2:3], made.table.tensor.data_ptr()
    made.change({"width": 4})
    made.step(batch("a"))
    assert made.table.tensor.data_ptr() == address
    assert view.item() == 4


@pytest.mark.parametrize("layout", ["2|2|4", "2|1|1|2|2"])
def test_other_layouts(layout):
    made = planner(layout=PlaneLayout.parse(layout))
    made.change({"level": 0})
    assert widths(made) == [2] * LAYERS


def test_a_pinned_table_follows_floors_and_the_operator_and_is_else_left_alone():
    made = planner(policy="static", width=4)
    made.step(batch("a"))
    assert set(widths(made)) == {4}
    version = made.table.tensor._version
    made.step(batch("a"))
    assert made.table.tensor._version == version
    step_with_floors(made, "ab", [0, 6])
    assert set(widths(made)) == {6}
    made.step(batch("a"))
    assert set(widths(made)) == {4}
    made.change({"width": 8})
    made.step(batch("a"))
    assert set(widths(made)) == {8}
    made.change({"policy": "entropy"})
    step_with_floors(made, "ab", [0, 6])
    made.change({"width": 4})
    made.step(batch("a"))
    assert set(widths(made)) == {4}
