# SPDX-License-Identifier: Apache-2.0
"""Calibration tokens on their way through the blocks of a model, in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_flexquant.quantize.blocks import BlockModel, Unit
from vllm_flexquant.quantize.gptq import accumulate_hessian

_BATCH_TOKENS = 4096
_SHORT = 16
"""Tokens that tell which layers share an input."""


class Batches:
    """`tokens`, int64 [sequences, length], cut for `model`; of hidden states one tensor a batch."""

    def __init__(self, model: BlockModel, tokens: torch.Tensor) -> None:
        self.model = model
        self.tokens = list(tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1])))

    def embed(self) -> list[torch.Tensor]:
        """What the first block is given, fp32 [B, T, H] each."""
        return [self.model.embed(batch) for batch in self.tokens]

    def units(self, index: int) -> list[Unit]:
        """Units of block `index`, which must be loaded, in the order in which they run."""
        return self.model.units(index, self.model.embed(self.tokens[0][:1, :_SHORT]))

    def forward(self, index: int, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What block `index`, which must be loaded, makes of each batch."""
        after = []
        for batch, given in zip(self.tokens, hidden, strict=True):
            self.model.match(batch)
            after.append(self.model.run(index, given))
        return after

    def hessians(
        self, index: int, units: Sequence[Unit], hidden: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Mean of x xᵀ over all tokens for block `index`, fp32 [K, K] of each unit by name."""
        device = self.model.device
        hessians = {u.name: torch.zeros(u.columns, u.columns, device=device) for u in units}
        seen = dict.fromkeys(hessians, 0)

        def note(unit: Unit, inputs: torch.Tensor) -> None:
            seen[unit.name] = accumulate_hessian(hessians[unit.name], inputs, seen[unit.name])

        with self.model.watching(index, units, note):
            self.forward(index, hidden)
        return hessians
