# SPDX-License-Identifier: Apache-2.0
"""`GET` and `POST /v1/flexquant`, covered by vLLM's `--api-key` as all paths under `/v1`; and our
part of `/metrics`, which is not, as vLLM's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from vllm_flexquant.options import METHOD, PolicyUpdate
from vllm_flexquant.server.engine import flexquant_engine
from vllm_flexquant.server.metrics import AskBeforeMetrics

if TYPE_CHECKING:
    from argparse import Namespace

    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

PATH = f"/v1/{METHOD}"
TRACE_PATH = f"{PATH}/trace"


class FlexQuantEndpoint:
    """vLLM's `EndpointPlugin` protocol."""

    name = METHOD
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route(PATH, self.show, methods=["GET"])
        app.add_api_route(PATH, self.change, methods=["POST"])
        app.add_api_route(TRACE_PATH, self.trace, methods=["GET"])
        app.add_middleware(AskBeforeMetrics)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        state.flexquant_engine = engine_client

    async def show(self, request: Request) -> JSONResponse:
        """Policy, widths now, entropies and the table of layers; `?trace=1` adds recorded steps."""
        engine = flexquant_engine(request.app)
        if engine is None:
            return _refusal(404, "this server does not run a flexquant model")
        ranks = await engine.collective_rpc("flexquant_status")
        view = _merge(ranks)
        if request.query_params.get("trace") == "1":
            view["trace"] = (await engine.collective_rpc("flexquant_trace"))[-1]
        return JSONResponse(view)

    async def change(self, request: Request) -> JSONResponse:
        """Change the policy; answers as `GET` does, or 400 with nothing changed."""
        engine = flexquant_engine(request.app)
        if engine is None:
            return _refusal(404, "this server does not run a flexquant model")
        try:
            body = json.loads(await request.body())
        except ValueError:
            return _refusal(400, "the body is not valid JSON")
        if not isinstance(body, dict):
            return _refusal(400, f'the body is {body!r}; give an object, as in {{"width": 6}}')
        try:
            PolicyUpdate.read(body)
        except ValueError as error:
            return _refusal(400, str(error))
        reasons = await engine.collective_rpc("flexquant_update", args=(body,))
        if reason := next((r for r in reasons if r), ""):
            return _refusal(400, reason)
        return await self.show(request)

    async def trace(self, request: Request) -> Response:
        """The recorded steps as a file for `flexquant replay`, of the rank that sees logits."""
        engine = flexquant_engine(request.app)
        if engine is None:
            return _refusal(404, "this server does not run a flexquant model")
        found = (await engine.collective_rpc("flexquant_steps_trace"))[-1]
        if isinstance(found, str):
            return _refusal(400, found)
        return Response(found, media_type="application/octet-stream")


def _refusal(status: int, message: str) -> JSONResponse:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": status}
    return JSONResponse({"error": error}, status_code=status)


def _merge(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One view of all ranks: the layers of all pipeline stages, entropies of the one that sees
    logits; tensor-parallel ranks hold shards of the same layers."""
    last = dict(ranks[-1])
    layers: dict[str, dict[str, Any]] = {}
    for rank in ranks:
        for layer in rank["layers"]:
            layers.setdefault(layer["name"], layer)
    last["layers"] = list(layers.values())
    last["ranks"] = len(ranks)
    weights = [layer["shape"][0] * layer["shape"][1] for layer in last["layers"]]
    widths = [layer["width"] for layer in last["layers"]]
    total = sum(n * w for n, w in zip(weights, widths, strict=True))
    last["mean_bits"] = total / max(sum(weights), 1)
    for name in ("bytes_read_per_step", "clamped_widths"):
        last[name] = sum(rank[name] for rank in ranks)
    return last
