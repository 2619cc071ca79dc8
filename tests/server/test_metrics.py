# SPDX-License-Identifier: Apache-2.0
"""`/metrics` of an application made as vLLM makes it."""

import asyncio
import gzip

import by_hand
import pytest
from fastapi.testclient import TestClient
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_open
from prometheus_client.parser import text_string_to_metric_families as read_plain

from tests.server.served import OPTIONS, Client, Rank, Worker, application
from vllm_flexquant.server import engine, metrics
from vllm_flexquant.server.metrics import exposition

OWN = 'engine="0",model_name="smol"'


def ours(answer):
    """Values by name, engine and class, of what can be read with the format's own parser."""
    kind = answer.headers["content-type"].partition(";")[0]
    read = read_open if kind == "application/openmetrics-text" else read_plain
    # without what engines of this process left in vLLM's registry: prometheus_client writes names
    # with a colon so that its own OpenMetrics parser takes some of them for the same
    lines = answer.text.splitlines(keepends=True)
    text = "".join(line for line in lines if "flexquant" in line or "vllm" not in line)
    samples = [sample for family in read(text) for sample in family.samples]
    assert any(sample.name.startswith("python_info") for sample in samples), "vLLM's own are there"
    # prometheus_client writes the colon as an underscore in one of its formats, vLLM's own too
    named = [s for s in samples if s.name.replace("vllm_", "vllm:").startswith("vllm:flexquant_")]
    assert {sample.labels.pop("model_name") for sample in named} <= {"smol"}
    found = {(s.name, *(s.labels[key] for key in sorted(s.labels))): s.value for s in named}
    assert len(found) == len(named)
    assert int(answer.headers["content-length"]) == len(answer.content)
    return found


def test_names_and_labels(http):
    text = http.get("/metrics").text
    assert f"vllm:flexquant_mean_bits{{{OWN}}} 6.0" in text
    assert f"vllm:flexquant_decode_steps_total{{{OWN}}} 2.0" in text
    of_class = 'engine="0",flexquant_class="fast",model_name="smol"'
    assert f"vllm:flexquant_class_tokens_total{{{of_class}}} 7.0" in text
    assert f"vllm:flexquant_class_can_be_met{{{of_class}}} 1.0" in text
    assert f"vllm:flexquant_class_balance_nats{{{of_class}}} -0.2" in text
    assert len(ours(http.get("/metrics"))) == 14


def test_each_engine_has_its_own():
    engines = [[Rank()], [Rank()]]
    engines[1][0].counters["decode_steps"] = 5
    engines[1][0].accounts = {}
    with TestClient(application(Client(engines))) as http:
        found = ours(http.get("/metrics"))
    assert found["vllm:flexquant_decode_steps_total", "0"] == 2
    assert found["vllm:flexquant_decode_steps_total", "1"] == 5
    assert ("vllm:flexquant_class_tokens_total", "1", "fast") not in found


def test_what_does_not_apply_is_not_there(http, rank, monkeypatch):
    monkeypatch.setattr(engine, "FRESH_S", 0)
    rank.gauges |= {"load_met": 0.5, "entropy_nats": None}
    found = ours(http.get("/metrics"))
    assert found["vllm:flexquant_load_met", "0"] == 0.5
    del rank.gauges["load_met"]
    rank.accounts = {}
    found = ours(http.get("/metrics"))
    assert {name for name, *_ in found} == {
        *(f"vllm:flexquant_{name}" for name in ("mean_bits", "level", "levels")),
        "vllm:flexquant_request_floor_bits",
        *(f"vllm:flexquant_{name}_total" for name in rank.counters),
    }


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
@pytest.mark.parametrize(
    "accept",
    [
        "*/*",
        "text/plain;version=1.0.0;escaping=allow-utf-8",
        "application/openmetrics-text;version=1.0.0",
        "application/openmetrics-text",
    ],
)
@pytest.mark.parametrize("encoding", ["identity", "gzip, deflate"])
def test_it_is_one_answer_in_the_format_that_vllm_chose(http, path, accept, encoding):
    answer = http.get(path, headers={"accept": accept, "accept-encoding": encoding})
    assert answer.status_code == 200
    assert len(ours(answer)) == 14
    assert answer.text.count("# EOF") == answer.headers["content-type"].count("openmetrics")


def test_names_can_be_chosen(http):
    wanted = {"name[]": ["vllm:flexquant_level", "vllm:flexquant_switches_total"]}
    lines = http.get("/metrics/", params=wanted).text.splitlines()
    assert [line for line in lines if line[0] != "#"] == [
        f"vllm:flexquant_level{{{OWN}}} 3.0",
        f"vllm:flexquant_switches_total{{{OWN}}} 1.0",
    ]


def test_only_what_reads_metrics_asks_the_engine(http, rank):
    assert http.post("/metrics").status_code in (200, 405)
    assert http.head("/metrics").status_code in (200, 405)
    assert http.get("/docs").status_code == 200
    assert http.get("/v1/metrics").status_code == 404
    assert rank.asked == []


