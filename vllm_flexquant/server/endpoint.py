# SPDX-License-Identifier: Apache-2.0
"""`GET` and `POST /v1/flexquant`, and our part of `/metrics`.

vLLM's `--api-key` covers what is under `/v1`. Beyond it, changes and what tells of single requests
need the operator's own key, in the header `X-FlexQuant-Key`; a form of another site cannot send it.
"""

from __future__ import annotations

import hmac
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from vllm_flexquant.environment import ENV_PREFIX
from vllm_flexquant.options import METHOD
from vllm_flexquant.server.engine import (
    Engines,
    NoAnswerError,
    OvertakenError,
    View,
    engines_of,
    flexquant_engine,
    overview,
)
from vllm_flexquant.server.messages import BODY_BYTES, read_changes, to_json
from vllm_flexquant.server.metrics import AppendMetrics

if TYPE_CHECKING:
    from argparse import Namespace

    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

PATH = f"/v1/{METHOD}"
TRACE_PATH = f"{PATH}/trace"
OPERATOR_HEADER = "X-FlexQuant-Key"

_READ_ONLY = (
    "this server has no operator key, so its policy can only be looked at; start it with "
    f"{ENV_PREFIX}OPERATOR_KEY set, and send that as header {OPERATOR_HEADER}"
)
_CHANGES = {"content": {"application/json": {"schema": {"type": "object"}}}, "required": True}


class RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FlexQuantEndpoint:
    """vLLM's `EndpointPlugin` protocol."""

    name = METHOD
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route(PATH, self.show, methods=["GET"])
        app.add_api_route(
            PATH, self.change, methods=["POST"], openapi_extra={"requestBody": _CHANGES}
        )
        app.add_api_route(TRACE_PATH, self.trace, methods=["GET"])
        app.add_middleware(AppendMetrics)
        for error in (RefusedError, NoAnswerError, OvertakenError):
            app.add_exception_handler(error, _refuse)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        state.flexquant_engines = engines_of(engine_client)

    async def show(self, request: Request, trace: bool = False) -> Response:
        """Policy, widths now and the table of layers.

        With the operator's key also the running requests, and with `?trace=1` recorded steps.
        """
        engines = _engines(request)
        operator = _is_operator(request, engines, must_be=trace)
        view = overview(await engines.snapshot())
        if trace:
            records = await engines.ask("flexquant_records")
            view = view | {"trace": next(iter(records.values()))[-1]}
        return _answer(view if operator else _public(view))

    async def change(self, request: Request) -> Response:
        """Change the policy; answers as `GET` does, or 400 with nothing changed."""
        engines = _engines(request)
        _is_operator(request, engines, must_be=True)
        body = await _body(request)
        try:
            changes = read_changes(body)
        except ValueError as error:
            raise RefusedError(400, str(error)) from None
        if reason := await engines.change(changes):
            raise RefusedError(400, reason)
        return _answer(overview(await engines.snapshot()))

    async def trace(self, request: Request, engine: int | None = None) -> Response:
        """The recorded steps as a file for `flexquant replay`, of the rank that sees logits; of
        several engines, of the one that `?engine=` gives by its index."""
        engines = _engines(request)
        _is_operator(request, engines, must_be=True)
        found = await engines.ask("flexquant_trace")
        label = next(iter(found)) if engine is None else str(engine)
        if label not in found:
            raise RefusedError(400, f"there is no such engine; engines are {', '.join(found)}")
        content = found[label][-1]
        if isinstance(content, str):
            raise RefusedError(400, content)
        return Response(content, media_type="application/octet-stream")


def _engines(request: Request) -> Engines:
    engines = flexquant_engine(request.app)
    if engines is None:
        raise RefusedError(404, "this server does not run a flexquant model")
    return engines


def _is_operator(request: Request, engines: Engines, must_be: bool) -> bool:
    """Whether the operator's key came with a request; one that came must be right.

    Raises:
        RefusedError: 403 if there is no such key, 401 if it is wrong, or missing where it must be
            there.
    """
    given = request.headers.get(OPERATOR_HEADER)
    if given is None and not must_be:
        return False
    key = engines.operator_key
    if key is None:
        raise RefusedError(403, _READ_ONLY)
    if given is None:
        raise RefusedError(401, f"this is the operator's alone; send the key as {OPERATOR_HEADER}")
    # as bytes, which Starlette reads as latin-1: texts have to be ASCII to be compared
    if not hmac.compare_digest(given.encode("latin-1"), key.get_secret_value().encode()):
        raise RefusedError(401, f"header {OPERATOR_HEADER} is not the operator key of this server")
    return True


async def _body(request: Request) -> bytes:
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > BODY_BYTES:
                raise RefusedError(
                    413, f"the body is larger than {BODY_BYTES} bytes; name options only"
                )
    except ClientDisconnect:
        raise RefusedError(400, "the body ended early") from None
    return bytes(body)


def _public(view: View) -> View:
    """Without what tells of single requests."""
    kept = {name: value for name, value in view.items() if name != "requests"}
    if "engines" in view:
        kept["engines"] = [_public(engine) for engine in view["engines"]]
    return kept


def _answer(content: Any, status: int = 200) -> Response:
    return Response(to_json(content), status, media_type="application/json")


async def _refuse(request: Request, error: Exception) -> Response:
    match error:
        case RefusedError():
            status, message = error.status, str(error)
        case OvertakenError():
            status = 409
            message = f"another change came in between: {error}; look at {PATH} and try again"
        case _:
            status = 503
            message = "an engine does not answer; the server's log has more"
    kind = f"{HTTPStatus(status).phrase.title().replace(' ', '')}Error"
    details = {"message": message, "type": kind, "param": None, "code": status}
    return _answer({"error": details}, status)
