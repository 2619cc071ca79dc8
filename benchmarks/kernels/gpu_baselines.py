# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels are compared with on a GPU: torch's own. Untested on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[torch.Tensor], torch.Tensor]

GROUP = 128
INNER_K_TILES = 8


class UnavailableError(RuntimeError):
    """A kernel that this torch or GPU has not; the message says why."""


@dataclass(frozen=True)
class Baseline:
    """make: a call on a copy of the weight in memory of its own. plain: [n, k], what it holds."""

    name: str
    bytes_read: int
    make: Callable[[], Call]
    plain: torch.Tensor


def cublas(n: int, k: int, device: torch.device) -> Baseline:
    """torch's linear in bf16."""
    generator = torch.Generator().manual_seed(n + k)
    weight = (torch.randn(n, k, generator=generator) * 0.02).bfloat16().to(device)

    def make() -> Call:
        copy = weight.clone()
        return lambda x: torch.nn.functional.linear(x, copy)

    return Baseline("torch bf16", weight.nbytes, make, weight)


def torch_int4(n: int, k: int, device: torch.device) -> Baseline:
    """torch's weight-only int4, groups of 128.

    Raises:
        UnavailableError: this torch or GPU has it not for this shape.
    """
    if k % GROUP or device.type != "cuda":
        raise UnavailableError("torch int4 needs a GPU and k in multiples of 128")
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator).to(device)
    scales = torch.full((k // GROUP, n), 0.005, dtype=torch.bfloat16, device=device)
    pairs = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()
    plain = (codes.bfloat16() - 8) * scales[0, 0]

    def make() -> Call:
        halves = (codes[:, ::2] << 4) | codes[:, 1::2]
        packed = torch.ops.aten._convert_weight_to_int4pack(halves.contiguous(), INNER_K_TILES)
        own = pairs.clone()
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, own)

    try:
        make()(torch.zeros(1, k, dtype=torch.bfloat16, device=device))
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        raise UnavailableError(f"torch int4: {str(error).splitlines()[0]}") from error
    return Baseline("torch int4 g128", n * k // 2 + pairs.nbytes, make, plain)


def error_of(baseline: Baseline, x: torch.Tensor) -> float:
    """Relative error (Frobenius) to an fp32 product of the weight that it holds."""
    want = x.float() @ baseline.plain.float().T
    return float((baseline.make()(x).float() - want).norm() / want.norm())
