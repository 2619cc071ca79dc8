# SPDX-License-Identifier: Apache-2.0
"""Requests at the front end: what a request asks for is granted or refused before it is queued.

By the terms of the engine that it is for, whose config the input processor has. A request that is
granted all bits must not begin from keys and values that others left at fewer: it does not read the
prefix cache. What the caller passed stays as it is.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from vllm_flexquant.host import contract
from vllm_flexquant.options import METHOD

if TYPE_CHECKING:
    from vllm.sampling_params import BeamSearchParams
    from vllm.v1.engine import EngineCoreRequest

_BEAM_ARGS = "flexquant_extra_args"
"""Attribute of `BeamSearchParams`."""

_beam_args: ContextVar[Mapping[str, Any] | None] = ContextVar("flexquant_beam_args", default=None)
"""What the beam search asked for whose steps are being queued."""


def install() -> None:
    """Wrap what takes requests in, in a process that has a flexquant engine's config. Idempotent.

    Raises:
        ContractError: vLLM has no such thing.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    contract.wrap(
        InputProcessor,
        "process_inputs",
        _granting,
        why="grant or refuse what a request asks for",
        parameters=("params",),
    )
    _install_beam_search()


def _granting(process_inputs: Callable[..., EngineCoreRequest]) -> Callable[..., EngineCoreRequest]:
    from vllm.exceptions import VLLMValidationError

    def granted_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> EngineCoreRequest:
        config = self.vllm_config.quant_config
        if config is None or config.get_name() != METHOD or not hasattr(params, "extra_args"):
            return process_inputs(self, request_id, prompt, params, *args, **kwargs)
        extra_args = params.extra_args
        if extra_args is None:
            extra_args = _beam_args.get()
        try:
            grant = config.terms.grant(extra_args)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from None  # HTTP 400
        request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
        own = request.sampling_params  # a clone, so the caller's are not touched
        if own is not None:
            if extra_args is not None and own.extra_args is None:
                own.extra_args = dict(extra_args)
            if grant.skip_cache:
                own.skip_reading_prefix_cache = True
        return request

    return granted_inputs


def _install_beam_search() -> None:
    """Carry `vllm_xargs` through online beam search, which drops them.

    Only where the API server has imported it; beam search of an `LLM` takes no such arguments.
    """
    online = sys.modules.get("vllm.entrypoints.generate.beam_search.online")
    if online is None:
        return
    why = "carry vllm_xargs through beam search"
    contract.wrap(
        online.BeamSearchOnlineMixin, "beam_search", _carrying, why=why, parameters=("params",)
    )
    for module, request in (
        ("chat_completion", "ChatCompletionRequest"),
        ("completion", "CompletionRequest"),
    ):
        protocol = sys.modules.get(f"vllm.entrypoints.openai.{module}.protocol")
        if protocol is not None:
            contract.require(protocol, [request], why)
            contract.wrap(getattr(protocol, request), "to_beam_search_params", _noting, why=why)


def _noting(
    to_beam_search_params: Callable[..., BeamSearchParams],
) -> Callable[..., BeamSearchParams]:
    def noted_params(self: Any, *args: Any, **kwargs: Any) -> BeamSearchParams:
        params = to_beam_search_params(self, *args, **kwargs)
        if self.vllm_xargs:
            setattr(params, _BEAM_ARGS, self.vllm_xargs)
        return params

    return noted_params


def _carrying(beam_search: Callable[..., AsyncGenerator[Any]]) -> Callable[..., Any]:
    async def carried_search(
        self: Any, prompt: Any, request_id: str, params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any]:
        asked = getattr(params, _BEAM_ARGS, None)
        async with aclosing(
            beam_search(self, prompt, request_id, params, *args, **kwargs)
        ) as found:
            while True:
                # set for each step of the search: the next one may run in another context
                token = _beam_args.set(asked)
                try:
                    output = await anext(found)
                except StopAsyncIteration:
                    return
                finally:
                    _beam_args.reset(token)
                yield output

    return carried_search
