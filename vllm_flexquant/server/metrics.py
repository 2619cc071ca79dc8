# SPDX-License-Identifier: Apache-2.0
"""`/metrics`: vLLM's answer, with ours put at its end.

vLLM's workers are other processes, and its statistics have no field of ours. Ours are the sums and
values of the snapshot that `GET /v1/flexquant` shows too, written out when `/metrics` is read: no
metric object lives here, so several API servers say the same, and what does not apply is not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from starlette.datastructures import MutableHeaders

from vllm_flexquant.server.engine import View, flexquant_engine

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATH = "/metrics"
PREFIX = "vllm:flexquant_"
PATIENCE_S = 2.0

TEXTS: dict[str, dict[str, str]] = {
    "gauges": {
        "mean_bits": "Mean width over all weights in the last step, in bits.",
        "level": "Level of the ladder in the last step; the best one is levels - 1.",
        "levels": "Levels of the ladder.",
        "entropy_nats": "Mean over the running sequences of the average entropy of their logits.",
        "request_floor_bits": "Highest of the lowest widths that running requests were promised.",
        "best_nats": "KL per token that the best level costs, by calibration.",
        "load_target_seconds": "Time per output token that load is kept to.",
        "load_met": "Share of the steps of late with tokens to decode that kept it.",
        "draft_level": "Level of the ladder at which drafts run.",
        "draft_mean_bits": "Mean width over all weights at which drafts run, in bits.",
        "speculation_on": "1 if the last step drafted.",
        "accepted_length": "Tokens that an answer gets of a step that verifies its drafts, mean.",
        "speculation_speedup": "Tokens per second with drafts over those without, as measured of "
        "late.",
    },
    "counters": {
        "decode_steps": "Decode steps.",
        "decode_step_bits": "Sum over decode steps of the mean width over all weights, in bits.",
        "switches": "Decode steps that ran at other widths than the one before.",
        "clamped_widths": "Calls of kernels at a width that the layer does not have.",
        "speculated_steps": "Decode steps that verified drafts.",
        "draft_seconds": "Seconds spent on drafting.",
        "verify_seconds": "Seconds of the steps that verified drafts.",
        "unknown_rows": "Rows whose logits or hidden state were no numbers: they ask for all bits.",
    },
}
ACCOUNT_TEXTS: dict[str, dict[str, str]] = {
    "gauges": {
        "asked_nats": "KL per token that a class of requests may spend.",
        "balance_nats": "What it has left over; owed if below 0.",
        "can_be_met": "1 if the best level costs no more than is asked.",
    },
    "counters": {
        "tokens": "Tokens decoded under policy budget.",
        "booked_nats": "Expected KL booked for them.",
    },
}
_END = b"# EOF\n"
"""Of the OpenMetrics format."""

_FAMILIES: dict[str, type[GaugeMetricFamily | CounterMetricFamily]] = {
    "gauges": GaugeMetricFamily,
    "counters": CounterMetricFamily,
}


class SnapshotCollector:
    """The metrics of one snapshot, for a `CollectorRegistry`."""

    def __init__(self, model: str, engines: Mapping[str, View]) -> None:
        self._model = model
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        labels = ("model_name", "engine")
        engines = [((self._model, label), view) for label, view in self._engines.items()]
        accounts = [
            ((*values, account), found)
            for values, view in engines
            for account, found in view["accounts"].items()
        ]
        yield from _families(PREFIX, TEXTS, labels, engines)
        of_account = (*labels, "flexquant_class")
        yield from _families(f"{PREFIX}class_", ACCOUNT_TEXTS, of_account, accounts)


def _families(
    prefix: str,
    texts: Mapping[str, Mapping[str, str]],
    labels: Sequence[str],
    sources: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
) -> Iterator[Metric]:
    for kind, of_kind in texts.items():
        for name, text in of_kind.items():
            family = _FAMILIES[kind](f"{prefix}{name}", text, labels=labels)
            for values, source in sources:
                if (value := source[kind].get(name)) is not None:
                    family.add_metric(values, value)
            if family.samples:
                yield family


def exposition(
    model: str, engines: Mapping[str, View], content_type: str, names: Sequence[str] = ()
) -> bytes:
    """A snapshot in the format that a content type names; only metrics of `names`, if any."""
    registry = CollectorRegistry(auto_describe=True)
    registry.register(SnapshotCollector(model, engines))
    # read as what is accepted, a content type chooses itself
    encoder, _ = choose_encoder(content_type)
    return encoder(registry.restricted_registry(names) if names else registry)


class AppendMetrics:
    """ASGI middleware: appends our metrics to the answer that the application gives `/metrics`.

    An engine within a long step is waited for `PATIENCE_S`, and its snapshot of before used then.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        engines = flexquant_engine(scope["app"]) if _reads_metrics(scope) else None
        if engines is None:
            await self._app(scope, receive, send)
            return
        found = await engines.latest(PATIENCE_S)
        # uncompressed, so that it can be appended to
        asked = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await self._app({**scope, "headers": asked}, receive, keep)
        start, *parts = messages
        headers = MutableHeaders(raw=[(name.lower(), value) for name, value in start["headers"]])
        if start["status"] == 200 and "content-encoding" not in headers:
            names = parse_qs(scope["query_string"].decode("latin-1")).get("name[]", [])
            ours = exposition(engines.model, found, headers.get("content-type", ""), names)
            body = _joined(b"".join(part.get("body", b"") for part in parts), ours)
            headers["content-length"] = str(len(body))
            start = {**start, "headers": headers.raw}
            parts = [{"type": "http.response.body", "body": body}]
        for message in (start, *parts):
            await send(message)


def _reads_metrics(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.rstrip("/") == PATH


def _joined(theirs: bytes, ours: bytes) -> bytes:
    if ours.endswith(_END):
        theirs = theirs.removesuffix(_END)
    if theirs and not theirs.endswith(b"\n"):
        theirs += b"\n"
    return theirs + ours
