# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vllm_flexquant.format import PlaneLayout
from vllm_flexquant.format.record import CalibrationRecord
from vllm_flexquant.planner.ladder import build_ladder, calibrated_ladder
from vllm_flexquant.planner.table import LayerRecord, WeightError


def layer(name, error, rows=16, columns=64, layout="4|2|2"):
    layout = PlaneLayout.parse(layout)
    errors = {w: error * 4.0 ** (8 - w) if w < 8 else 0.0 for w in layout.widths}
    return LayerRecord(
        name,
        rows,
        columns,
        64,
        layout,
        layout.widths,
        "reference",
        "test",
        WeightError(rows * columns, 1.0, errors),
    )


def test_ladder_runs_from_all_lowest_to_all_highest_one_layer_at_a_time():
    layers = [layer("a", 1.0), layer("b", 0.1), layer("c", 3.0, rows=32)]
    ladder = build_ladder(layers)
    assert len(ladder) == 7
    assert ladder.widths[0].tolist() == [4, 4, 4]
    assert ladder.widths[-1].tolist() == [8, 8, 8]
    steps = ladder.widths[1:] - ladder.widths[:-1]
    assert ((steps == 0) | (steps == 2)).all()
    assert (steps.sum(-1) == 2).all()
    assert list(ladder.bytes_read) == sorted(ladder.bytes_read)
    assert list(ladder.mean_bits) == sorted(ladder.mean_bits)
    # the first to be lowered, so the last to rise, is the one whose error grows least
    assert ladder.widths[-2].tolist() == [8, 6, 8]


def test_bytes_read_are_planes_and_scales():
    one = layer("a", 1.0, rows=16, columns=128)
    assert one.bytes_read(4) == 16 * 128 // 2 + 16 * 2 * 4
    assert one.bytes_read(8) - one.bytes_read(4) == 16 * 128 // 2


def test_ranks_with_shards_and_stages_agree_level_by_level():
    first, second = [layer("a", 1.0), layer("b", 0.5)], [layer("c", 0.2), layer("d", 2.0)]
    errors = {record.name: record.error + record.error for record in (*first, *second)}
    ladders = [build_ladder(part, errors) for part in (first, second)]
    both = build_ladder([*first, *second])
    assert len(ladders[0]) == len(ladders[1]) == len(both)
    assert torch.equal(torch.cat([ladder.widths for ladder in ladders], dim=1), both.widths)


def calibration(units, steps):
    count = len(steps) + 1
    return CalibrationRecord.model_validate(
        {
            "text": {"text": "mix"},
            "units": [{"layers": names, "weights": 64} for names in units],
            "ladder": {
                "search": "greedy",
                "steps": [{"unit": u, "width": w} for u, w in steps],
                "rungs": [
                    {
                        "steps": i,
                        "mean_bits": 8,
                        "bytes_read": 1,
                        "kl_nats": i / 10,
                        "measured": True,
                    }
                    for i in range(count)
                ],
            },
        }
    )


FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
STEPS = [(1, 6), (0, 6), (1, 4), (0, 4)]
UNITS = [["m.q_proj", "m.k_proj", "m.v_proj"], ["m.o_proj"]]


def test_calibrated_ladder_follows_the_record_for_fused_layers_too():
    layers = [layer("m.qkv_proj", 1.0), layer("m.o_proj", 9.0)]
    ladder = calibrated_ladder(layers, calibration(UNITS, STEPS), FUSED)
    assert ladder.widths.tolist() == [[4, 4], [6, 4], [6, 6], [8, 6], [8, 8]]
    assert ladder.kl_nats == (0.4, 0.3, 0.2, 0.1, 0.0)
    assert ladder.source == "KL on mix (greedy)"


def test_a_rank_that_lacks_layers_has_the_same_levels():
    record = calibration(UNITS, STEPS)
    ladder = calibrated_ladder([layer("m.o_proj", 1.0)], record, FUSED)
    assert ladder.widths.tolist() == [[4], [4], [6], [6], [8]]


def test_a_record_of_another_model_is_refused():
    record = calibration(UNITS, STEPS)
    with pytest.raises(ValueError, match=r"does not know layer m\.up_proj"):
        calibrated_ladder([layer("m.up_proj", 1.0)], record, FUSED)
    split = calibration([["m.q_proj"], ["m.k_proj", "m.v_proj"]], STEPS)
    with pytest.raises(ValueError, match=r"vLLM fuses m\.q_proj, m\.k_proj, m\.v_proj into"):
        calibrated_ladder([layer("m.qkv_proj", 1.0)], split, FUSED)