@pytest.mark.parametrize("path", ["/metrics", "/behind/metrics"])
def test_behind_a_proxy(client, path):
    with TestClient(application(client, root_path="/behind")) as http:
        assert len(ours(http.get(path))) == 14


def test_an_answer_that_cannot_be_appended_to_is_left_alone(client):
    app = application(client)
    content = gzip.compress(b"theirs")

    async def theirs(scope, receive, send):
        headers = [(b"Content-Encoding", b"gzip"), (b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content[:3], "more_body": True})
        await send({"type": "http.response.body", "body": content[3:]})

    app.router.routes.clear()
    app.mount("/metrics", theirs)
    with TestClient(app) as http:
        assert http.get("/metrics").text == "theirs"
        assert http.get("/metrics/").content == b"theirs"


def test_an_engine_that_is_gone_or_busy_leaves_vllms_own_readable(http, client, rank, monkeypatch):
    """One warning, whatever vLLM raises; what was known before is shown."""
    warnings = []
    monkeypatch.setattr(engine, "FRESH_S", 0)
    monkeypatch.setattr(metrics, "PATIENCE_S", 0.05)
    monkeypatch.setattr(engine.logger, "warning", lambda *args: warnings.append(args))
    assert len(ours(http.get("/metrics"))) == 14
    for error in (RuntimeError("dead"), Exception("bare"), OSError(), TimeoutError()):

        async def fail(engine, error=error):
            raise error

        client.engine_core.before_answer = fail
        assert len(ours(http.get("/metrics"))) == 14
    assert len(warnings) == 1

    free, asked = asyncio.Event(), len(rank.asked)

    async def busy(engine):
        rank.asked.append("waits")
        await free.wait()

    client.engine_core.before_answer = busy
    rank.gauges["level"] = 5
    for _ in range(3):
        assert ours(http.get("/metrics"))["vllm:flexquant_level", "0"] == 3
    assert rank.asked[asked:] == ["waits"]
    http.portal.call(free.set)
    assert ours(http.get("/metrics"))["vllm:flexquant_level", "0"] == 5
    client.engine_core.before_answer = fail
    http.get("/metrics")
    assert len(warnings) == 2


def test_an_engine_that_never_answered_has_no_metrics(http, client):
    async def fail(engine):
        raise RuntimeError("dead")

    client.engine_core.before_answer = fail
    assert ours(http.get("/metrics")) == {}


def test_a_rank_that_answers_nonsense_leaves_vllms_own_readable(http, rank):
    rank.flexquant_snapshot = lambda fresh: {}
    assert ours(http.get("/metrics")) == {}


def test_reading_leaves_nothing_behind(client, rank, monkeypatch):
    """Also where each reading finds an account of another name."""
    monkeypatch.setattr(engine, "FRESH_S", 0)
    engines = application(client).state.flexquant_engines
    account = rank.accounts.pop("fast")

    async def main():
        sizes = []
        for i in range(10_000):
            rank.accounts = {f"budget {i}": account}
            await engines.latest(1)
            if i % 1000 == 999:
                text = exposition("smol", await engines.latest(1), "text/plain")
                sizes.append((len(asyncio.all_tasks()), text.count(b"\n")))
        return sizes

    assert len(set(asyncio.run(main()))) == 1


def test_several_api_servers_say_the_same(client, monkeypatch, tmp_path):
    """Each of them asks the engine, which counts; prometheus_client's files hold none of it."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    for _ in range(2):
        with TestClient(application(client)) as http:
            for path in ("/metrics", "/metrics/"):
                text = http.get(path).text
                assert "python_info" not in text, "not vLLM's registry of several processes"
                assert f"vllm:flexquant_decode_steps_total{{{OWN}}} 2.0" in text
                assert text.count("vllm:flexquant_mean_bits{") == 1


def test_all_that_a_planner_tells_is_there():
    planner = by_hand.calibrated(target_ms=50.0)
    for slot, asked in enumerate((None, {"flexquant_budget": 0.05})):
        by_hand.start(planner, slot, asked)
    worker = Worker(planner)
    by_hand.step(planner, "ab")
    view = worker.flexquant_snapshot(fresh=True)
    assert {"entropy_nats", "load_met"} <= view["gauges"].keys()
    assert {"balanced", "own"} <= view["accounts"].keys()
    for kind, texts in metrics.TEXTS.items():
        assert view[kind].keys() <= texts.keys()
        for account in view["accounts"].values():
            assert account[kind].keys() <= metrics.ACCOUNT_TEXTS[kind].keys()
    told = len(view["gauges"]) + len(view["counters"])
    told += sum(len(a["gauges"]) + len(a["counters"]) for a in view["accounts"].values())
    with TestClient(application(Client([[worker]]))) as http:
        assert len(ours(http.get("/metrics"))) == told


def test_the_operators_key_is_in_no_metric(http):
    assert OPTIONS.operator_key.get_secret_value() not in http.get("/metrics").text
