# SPDX-License-Identifier: Apache-2.0
"""Arrays that policies compute with: NumPy's on a CPU, torch's on a GPU.

A policy is written once, in what both have under the same name. On a CPU NumPy takes a microsecond
per operation where torch takes five, and arrays there are views of the tensors that kernels read;
on a GPU nothing is read back. What the two call differently is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from flexquant_kernels.state import view

__all__ = ["view"]

Array = Any
"""`np.ndarray` or `torch.Tensor`."""


def namespace(like: Array) -> ModuleType:
    """The module whose functions take arrays of this kind."""
    return torch if isinstance(like, torch.Tensor) else np


def tensor(values: Array) -> torch.Tensor:
    """What `view` was given: the same memory."""
    return values if isinstance(values, torch.Tensor) else torch.from_numpy(values)


def host(values: Array) -> np.ndarray:
    """A copy in NumPy; waits for a GPU."""
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else values.copy()


def copied(values: Array) -> Array:
    """A copy of the same kind."""
    return values.clone() if isinstance(values, torch.Tensor) else values.copy()


def integers(values: Array) -> Array:
    """As int32."""
    return values.to(torch.int32) if isinstance(values, torch.Tensor) else values.astype(np.int32)


def floats(values: Array) -> Array:
    """As fp32."""
    return values.float() if isinstance(values, torch.Tensor) else values.astype(np.float32)


def indices(values: Sequence[Any], like: Array) -> Array:
    """int64 beside `like` from numbers or equally long lists of them, without waiting for a GPU."""
    if isinstance(like, torch.Tensor):
        return torch.tensor(values, dtype=torch.long).to(like.device, non_blocking=True)
    return np.array(values, dtype=np.int64)


def ascending(values: Array) -> Array:
    """Sorted along the last axis."""
    return values.sort().values if isinstance(values, torch.Tensor) else np.sort(values)


def largest(values: Array) -> Array:
    """The largest along the last axis."""
    return values.amax(-1) if isinstance(values, torch.Tensor) else values.max(-1)


def numbers(like: Array, count: int | None = None) -> Array:
    """0, 1, ... as many as `like` is long or as `count` says, beside it."""
    count = len(like) if count is None else count
    if isinstance(like, torch.Tensor):
        return torch.arange(count, device=like.device)
    return np.arange(count)
