# SPDX-License-Identifier: Apache-2.0
"""`/v1/flexquant` of an application made as vLLM makes it."""

import asyncio
import json

import pytest
from fastapi.testclient import TestClient

from tests.server.served import KEY, OPERATOR, OPTIONS, Client, Rank, application
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.server.engine import merge
from vllm_flexquant.server.messages import BODY_BYTES, to_json

PATH = "/v1/flexquant"


def message(answer):
    return answer.json()["error"]["message"]


def test_who_has_no_operator_key_sees_no_requests(http):
    view = http.get(PATH).json()
    assert view["options"]["policy"] == "auto"
    assert "requests" not in view
    assert KEY not in http.get(PATH).text
    assert http.get(PATH, headers=OPERATOR).json()["requests"][0]["request"] == "chat-1"


def test_a_change_is_the_operators(http, rank):
    wrong = {"X-FlexQuant-Key": "key-of-an-operator"}
    for answer in (
        http.post(PATH, json={"width": 6}),
        http.post(PATH, json={"width": 6}, headers=wrong),
        http.post(PATH, json={"width": 6}, params={"X-FlexQuant-Key": KEY}),
        http.post(PATH, data={"width": 6, "X-FlexQuant-Key": KEY}),
        http.post(PATH, json={"width": 6}, headers={"Authorization": f"Bearer {KEY}"}),
        http.get(PATH, headers={"X-FlexQuant-Key": b"\xff\xfe"}),
        http.get(PATH, params={"trace": 1}),
        http.get(f"{PATH}/trace"),
    ):
        assert answer.status_code == 401
        assert KEY not in answer.text
    assert rank.asked == []
    view = http.post(PATH, json={"width": 6}, headers=OPERATOR).json()
    assert view["options"]["width"] == 6
    assert view["requests"]
    assert rank.asked == ["check", "apply", "snapshot"]


def test_without_a_key_set_nobody_changes_it():
    rank, options = Rank(), FlexQuantOptions()
    with TestClient(application(Client([[rank]], options))) as http:
        answer = http.post(PATH, json={"width": 6}, headers=OPERATOR)
        assert answer.status_code == 403
        assert "VLLM_FLEXQUANT_OPERATOR_KEY" in message(answer)
        assert http.get(PATH).status_code == 200
    assert "apply" not in rank.asked


def test_it_stands_beside_vllms_api_key(client):
    bearer = {"Authorization": "Bearer secret"}
    with TestClient(application(client, api_key="secret")) as http:
        assert http.get(PATH).status_code == 401
        assert http.get(PATH, headers=OPERATOR).status_code == 401
        assert http.post(PATH, json={}, headers=bearer).status_code == 401
        assert http.post(PATH, json={}, headers=bearer | OPERATOR).status_code == 200


def test_traces(http, rank):
    assert http.get(PATH, params={"trace": 1}, headers=OPERATOR).json()["trace"] == [
        {"widths": [6, 6]}
    ]
    assert http.get(f"{PATH}/trace", headers=OPERATOR).content == b"steps of b"
    answer = http.get(f"{PATH}/trace", params={"engine": "1"}, headers=OPERATOR)
    assert answer.status_code == 400
    assert message(answer) == "there is no such engine; engines are 0"
    rank.flexquant_trace = lambda: "nothing is recorded"
    answer = http.get(f"{PATH}/trace", headers=OPERATOR)
    assert (answer.status_code, message(answer)) == (400, "nothing is recorded")


@pytest.mark.parametrize("client", [None, Client([[Rank()]], quantization="awq")])
def test_another_model_is_left_alone(client):
    with TestClient(application(client)) as http:
        for answer in (http.get(PATH), http.post(PATH), http.get(f"{PATH}/trace")):
            assert answer.status_code == 404
        assert http.get("/metrics").status_code == 200


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * BODY_BYTES, "not valid JSON"),
        (b'{"width": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"budget": NaN}', "not valid JSON"),
        (b'{"budget": -Infinity}', "not valid JSON"),
        (b'{"budget": 1e999}', "option 'budget' is inf"),
        (b'{"dwell": 99999999999999999999}', "option 'dwell' is"),
        (b'{"policy": "\\ud800"}', "option 'policy' is '\\ud800'"),
        (b'{"\\ud800": 1}', "option '\\ud800' is 1"),
        (b'{"policy": "' + b"x" * 5000 + b'"}', "option 'policy' is 'xxx"),
        (b'{"width": [[6]]}', "option 'width' is a list"),
        (b"[1]", "the body is a list; give an object"),
        (b'"' + b"x" * 5000 + b'"', "the body is 'xxx"),
        (b'{"bits": 6}', "unknown option 'bits'; options that can be changed are policy"),
        (b'{"operator_key": "mine"}', "operator_key"),
        (b'{"min_bits": 8, "max_bits": 4}', "min_bits 8 is above max_bits 4"),
    ],
)
def test_a_bad_body_is_a_sentence_and_changes_nothing(http, rank, body, expected):
    answer = http.post(PATH, content=body, headers=OPERATOR)
    assert answer.status_code == 400
    assert expected in message(answer)
    assert "x" * 61 not in message(answer)
    assert rank.options is OPTIONS


