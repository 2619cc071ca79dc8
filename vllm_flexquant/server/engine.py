# SPDX-License-Identifier: Apache-2.0
"""The engines behind a server: all of them are asked, and one answer serves all readers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_flexquant.options import METHOD

if TYPE_CHECKING:
    from fastapi import FastAPI
    from pydantic import SecretStr
    from vllm.engine.protocol import EngineClient

logger = init_logger(f"vllm.{__name__}")

FRESH_S = 1.0
"""A snapshot serves this long; its readers cannot make the engines work more often."""

ANSWER_S = 60.0
"""An engine that needs longer for an answer is given up."""

View = dict[str, Any]


class NoAnswerError(Exception):
    """An engine has failed, or has not answered for `ANSWER_S`."""


class OvertakenError(Exception):
    """A change was refused after it had been found good: another one came in between."""


class Engines:
    """The engines that one server process speaks to: one, or as many as are data-parallel."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._question: asyncio.Task[dict[str, View]] | None = None
        self._answered = 0.0
        self._last: dict[str, View] = {}
        self._silent = False
        self._changing = asyncio.Lock()

    @property
    def model(self) -> str:
        """As the label `model_name` of vLLM's own metrics."""
        config = self._client.model_config
        name = config.served_model_name
        return str((name[0] if isinstance(name, list) else name) or config.model)

    @property
    def operator_key(self) -> SecretStr | None:
        """What who changes the policy has to know; None: nobody may."""
        return self._client.vllm_config.quant_config.options.operator_key

    async def ask(self, method: str, *args: Any) -> dict[str, list[Any]]:
        """What every rank of every engine answers, by the engine's label in vLLM's metrics.

        Raises:
            NoAnswerError
        """
        core = getattr(self._client, "engine_core", None)
        labels = getattr(core, "engine_ranks_managed", [0])
        if core is not None and len(labels) > 1:
            # collective_rpc also asks all of them, but hands out the first one's answer only
            asked = core.call_utility_all_async("collective_rpc", method, None, args, None)
        else:
            asked = _as_list(self._client.collective_rpc(method, args=args))
        # as a value, since vLLM raises a bare Exception for what failed in a worker
        answers = await asyncio.gather(asyncio.wait_for(asked, ANSWER_S), return_exceptions=True)
        if isinstance(answer := answers[0], BaseException):
            raise NoAnswerError(f"{method}: {answer!r}") from answer
        return {str(label): ranks for label, ranks in zip(labels, answer, strict=True)}

    async def snapshot(self) -> dict[str, View]:
        """A view of each engine, by label, no older than `FRESH_S`; not to be changed.

        Raises:
            NoAnswerError
        """
        asked = self._current()
        await asyncio.wait({asked})
        return asked.result()

    async def latest(self, patience_s: float) -> dict[str, View]:
        """As `snapshot`, but an older one, or none, of engines that let it wait longer."""
        await asyncio.wait({self._current()}, timeout=patience_s)
        return self._last

    async def change(self, changes: Mapping[str, Any]) -> str:
        """Change the options of all engines; returns the reason if none was changed, else "".

        Raises:
            NoAnswerError: some may have been changed.
            OvertakenError: likewise.
        """
        async with self._changing:
            if reason := _refusal(await self.ask("flexquant_change", changes, False)):
                return reason
            try:
                if reason := _refusal(await self.ask("flexquant_change", changes, True)):
                    raise OvertakenError(reason)
            finally:
                self._begin(fresh=True)
        return ""

    def _current(self) -> asyncio.Task[dict[str, View]]:
        """The question that waits for an answer, or was answered not long ago."""
        asked = self._question
        if asked is None or (
            asked.done() and (self._silent or time.monotonic() - self._answered >= FRESH_S)
        ):
            return self._begin(fresh=False)
        return asked

    def _begin(self, fresh: bool) -> asyncio.Task[dict[str, View]]:
        self._question = asyncio.create_task(self._ask_for_snapshot(fresh))
        self._question.add_done_callback(self._keep)
        return self._question

    async def _ask_for_snapshot(self, fresh: bool) -> dict[str, View]:
        found = await self.ask("flexquant_snapshot", fresh)
        return {label: merge(ranks) for label, ranks in found.items()}

    def _keep(self, asked: asyncio.Task[dict[str, View]]) -> None:
        error = None if asked.cancelled() else asked.exception()
        if asked is not self._question:  # a change has been made since
            return
        if error is not None and not self._silent:
            logger.warning("flexquant: the engine does not say how it runs: %s", error)
        self._silent = asked.cancelled() or error is not None
        if not self._silent:
            self._answered, self._last = time.monotonic(), asked.result()


def flexquant_engine(app: FastAPI) -> Engines | None:
    """The engines of an application, None if it serves no flexquant model."""
    return getattr(app.state, "flexquant_engines", None)


def engines_of(client: EngineClient | None) -> Engines | None:
    """The engines behind a client, None if they run no flexquant model."""
    if client is None or client.model_config.quantization != METHOD:
        return None
    return Engines(client)


async def _as_list(asked: Any) -> list[Any]:
    return [await asked]


def _refusal(found: Mapping[str, Sequence[str]]) -> str:
    return next((reason for ranks in found.values() for reason in ranks if reason), "")


def merge(ranks: Sequence[View]) -> View:
    """One view of an engine: layers of all pipeline stages, the rest of the last rank, which sees
    logits. Tensor-parallel ranks hold shards of the same layers and count the same rows."""
    last = ranks[-1]
    layers: dict[str, View] = {}
    for rank in ranks:
        for layer in rank["layers"]:
            layers.setdefault(layer["name"], layer)
    weights = [sum(n * k for n, k in (layer["shape"] for layer in r["layers"])) for r in ranks]

    def mean(values: Sequence[float]) -> float:
        return sum(v * w for v, w in zip(values, weights, strict=True)) / max(sum(weights), 1)

    how: dict[str, Callable[[list[float]], float]] = {
        "clamped_widths": sum,
        "unknown_rows": max,
        "decode_step_bits": mean,
    }
    bits = mean([rank["mean_bits"] for rank in ranks])
    counters = {
        name: how[name]([rank["counters"][name] for rank in ranks]) if name in how else value
        for name, value in last["counters"].items()
    }
    return last | {
        "layers": list(layers.values()),
        "ranks": len(ranks),
        "mean_bits": bits,
        "bytes_read_per_step": sum(rank["bytes_read_per_step"] for rank in ranks),
        "clamped_widths": sum(rank["clamped_widths"] for rank in ranks),
        "unknown_rows": max(rank["unknown_rows"] for rank in ranks),
        "gauges": last["gauges"] | {"mean_bits": bits},
        "counters": counters,
    }


def overview(engines: Mapping[str, View]) -> View:
    """One view of all engines: of several, the first one's, and each one's own in `engines`, with
    its `engine_index` as in vLLM's metrics."""
    views = [{"engine_index": int(label), **view} for label, view in engines.items()]
    return views[0] | ({"engines": views} if len(views) > 1 else {})
