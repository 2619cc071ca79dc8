# SPDX-License-Identifier: Apache-2.0
"""What entropy tells of how much precision a token needs: its KL over that of the average token."""

from __future__ import annotations

import torch

from vllm_flexquant.format.record import NeedRecord
from vllm_flexquant.policy.entropy import averaged
from vllm_flexquant.quantize.bins import BIN_NATS, mean_by_bin

DECAY = 0.5
"""Of the moving average, as the engine's default."""


def need_of_entropy(kl: torch.Tensor, entropy: torch.Tensor, length: int) -> NeedRecord:
    """Mean need by a token's own entropy, and by the average of those before it.

    Args:
        kl, entropy: fp32 [tokens], in nats, of sequences of `length` one after another.
    """
    need = kl / kl.mean()
    before, known = _average_before(entropy.reshape(-1, length))
    return NeedRecord(
        bin_nats=BIN_NATS,
        by_entropy=mean_by_bin(entropy, need),
        by_average=mean_by_bin(before[known], need[known]),
        decay=DECAY,
    )


def _average_before(entropy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The engine's average before each token of [sequences, length], and whether there is one.

    Both flat, fp32 and bool.
    """
    average, known = torch.zeros_like(entropy), torch.zeros(entropy.shape, dtype=torch.bool)
    for i in range(1, entropy.shape[1]):
        average[:, i] = averaged(average[:, i - 1], known[:, i - 1], entropy[:, i - 1], DECAY)
        known[:, i] = True
    return average.flatten(), known.flatten()
