# SPDX-License-Identifier: Apache-2.0
import json
import math
import random
from itertools import accumulate, pairwise
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from benchmarks.quality.sequences import TokenSequence
from benchmarks.serving import replay, replay_trace
from benchmarks.serving.replay_client import (
    Outcome,
    Planned,
    bits_along,
    bits_of,
    series,
    steady_speed,
    summary,
)
from benchmarks.serving.replay_trace import Arrival, Stretch, like_some, read_trace, spread_over

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def trace(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


def test_a_trace_is_read_with_dates_or_seconds(tmp_path):
    dates = HEAD + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    first, second = read_trace(trace(tmp_path, dates))
    assert (first.seconds, first.prompt, first.answer) == (0.0, 374, 44)
    assert second.seconds == pytest.approx(4.314579, abs=1e-6)
    assert read_trace(trace(tmp_path, HEAD + "5,1,2\n7.5,3,4\n")) == [
        Arrival(0.0, 1, 2),
        Arrival(2.5, 3, 4),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "no column TIMESTAMP"),
        (HEAD + "1,2,3\n2,x,3\n", r"line 3: \['2', 'x', '3'\]"),
        (HEAD + "1,2,3\n2,-4,3\n", "line 3: .* negative"),
        (HEAD + "9,2,3\n2,4,3\n", "line 3: .* before the first"),
        (HEAD + "1,2,3\n", "has 1 requests"),
    ],
)
def test_a_bad_trace_is_refused_by_its_line(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        read_trace(trace(tmp_path, text))


def test_a_made_trace_is_the_same_each_time():
    one, two = replay_trace.made_trace(50), replay_trace.made_trace(50)
    assert one == two
    assert all(b.seconds >= a.seconds for a, b in pairwise(one))


def test_lengths_fit_the_machine():
    assert replay_trace.shorter(Arrival(1.0, 1000, 200)) == Arrival(1.0, 125, 25)
    assert replay_trace.shorter(Arrival(1.0, 1, 10_000)) == Arrival(1.0, 8, 64)


BURST = [Stretch(10, 0.5), Stretch(2, 3.0), Stretch(10, 0.5)]


def test_requests_are_denser_where_more_is_offered():
    assert replay_trace.work(BURST) == 16
    times = spread_over([float(i) for i in range(16)], [7] * 16, BURST)
    assert times == sorted(times)
    assert (times[0], times[5], times[11], times[-1]) == (0, 10, 12, 22)
    assert sum(t < 10 for t in times) == 5
    assert sum(10 <= t < 12 for t in times) == 6
    assert sum(t >= 12 for t in times) == 5


def test_a_burst_has_its_tokens_wherever_the_trace_has_its_gaps():
    generator = random.Random(1)
    offsets = list(accumulate(generator.expovariate(1) for _ in range(400)))
    tokens = [generator.randint(4, 64) for _ in offsets]
    offsets[170:] = [o + 100 for o in offsets[170:]]  # in the middle of the burst
    times = spread_over(offsets, tokens, BURST)
    assert times == sorted(times)
    burst = sum(n for t, n in zip(times, tokens, strict=True) if 10 <= t < 12)
    assert burst == pytest.approx(sum(tokens) * 6 / 16, abs=64)


def test_a_stretch_too_short_for_a_request_has_none():
    stretches = [Stretch(1, 1.0), Stretch(0.01, 1.0), Stretch(1, 1.0)]
    assert spread_over([0.0, 0.0, 3.0], [5, 5, 5], stretches) == pytest.approx([0, 0, 1.01])


def test_few_requests_stand_for_all():
    arrivals = [Arrival(0, 10, 10), Arrival(0, 11, 10), Arrival(0, 100, 50), Arrival(0, 110, 50)]
    chosen, nearest = like_some(arrivals, 2)
    assert chosen == [arrivals[1], arrivals[3]]
    assert nearest == [0, 0, 1, 1]


def test_each_request_has_a_name_that_the_reference_knows(tmp_path):
    index = tmp_path / "reference.json"
    index.write_text(json.dumps({"sequences": {"r0": {"start": 0, "tokens": 3}}}))
    text = TokenSequence("r0", [1], [2, 3, 4])
    replay.name_requests(index, [text], replay.NAMES)
    plan = replay.plan_of(
        [Arrival(float(i), 1, 3) for i in range(9)], [0] * 9, [text], [Stretch(4, 0.5)], 6.0
    )
    assert len(plan) == 4  # 4 s x 0.5 x 6 tokens per second, three tokens each
    known = json.loads(index.read_text())["sequences"]
    assert {p.sequence.id for p in plan} <= known.keys()
    assert len({p.sequence.id for p in plan}) == 4


def outcome(planned: float, tokens: list[float], wanted: int | None = None) -> Outcome:
    return Outcome(planned, planned, tokens, len(tokens) if wanted is None else wanted)


def test_a_run_is_summed_up():
    outcomes = [
        outcome(0.0, [1.0, 1.5, 2.0]),
        outcome(1.0, [1.5, 3.5, 5.5]),
        outcome(2.0, [], wanted=3),
    ]
    outcomes[2].error = "ConnectError"
    found = summary(outcomes, first_target=1.0, token_target=0.5)
    assert (found["requests"], found["failed"], found["failures"]) == (3, 1, ["ConnectError"])
    assert found["seconds"] == pytest.approx(5.5)
    assert found["tokens_per_second"] == pytest.approx(6 / 5.5)
    assert found["first_token_seconds"]["p50"] == pytest.approx(0.75)
    assert found["token_seconds"]["p50"] == pytest.approx((0.5 + 2.0) / 2)
    assert found["request_seconds"]["p99"] == pytest.approx(2.0 + 0.99 * 2.5)
    assert found["within_targets"] == pytest.approx(1 / 3)


def test_nothing_answered_is_an_error():
    lost = outcome(0.0, [], wanted=2)
    lost.error = "500: no"
    with pytest.raises(ValueError, match="no request of 1 was answered: 500: no"):
        summary([lost], 1, 1)


def test_a_series_counts_what_is_under_way():
    found = series([outcome(0.0, [0.5, 2.5]), outcome(1.2, [1.4, 1.6])])
    assert found["under_way"] == [1.0, 1.0, 0.0, 0.0]
    assert found["token_seconds"] == [None, pytest.approx(0.2), 2.0, None]


def test_bits_are_those_between_two_readings():
    before, after = {"steps": 10.0, "bits": 80.0}, {"steps": 20.0, "bits": 130.0}
    assert bits_of(before, after) == 5.0
    assert bits_of(before, before) is None


def test_bits_are_told_second_by_second():
    def at(steps: float, bits: float) -> dict[str, float]:
        return {"steps": steps, "bits": bits}

    readings = [(0.0, at(0, 0)), (1.0, at(2, 16)), (2.0, at(2, 16)), (2.6, at(4, 24))]
    assert bits_along(readings) == [8.0, None, 4.0]
    assert bits_along([(0.0, at(0, 0))]) == []


def test_capacity_is_of_the_time_when_no_place_is_empty():
    outcomes = [outcome(0.0, [1.0, 2.0]), outcome(0.0, [3.0, 4.0]), outcome(2.0, [3.5, 5.0])]
    with pytest.raises(ValueError, match="too few"):
        steady_speed(outcomes)  # nothing is sent after the first has ended
    assert steady_speed([*outcomes, outcome(4.0, [6.0])]) == pytest.approx(3 / 2)


def test_what_is_offered_is_counted_in_its_stretch():
    text = TokenSequence("r0", [1, 2], [3, 4, 5])
    plan = [Planned(t, text) for t in (0.0, 1.0, 4.0, 6.0)]
    first, second = replay.offer(plan, [Stretch(4, 0.5), Stretch(2, 1.0)], 3.0)
    assert first == {"requests": 2, "prompt_tokens": 4, "answer_tokens": 6, "share": 0.5}
    assert second == {"requests": 2, "prompt_tokens": 4, "answer_tokens": 6, "share": 1.0}


def test_rounds_are_merged():
    one = {"requests": 3, "failed": 0, "failures": [], "a": {"p50": 1.0}, "mean_bits": None}
    two = {"requests": 3, "failed": 1, "failures": ["x"], "a": {"p50": 2.0}, "mean_bits": None}
    merged = replay.merge([one, two])
    assert merged == {
        "requests": 6,
        "failed": 1,
        "failures": ["x"],
        "a": {"p50": 1.5},
        "mean_bits": None,
    }


def test_the_burst_leaves_room_to_recover():
    for stretches in replay.loads(40).values():
        assert math.fsum(s.seconds for s in stretches) == pytest.approx(40)
        assert replay_trace.work(stretches) < 40
