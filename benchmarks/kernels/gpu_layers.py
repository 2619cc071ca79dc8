# SPDX-License-Identifier: Apache-2.0
"""Linear layers to be timed on a GPU: nested weights of random codes, and their copies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from flexquant_kernels import layout_widths, pack, reference

GROUP_SIZE = 64
ERROR = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Largest error of a value to the reference, relative to the largest value: about two roundings of
the output, since the interpreter truncates."""

DEQUANTIZED_ERROR = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""The same where the weight was rounded to the dtype first."""


@dataclass(frozen=True)
class NestedLayer:
    """A weight [n, k] in storage form and in that of the Triton kernels, on one device."""

    n: int
    k: int
    layout: tuple[int, ...]
    planes: list[torch.Tensor]
    scales: torch.Tensor
    weight: Any
    group_size: int = GROUP_SIZE

    @property
    def widths(self) -> tuple[int, ...]:
        return layout_widths(self.layout)

    def bytes_read(self, width: int) -> int:
        """Planes and scales at a width."""
        return self.n * self.k * width // 8 + self.n * (self.k // self.group_size) * 4

    def copies(self, count: int) -> list[Any]:
        """The weight and further ones in memory of their own."""
        first = self.weight
        more = [
            replace(
                first,
                planes=tuple(plane.clone() for plane in first.planes),
                scales=first.scales.clone(),
                counters=first.counters.clone(),
            )
            for _ in range(count - 1)
        ]
        return [first, *more]

    def error(self, got: torch.Tensor, x: torch.Tensor, width: int) -> float:
        """Largest error of a product to the reference, relative to the largest value of that."""
        want = reference.linear(
            x.float(), self.planes, self.scales, width, None, self.layout, self.group_size, self.n
        )
        return float((got.float() - want).abs().max() / want.abs().max())


def make_layer(n: int, k: int, layout: tuple[int, ...], device: torch.device) -> NestedLayer:
    """Random codes, scales about alike at all widths; the same on every machine."""
    from flexquant_kernels.triton import relay

    generator = torch.Generator().manual_seed(n * 31 + k)
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator).to(device)
    planes = pack.pack_planes(codes, layout)
    steps = torch.tensor([2.0 ** (8 - width) for width in layout_widths(layout)])
    jitter = 1 + 0.1 * torch.rand(n, k // GROUP_SIZE, 1, generator=generator)
    pairs = [jitter * steps * 1e-3, jitter * ((steps - 1) / 2 - 127.5) * 1e-3]
    scales = torch.stack(pairs, dim=-1).half().to(device)
    weight = relay(planes, scales, layout, GROUP_SIZE, k)
    return NestedLayer(n, k, layout, planes, scales, weight)


def activations(rows: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normal numbers [rows, k], the same on every machine."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, k, generator=generator).to(dtype).to(device)
