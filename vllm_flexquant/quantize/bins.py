# SPDX-License-Identifier: Apache-2.0
"""Tokens in bins of an entropy, the last one open."""

from __future__ import annotations

import torch

BIN_NATS, BINS = 0.25, 32


def mean_by_bin(nats: torch.Tensor, values: torch.Tensor) -> tuple[float, ...]:
    """Mean of `values` in each bin, smoothed over the others by how near they are: every bin has
    one.

    Args:
        nats, values: fp32 [tokens].
    """
    number = _numbers(nats)
    count = torch.bincount(number, minlength=BINS).double()
    total = torch.bincount(number, values.double(), minlength=BINS)
    apart = torch.arange(BINS)[:, None] - torch.arange(BINS)[None, :]
    near = torch.exp(-2.0 * apart.abs().double())
    return tuple(((near @ total) / (near @ count)).tolist())


def share_by_bin(nats: torch.Tensor) -> tuple[float, ...]:
    """Share of the tokens in each bin, not smoothed; `nats` is fp32 [tokens]."""
    count = torch.bincount(_numbers(nats), minlength=BINS).double()
    return tuple((count / len(nats)).tolist())


def _numbers(nats: torch.Tensor) -> torch.Tensor:
    return (nats / BIN_NATS).long().clamp(0, BINS - 1)
