# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` for each engine of `configurations`, up at the same time; all but one are stopped.

    with serving(specs, logs, arguments, environ) as servers:
        for name in ...:
            with awake(servers[name]) as server:
                ...  # it answers at server.url; the others take no time from it

A server is what a user would start: `vllm serve`, its API process beside its worker, which vLLM
binds to all cores but one.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from benchmarks.serving.configurations import CALIBRATED_ENGINE, Configuration
from benchmarks.serving.engine import FRESH, MAX_MODEL_LEN, MAX_SEQS, EngineSpec
from benchmarks.serving.process import reason
from demo.server import ServerError, VllmServer

MODEL = "bench"
"""The name that every server gives its model."""

PATH = "/v1/flexquant"


def arguments_of(spec: EngineSpec) -> list[str]:
    """Of `vllm serve`, after the model: what `spec` says of `vllm.LLM`."""
    arguments = ["--served-model-name", MODEL, "--dtype", spec.dtype]
    arguments += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_SEQS)]
    # prompts come again each round; a cached one would cost nothing
    arguments += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    if not spec.compiled:
        arguments.append("--enforce-eager")
    for name, value in spec.arguments.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    return arguments


def is_flexquant(spec: EngineSpec) -> bool:
    """Whether the engine can be told at what precision to run."""
    return spec.name == CALIBRATED_ENGINE or spec.arguments.get("quantization") == "flexquant"


def environ_of(spec: EngineSpec) -> dict[str, str]:
    """Environment of `vllm serve`."""
    # vLLM serves only the endpoints of plugins that are named; stock engines get no plugin
    plugin = {"VLLM_PLUGINS": "flexquant" if is_flexquant(spec) else ""}
    return plugin | {"HF_HUB_OFFLINE": "1"} | spec.environ


def end_with_servers() -> None:
    """Let a SIGTERM to this process end it as an interrupt does, so that servers are stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


@contextmanager
def serving(
    specs: Sequence[EngineSpec],
    logs: Path,
    arguments: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    unavailable: dict[str, str] | None = None,
) -> Iterator[dict[str, VllmServer]]:
    """All servers by name, started one after another and stopped where they are.

    Args:
        arguments, environ: added to those of every server.
        unavailable: gets the reason of each server that does not start.

    Raises:
        ServerError: one does not start, and `unavailable` is None.
    """
    with ExitStack() as stack:
        servers = {}
        for spec in specs:
            server = VllmServer(
                spec.model,
                [*arguments_of(spec), *arguments],
                environ_of(spec) | dict(environ or {}),
                logs / f"{spec.name}.log",
            )
            try:
                servers[spec.name] = stack.enter_context(server)
            except ServerError as error:
                if unavailable is None:
                    raise
                unavailable[spec.name] = reason(str(error))
                continue
            server.pause()
        yield servers


@contextmanager
def awake(server: VllmServer) -> Iterator[VllmServer]:
    """Let a server go on for a while."""
    server.resume()
    try:
        yield server
    finally:
        server.pause()


def use(server: VllmServer, configuration: Configuration) -> None:
    """Make a server that is awake run as `configuration` says, with an account of its own.

    Raises:
        ServerError: it refuses.
    """
    if configuration.change is None:
        return
    if configuration.change.get("policy") == "budget":
        ask(server, FRESH)
    ask(server, configuration.change)


def ask(server: VllmServer, change: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`POST /v1/flexquant` with a change, or `GET` without one; the answer.

    Raises:
        ServerError: the server refuses.
    """
    request = Request(f"{server.url}{PATH}")
    if change is not None:
        request.data = json.dumps(change).encode()
        request.add_header("Content-Type", "application/json")
    try:
        with urlopen(request, timeout=60) as answer:
            return dict(json.load(answer))
    except HTTPError as error:
        reason = error.read().decode(errors="replace")
        raise ServerError(f"the server refused {change}: {reason}") from None
