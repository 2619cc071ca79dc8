# SPDX-License-Identifier: Apache-2.0
import pytest

from vllm_flexquant.format.record import CalibrationRecord, read_calibration


def drafts(*levels, **changes):
    """Of levels so many steps down, with changes to the last of them."""
    level = {"kl_nats": 0.1, "mean_greedy": 0.8, "mean_sampled": 0.9}
    level |= {"share": [0.4, 0.6], "greedy": [0.9, 0.7], "sampled": [0.95, 0.8]}
    found = [level | {"steps": steps} for steps in levels]
    found[-1] |= changes
    return {"bin_nats": 0.25, "levels": found}


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
    assert record.drafts is None  # as of a checkpoint from before they were measured
    assert list(record.draft_levels()) == []


def test_levels_of_drafts_are_told_as_the_engine_counts_them():
    record = read_calibration(content(drafts=drafts(1, 2)))
    assert CalibrationRecord.model_validate_json(record.model_dump_json()) == record
    first, second = record.drafts.levels
    assert list(record.draft_levels()) == [(second, 0, 6.0), (first, 1, 7.0)]
    assert first.greedy == (0.9, 0.7)


def test_a_checkpoint_that_was_not_calibrated_has_none():
    assert read_calibration({"files": {}}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": []}, "names unit 0 of 0"),
        ({"ladder": {"search": "greedy", "steps": [], "rungs": []}}, "one rung per level"),
        ({"units": [{"layers": [], "weights": 64}]}, r"calibration\.units\.0\.layers"),
        ({"drafts": drafts(1) | {"bin_nats": 0}}, r"calibration\.drafts\.bin_nats: .*than 0"),
        ({"drafts": drafts(1) | {"levels": []}}, r"calibration\.drafts\.levels: .*at least 1"),
        ({"drafts": drafts(1, 2, steps=-1)}, r"calibration\.drafts\.levels\.1\.steps"),
        (
            {"drafts": drafts(1, 2, mean_greedy=1.1)},
            r"drafts\.levels\.1\.mean_greedy: .*equal to 1",
        ),
        ({"drafts": drafts(1, sampled=[0.5, -0.1])}, r"drafts\.levels\.0\.sampled\.1: "),
        ({"drafts": drafts(1, greedy=[0.5])}, r"drafts\.levels\.0: .*as many bins, not 2, 1 and 2"),
        ({"drafts": drafts(2, 1)}, r"calibration\.drafts: .*must ascend, not be \[2, 1\]"),
        ({"drafts": drafts(1, 3)}, "drafts name a level 3 steps down a ladder of 2"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        read_calibration(content(**changes))
