# SPDX-License-Identifier: Apache-2.0
"""An application made as vLLM makes its own, before engines in this process.

What is sent to the engines goes through vLLM's clients and its serialization, both ways.
"""

from types import SimpleNamespace

import by_hand
from fastapi import FastAPI
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.instrumentator.metrics import attach_router
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.v1.engine import UtilityOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient, DPLBAsyncMPClient
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

from vllm_flexquant.host.worker import FlexWorkerMixin
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.server import FlexQuantEndpoint
from vllm_flexquant.server.engine import engines_of

KEY = "key-of-the-operator"
OPERATOR = {"X-FlexQuant-Key": KEY}
OPTIONS = FlexQuantOptions(operator_key=KEY)


class Rank:
    """A worker that decides nothing: what the RPC promise, of options that are real."""

    def __init__(self, options=OPTIONS, layers=("a", "b")):
        self.options, self.layers = options, layers
        self.asked = []
        self.gauges = {"mean_bits": 6.0, "level": 3, "levels": 9, "request_floor_bits": 0}
        self.counters = {"decode_steps": 2, "decode_step_bits": 9.5, "switches": 1}
        self.counters |= {"clamped_widths": 1, "unknown_rows": 4}
        self.accounts = {
            "fast": {
                "gauges": {"asked_nats": 0.1, "balance_nats": -0.2, "can_be_met": True},
                "counters": {"tokens": 7, "booked_nats": 0.6},
            }
        }
        self.requests = [{"request": "chat-1", "entropy_nats": None, "account": "own", "floor": 2}]

    def flexquant_snapshot(self, fresh):
        self.asked.append("snapshot")
        return {
            "steps": 3,
            "options": self.options.plain(),
            "mean_bits": self.gauges["mean_bits"],
            "bytes_read_per_step": 10,
            "clamped_widths": self.counters["clamped_widths"],
            "unknown_rows": self.counters["unknown_rows"],
            "layers": [{"name": n, "width": 6, "shape": [2, 8]} for n in self.layers],
            "requests": self.requests,
            "gauges": self.gauges,
            "counters": self.counters,
            "accounts": self.accounts,
        }

    def flexquant_change(self, changes, apply):
        self.asked.append("apply" if apply else "check")
        try:
            changed = self.options.changed(changes)
        except ValueError as error:
            return str(error)
        if apply:
            self.options = changed
        return ""

    def flexquant_records(self, clear=False):
        return [{"widths": [6, 6]}]

    def flexquant_trace(self):
        return b"steps of " + self.layers[-1].encode()


class Worker(FlexWorkerMixin):
    """A worker around a planner of hand-made layers: its RPC, without a model."""

    def __init__(self, planner):
        self.planner = planner
        told = by_hand.telemetry(planner)
        self.vllm_config = SimpleNamespace(quant_config=SimpleNamespace(planner=planner))
        self._snapshots, self._recorder, self._speculation = told.snapshots, told.recorder, None


class Core(AsyncMPClient):
    """vLLM's client of one engine, whose core is in this process. engines: ranks of each."""

    def __init__(self, engines):
        self.engine_ranks_managed = list(range(len(engines)))
        self.core_engines = [rank.to_bytes(2, "little") for rank in self.engine_ranks_managed]
        self.core_engine = self.core_engines[0]
        self.ranks = dict(zip(self.core_engines, engines, strict=True))
        self.before_answer = None

    async def _call_utility_async(self, method, *args, engine):
        assert method == "collective_rpc"
        rpc, _, args, kwargs = MsgpackDecoder().decode(MsgpackEncoder().encode(args))
        if self.before_answer is not None:
            await self.before_answer(engine)
        found = [getattr(rank, rpc)(*args, **kwargs or {}) for rank in self.ranks[engine]]
        output = UtilityOutput(0, result=UtilityResult(found))
        return MsgpackDecoder(UtilityOutput).decode(MsgpackEncoder().encode(output)).result.result


class Cores(Core, DPLBAsyncMPClient):
    """Likewise, of several."""


class Client:
    """What the endpoint uses of vLLM's engine client."""

    collective_rpc = AsyncLLM.collective_rpc

    def __init__(self, engines, options=OPTIONS, quantization="flexquant"):
        self.engine_core = (Core if len(engines) == 1 else Cores)(engines)
        self.model_config = SimpleNamespace(
            quantization=quantization, served_model_name="smol", model="/models/smol"
        )
        self.vllm_config = SimpleNamespace(quant_config=SimpleNamespace(options=options))


def application(client, api_key="", root_path=""):
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.root_path = root_path
    attach_router(app)
    FlexQuantEndpoint().attach_router(app)
    init_exception_handler(app)
    if api_key:
        app.add_middleware(AuthenticationMiddleware, tokens=[api_key])
    app.state.flexquant_engines = engines_of(client)
    return app
