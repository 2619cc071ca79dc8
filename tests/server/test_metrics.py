# SPDX-License-Identifier: Apache-2.0
"""`/metrics` of an application, with an engine that answers as told."""

import asyncio
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, generate_latest, make_asgi_app

from vllm_flexquant.server import metrics
from vllm_flexquant.server.metrics import AskBeforeMetrics, Metrics

FOUND = {
    "gauges": {"mean_bits": 4.5, "level": 3, "levels": 9, "request_floor_bits": 0},
    "counters": {"decode_steps": 2, "decode_step_bits": 9.5, "switches": 1},
    "classes": {
        "fast": {
            "asked_nats": 0.1,
            "balance_nats": -0.2,
            "can_be_met": True,
            "tokens": 7.0,
            "booked_nats": 0.6,
            "correction": 1.0,
        }
    },
}


def test_names_and_labels():
    registry = CollectorRegistry()
    made = Metrics("model-a", registry)
    made.update(FOUND)
    made.update(FOUND)
    text = generate_latest(registry).decode()
    assert 'vllm:flexquant_mean_bits{model_name="model-a"} 4.5' in text
    assert 'vllm:flexquant_decode_steps_total{model_name="model-a"} 4.0' in text
    own = 'flexquant_class="fast",model_name="model-a"'
    assert f"vllm:flexquant_class_tokens_total{{{own}}} 14.0" in text
    assert f"vllm:flexquant_class_can_be_met{{{own}}} 1.0" in text
    assert f"vllm:flexquant_class_balance_nats{{{own}}} -0.2" in text


class Engine:
    def __init__(self, answer, quantization="flexquant"):
        self.asked = 0
        self.model_config = SimpleNamespace(
            quantization=quantization, served_model_name=["name", "other"], model="path"
        )
        self._answer = answer

    async def collective_rpc(self, method):
        self.asked += 1
        assert method == "flexquant_metrics"
        return [await self._answer()]


@pytest.fixture
def client(monkeypatch):
    registry = CollectorRegistry()
    monkeypatch.setattr(metrics, "Metrics", lambda model: Metrics(model, registry))

    def make(engine):
        app = FastAPI()
        app.add_middleware(AskBeforeMetrics)
        app.mount("/metrics", make_asgi_app(registry=registry))
        app.add_api_route("/other", lambda: {})
        app.state.flexquant_engine = engine
        return TestClient(app)

    return make


async def answer():
    return FOUND


def test_the_engine_is_asked_when_metrics_are_read_and_only_then(client):
    engine = Engine(answer)
    with client(engine) as http:
        assert http.get("/other").status_code == 200
        assert engine.asked == 0
        text = http.get("/metrics/").text
    assert engine.asked == 1
    assert 'vllm:flexquant_level{model_name="name"} 3.0' in text


def test_another_model_is_left_alone(client):
    engine = Engine(answer, quantization="awq")
    with client(engine) as http:
        assert http.get("/metrics/").status_code == 200
    with client(None) as http:
        assert http.get("/metrics/").status_code == 200
    assert engine.asked == 0


def test_an_engine_that_is_gone_or_busy_leaves_vllms_own_metrics_readable(client, monkeypatch):
    async def gone():
        raise RuntimeError("the engine is dead")

    with client(Engine(gone)) as http:
        assert http.get("/metrics/").status_code == 200

    monkeypatch.setattr(metrics, "PATIENCE_S", 0.05)
    free = asyncio.Event()

    async def busy():
        await free.wait()
        return FOUND

    engine = Engine(busy)
    with client(engine) as http:
        assert "flexquant_level" not in http.get("/metrics/").text
        assert http.get("/metrics/").status_code == 200
        assert engine.asked == 1  # the question of before still waits
        http.portal.call(free.set)
        assert "flexquant_level" in http.get("/metrics/").text


def test_several_api_servers_add_up(tmp_path):
    """Each process writes what it was told; vLLM's registry sums them."""
    code = (
        "import sys; from vllm_flexquant.server.metrics import Metrics\n"
        "from tests.server.test_metrics import FOUND\n"
        "Metrics('m').update(FOUND)\n"
    )
    environ = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, env=environ)
    read = (
        "from vllm.v1.metrics.prometheus import get_prometheus_registry\n"
        "from prometheus_client import generate_latest\n"
        "print(generate_latest(get_prometheus_registry()).decode())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", read], check=True, env=environ, capture_output=True, text=True
    )
    assert 'vllm:flexquant_decode_steps_total{model_name="m"} 4.0' in done.stdout
    assert 'vllm:flexquant_mean_bits{model_name="m"} 4.5' in done.stdout
