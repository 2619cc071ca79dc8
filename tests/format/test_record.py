# SPDX-License-Identifier: Apache-2.0
import pytest

from vllm_flexquant.format.record import CalibrationRecord, read_calibration


def content(**changes):
    rungs = [
        {"steps": i, "mean_bits": 8.0 - i, "bytes_read": 100 - i, "kl_nats": 0.1, "measured": True}
        for i in range(3)
    ]
    calibration = {
        "text": {"text": "mix", "sha256": "0"},
        "units": [{"layers": ["a.q", "a.k"], "weights": 64, "sensitivity": {"4": [0.1, 0.01]}}],
        "ladder": {
            "search": "greedy",
            "steps": [{"unit": 0, "width": 6}, {"unit": 0, "width": 4}],
            "rungs": rungs,
        },
        "from a later version": 1,
    }
    return {"calibration": calibration | changes}


def test_round_trip():
    record = read_calibration(content())
    assert record.units[0].sensitivity[4] == (0.1, 0.01)
    assert CalibrationRecord.model_validate_json(record.model_dump_json()) == record


def test_a_checkpoint_that_was_not_calibrated_has_none():
    assert read_calibration({"files": {}}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": []}, "names unit 0 of 0"),
        ({"ladder": {"search": "greedy", "steps": [], "rungs": []}}, "one rung per level"),
        ({"units": [{"layers": [], "weights": 64}]}, r"calibration\.units\.0\.layers"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        read_calibration(content(**changes))
