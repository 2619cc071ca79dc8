# SPDX-License-Identifier: Apache-2.0
"""How far one distribution over the vocabulary is from another."""

from __future__ import annotations

import torch


def compare(reference: torch.Tensor, served: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(reference || served) in nats, fp32 [rows], and whether the most likely token is the same.

    Args:
        reference, served: fp32 log-probabilities [rows, vocabulary].
    """
    p = reference.exp()
    # a token that the reference excludes adds nothing, whatever the other says
    kl = torch.where(p > 0, p * (reference - served), 0.0).sum(-1)
    return kl, reference.argmax(-1) == served.argmax(-1)
