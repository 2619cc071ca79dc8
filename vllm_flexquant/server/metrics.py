# SPDX-License-Identifier: Apache-2.0
"""`/metrics`: what the workers count, asked for when it is read.

vLLM's workers are other processes, and its statistics have no field of ours. So the metrics are
brought up to date by asking the engine whenever `/metrics` is read: between scrapes nothing runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge
from vllm.logger import init_logger

from vllm_flexquant.server.engine import flexquant_engine

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = init_logger(f"vllm.{__name__}")

PATH = "/metrics"
PREFIX = "vllm:flexquant_"
PATIENCE_S = 2.0

GAUGES = {
    "mean_bits": "Mean width over all weights in the last step, in bits.",
    "level": "Level of the ladder in the last step; the best one is levels - 1.",
    "levels": "Levels of the ladder.",
    "entropy_nats": "Mean over the running sequences of the average entropy of their logits.",
    "request_floor_bits": "Lowest width that a running request was promised.",
    "best_nats": "KL per token that the best level costs, by calibration.",
    "load_target_seconds": "Time per output token that load is kept to.",
    "load_met": "Share of the steps of late with tokens to decode that kept it.",
    "draft_level": "Level of the ladder at which drafts run.",
    "draft_mean_bits": "Mean width over all weights at which drafts run, in bits.",
    "speculation_on": "1 if the last step drafted.",
    "accepted_length": "Tokens that an answer gets of a step that verifies its drafts, mean.",
    "speculation_speedup": "Tokens per second with drafts over those without, as measured of late.",
}
COUNTERS = {
    "decode_steps": "Decode steps.",
    "decode_step_bits": "Sum over decode steps of the mean width over all weights, in bits.",
    "switches": "Decode steps that ran at other widths than the one before.",
    "clamped_widths": "Calls of kernels at a width that the layer does not have.",
    "speculated_steps": "Decode steps that verified drafts.",
    "draft_seconds": "Seconds spent on drafting.",
    "verify_seconds": "Seconds of the steps that verified drafts.",
    "unknown_rows": "Rows whose logits or hidden state were no numbers: they ask for all bits.",
}
CLASS_GAUGES = {
    "asked_nats": "KL per token that a class of requests may spend.",
    "balance_nats": "What it has left over; owed if below 0.",
    "can_be_met": "1 if the best level costs no more than is asked.",
}
CLASS_COUNTERS = {
    "tokens": "Tokens decoded under policy budget.",
    "booked_nats": "Expected KL booked for them.",
}


class Metrics:
    """Gauges and counters of one server."""

    def __init__(self, model: str, registry: CollectorRegistry = REGISTRY) -> None:
        self._model = model

        def gauges(
            texts: Mapping[str, str], prefix: str, labels: Iterable[str]
        ) -> dict[str, Gauge]:
            return {
                name: Gauge(
                    f"{prefix}{name}",
                    text,
                    labels,
                    registry=registry,
                    multiprocess_mode="mostrecent",
                )
                for name, text in texts.items()
            }

        def counters(
            texts: Mapping[str, str], prefix: str, labels: Iterable[str]
        ) -> dict[str, Counter]:
            return {
                name: Counter(f"{prefix}{name}", text, labels, registry=registry)
                for name, text in texts.items()
            }

        own, of_class = ("model_name",), ("model_name", "flexquant_class")
        self._gauges = gauges(GAUGES, PREFIX, own)
        self._counters = counters(COUNTERS, PREFIX, own)
        self._class_gauges = gauges(CLASS_GAUGES, f"{PREFIX}class_", of_class)
        self._class_counters = counters(CLASS_COUNTERS, f"{PREFIX}class_", of_class)

    def update(self, found: Mapping[str, Any]) -> None:
        """Take in what a worker's `flexquant_metrics` returned."""
        for name, value in found["gauges"].items():
            self._gauges[name].labels(self._model).set(value)
        for name, added in found["counters"].items():
            self._counters[name].labels(self._model).inc(added)
        for of_class, values in found["classes"].items():
            for name in CLASS_GAUGES:
                self._class_gauges[name].labels(self._model, of_class).set(values[name])
            for name in CLASS_COUNTERS:
                self._class_counters[name].labels(self._model, of_class).inc(values[name])


class AskBeforeMetrics:
    """ASGI middleware: reading `/metrics` asks the engine first.

    An engine within a long step is waited for `PATIENCE_S`; its answer counts at the next reading.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._metrics: Metrics | None = None
        self._asked: asyncio.Future[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/") == PATH:
            engine = flexquant_engine(scope["app"])
            if engine is not None:
                await self._bring_up_to_date(engine)
        await self._app(scope, receive, send)

    async def _bring_up_to_date(self, engine: Any) -> None:
        if self._asked is None or self._asked.done():
            self._asked = asyncio.ensure_future(self._ask(engine))
        await asyncio.wait({self._asked}, timeout=PATIENCE_S)

    async def _ask(self, engine: Any) -> None:
        try:
            found = (await engine.collective_rpc("flexquant_metrics"))[-1]
        except Exception as error:  # noqa: BLE001 - vLLM's own metrics must stay readable
            logger.warning_once("flexquant: no metrics from the engine: %s", error)
            return
        if self._metrics is None:
            self._metrics = Metrics(_served_name(engine.model_config))
        self._metrics.update(found)


def _served_name(config: Any) -> str:
    """As the label `model_name` of vLLM's own metrics."""
    name = config.served_model_name
    return str((name[0] if isinstance(name, list) else name) or config.model)