def test_a_large_body_is_not_read(http, rank):
    def parts():
        yield b"{" + b" " * BODY_BYTES
        yield b"}"

    for body in (b" " * (BODY_BYTES + 1), parts()):
        assert http.post(PATH, content=body, headers=OPERATOR).status_code == 413
    assert rank.asked == []


def test_readers_share_a_snapshot_until_a_change(http, rank):
    for _ in range(20):
        http.get(PATH)
        http.get("/metrics")
    assert rank.asked == ["snapshot"]
    http.post(PATH, json={"policy": "entropy"}, headers=OPERATOR)
    assert http.get(PATH).json()["options"]["policy"] == "entropy"
    assert rank.asked == ["snapshot", "check", "apply", "snapshot"]


def test_a_snapshot_from_before_a_change_is_not_kept(client, rank):
    engines = application(client).state.flexquant_engines
    free = asyncio.Event()

    async def wait(engine):
        if not rank.asked:
            await free.wait()

    async def main():
        client.engine_core.before_answer = wait
        early = asyncio.create_task(engines.snapshot())
        await asyncio.sleep(0)
        rank.asked.append("now")
        assert await engines.change({"policy": "entropy"}) == ""
        late = await engines.snapshot()
        free.set()
        await early
        assert (await engines.snapshot()) is late
        assert late["0"]["options"]["policy"] == "entropy"

    asyncio.run(main())


def test_numbers_that_are_not_finite_are_null(http, rank):
    rank.requests = [{"request": "a", "entropy_nats": float("nan")}]
    rank.gauges["entropy_nats"] = float("inf")
    view = http.get(PATH, headers=OPERATOR).json()
    assert view["requests"] == [{"request": "a", "entropy_nats": None}]
    assert view["gauges"]["entropy_nats"] is None
    assert json.loads(to_json({"a": [float("-inf"), (1.5, "\ud800")]})) == {
        "a": [None, [1.5, "\ud800"]]
    }


def test_an_engine_that_fails_is_a_503(http, client, rank):
    async def fail(engine):
        raise Exception("Call to collective_rpc method failed")

    client.engine_core.before_answer = fail
    for answer in (
        http.get(PATH),
        http.post(PATH, json={"width": 6}, headers=OPERATOR),
        http.get(f"{PATH}/trace", headers=OPERATOR),
    ):
        assert answer.status_code == 503
        assert message(answer) == "an engine does not answer; the server's log has more"
    client.engine_core.before_answer = None
    assert http.get(PATH).status_code == 200


def test_all_engines_change_or_none():
    ranks = [Rank(), Rank(), Rank(OPTIONS.changed({"min_bits": 8})), Rank()]
    client = Client([ranks[:2], ranks[2:]])
    with TestClient(application(client)) as http:
        answer = http.post(PATH, json={"max_bits": 4}, headers=OPERATOR)
        assert answer.status_code == 400
        assert "min_bits 8 is above max_bits 4" in message(answer)
        assert not any("apply" in rank.asked for rank in ranks)
        assert http.post(PATH, json={"width": 6}, headers=OPERATOR).status_code == 200
    assert [rank.options.width for rank in ranks] == [6] * 4


def test_a_change_that_was_overtaken_is_a_409(http, rank):
    check = rank.flexquant_change

    def overtaken(changes, apply):
        if apply:
            rank.options = OPTIONS.changed({"min_bits": 8})
        return check(changes, apply)

    rank.flexquant_change = overtaken
    answer = http.post(PATH, json={"max_bits": 4}, headers=OPERATOR)
    assert answer.status_code == 409
    assert "min_bits 8 is above max_bits 4" in message(answer)


def test_several_engines_are_one_view():
    engines = [[Rank(layers="ab")], [Rank(layers="cd")]]
    engines[1][0].counters["decode_steps"] = 5
    with TestClient(application(Client(engines))) as http:
        public, view = http.get(PATH).json(), http.get(PATH, headers=OPERATOR).json()
        assert http.get(f"{PATH}/trace?engine=1", headers=OPERATOR).content == b"steps of d"
    assert (view["engine_index"], view["counters"]["decode_steps"]) == (0, 2)
    assert [len(engine["requests"]) for engine in view["engines"]] == [1, 1]
    assert [engine["engine_index"] for engine in view["engines"]] == [0, 1]
    assert [engine["counters"]["decode_steps"] for engine in view["engines"]] == [2, 5]
    assert "chat-1" not in json.dumps(public)


def test_ranks_of_an_engine_are_one_view():
    first, last = Rank(layers="ab"), Rank(layers="bcd")
    first.gauges["mean_bits"], last.gauges["mean_bits"] = 4, 7
    first.counters["decode_step_bits"], last.counters["decode_step_bits"] = 20, 30
    last.counters["unknown_rows"] = 9
    ranks = [first.flexquant_snapshot(True), last.flexquant_snapshot(True)]
    before = json.dumps(ranks)
    view = merge(ranks)
    assert [layer["name"] for layer in view["layers"]] == ["a", "b", "c", "d"]
    assert (view["clamped_widths"], view["bytes_read_per_step"]) == (2, 20)
    assert (view["ranks"], view["mean_bits"], view["steps"]) == (2, 5.8, 3)
    assert view["unknown_rows"] == view["counters"]["unknown_rows"] == 9
    assert view["counters"]["decode_step_bits"] == 26
    assert view["gauges"]["mean_bits"] == 5.8
    assert json.dumps(ranks) == before
