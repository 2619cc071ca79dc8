# SPDX-License-Identifier: Apache-2.0
"""Reads the entropy of every sequence's logits; never changes them.

One class for both of vLLM's interfaces: V1 (`v1.sample.logits_processor`) and V2
(`v1.worker.gpu.sample.logits_processor`, since vLLM 0.31). It is named in
`ModelConfig.logits_processors` only when the quantization method is flexquant: as an entry point it
would load for every model of the environment. Being first in the list, it sees the model's own
logits with masks applied, before penalties and temperature.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as V2LogitsProcessor,
)

from vllm_flexquant.host import runners as hooks
from vllm_flexquant.requests import grant as promise

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

    from vllm_flexquant.planner.planner import Controller

NAME = f"{__name__}:EntropyProcessor"
"""As vLLM wants it in `ModelConfig.logits_processors`."""


class EntropyProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Passes logits to the controller of this worker."""

    def __init__(self, vllm_config: VllmConfig, *_: Any) -> None:
        self._controller: Controller = vllm_config.quant_config.controller
        self._new_slots: list[int] = []

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request (HTTP 400) whose `flexquant_` arguments cannot be kept."""
        promise.check(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """False, although logits stay as they are: V1 skips invariant ones for greedy batches."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """V1: nothing to do, sequences are followed by request."""

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: a new sequence takes slot `req_idx`."""
        hooks.admit(self._controller, req_idx, sampling_params)
        self._new_slots.append(req_idx)
        return True

    def apply_staged_writes(self) -> None:
        """V2: called once per step before the forward pass."""
        self._controller.sequences.forget(self._new_slots)
        self._new_slots.clear()

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Logits [rows, vocabulary] pass through; V2 hands a `LogitsContext`."""
        drafted = ctx is not None and len(ctx.expanded_idx_mapping) != len(ctx.idx_mapping)
        self._controller.after_logits(logits, ctx.expanded_idx_mapping.long() if drafted else None)
        return logits
