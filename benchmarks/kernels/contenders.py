# SPDX-License-Identifier: Apache-2.0
"""What is timed: one linear layer [N, K], made by different kernels from the same fp32 weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch.nn import functional

from flexquant_kernels import dispatch, pack, reference
from vllm_flexquant.format.layout import PlaneLayout
from vllm_flexquant.quantize.rtn import quantize_rtn

Call = Callable[[torch.Tensor], object]
"""One product: x [rows, K] -> [rows, N] (a plain read takes x and ignores it)."""

ALL_WIDTHS = PlaneLayout((2, 1, 1, 2, 2))
"""Weights are quantized once, with scales for each of these widths; other layouts take subsets."""

WEIGHT_STD = 0.02
BOUND_FP32 = 1e-5
BOUND_BF16 = 5e-3
BOUND_INT8 = 2e-2


class UnavailableError(RuntimeError):
    """A kernel cannot be timed here; the message is a clause that says why."""


@dataclass
class Contender:
    """One kernel on one weight.

    bytes_read: weights, scales and offsets that one call reads. bytes_kept: of one copy.
    dequantized: fp32 rows of the weight that the kernel holds; the argument picks output features.
    bound: relative error (Frobenius) to an fp32 product of that weight that its arithmetic allows.
    make: a further copy in memory of its own. copies: those there are, the first always.
    """

    name: str
    family: str
    kernel: str
    bits: int
    bytes_read: int
    bytes_kept: int
    make: Callable[[], Call]
    dequantized: Callable[[torch.Tensor], torch.Tensor] | None
    bound: float
    activations: torch.dtype = torch.bfloat16
    group_size: int | None = None
    layout: str | None = None
    copies: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.grow(1)

    def grow(self, count: int) -> None:
        """Have `count` copies at least."""
        while len(self.copies) < count:
            self.copies.append(self.make())

    def facts(self) -> dict[str, Any]:
        """What the JSON says of it."""
        return {
            "family": self.family,
            "kernel": self.kernel,
            "bits": self.bits,
            "layout": self.layout,
            "group_size": self.group_size,
            "activations": str(self.activations).removeprefix("torch."),
            "bytes_read": self.bytes_read,
        }


@dataclass(frozen=True)
class Weights:
    """A weight and its nested form.

    plain: fp32 [N, K]. codes: uint8 [N, K]. scales: fp16 [N, K/g, 5, 2], see `ALL_WIDTHS`.
    """

    plain: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    group_size: int

    @property
    def n(self) -> int:
        return self.plain.shape[0]

    @property
    def k(self) -> int:
        return self.plain.shape[1]

    def nested(self, layout: PlaneLayout) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Planes and scales in storage form (see `pack.py`)."""
        sets = [ALL_WIDTHS.widths.index(width) for width in layout.widths]
        return pack.pack_planes(self.codes, layout.planes), self.scales[:, :, sets].contiguous()


def make_weights(n: int, k: int, group_size: int, seed: int = 0) -> Weights:
    """Normal weights [n, k], rounded to nearest; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(n, k, generator=generator) * WEIGHT_STD
    quantized = quantize_rtn(plain, ALL_WIDTHS, group_size)
    return Weights(plain, quantized.codes, quantized.scales, group_size)


def make_activations(rows: int, k: int, seed: int = 1) -> torch.Tensor:
    """Normal activations, bf16 [rows, k]; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, k, generator=generator).bfloat16()


def flexquant_name(layout: str, width: int) -> str:
    """Name of our kernel at one width."""
    return f"flexquant {layout} at {width} bit"


@dataclass
class Nested:
    """Our kernel on one layout: what the gate needs beside the contenders."""

    layout: PlaneLayout
    planes: list[torch.Tensor]
    scales: torch.Tensor
    group_size: int
    dispatch: str
    """Why this kernel."""
    contenders: dict[int, Contender]
    """By width."""

    def reference(
        self,
        function: Callable[..., torch.Tensor],
        x: torch.Tensor,
        width: int,
        features: torch.Tensor,
    ) -> torch.Tensor:
        """`reference.linear` or `reference.linear_int8` of x for some output features."""
        return function(
            x,
            [plane[features] for plane in self.planes],
            self.scales[features],
            width,
            None,
            self.layout.planes,
            self.group_size,
            len(features),
        )


def make_nested(weights: Weights, layout: PlaneLayout) -> Nested:
    """Our kernel at each width of a layout.

    Raises:
        UnavailableError: the dispatch takes the plain-torch reference here.
    """
    n, k, group = weights.n, weights.k, weights.group_size
    choice = dispatch("cpu", torch.bfloat16, k, n, group, layout.planes)
    if not choice.tile:
        raise UnavailableError(choice.reason)
    planes, scales = weights.nested(layout)
    tiled = [
        pack.tile_plane(plane, bits, k, choice.tile)
        for plane, bits in zip(planes, layout.planes, strict=True)
    ]
    tiled_scales = pack.tile_scales(scales, choice.tile)
    read_up_to = list(accumulate(plane.nbytes for plane in tiled))
    kept = read_up_to[-1] + tiled_scales.nbytes
    operator = torch.ops.flexquant.linear.default

    def maker(width: int) -> Callable[[], Call]:
        bits = torch.tensor([width], dtype=torch.int32)

        def make() -> Call:
            copies, scales_copy = [plane.clone() for plane in tiled], tiled_scales.clone()

            def call(x: torch.Tensor) -> torch.Tensor:
                return operator(
                    x, copies, scales_copy, bits, None, layout.planes, group, n, choice.tile
                )

            return call

        return make

    def rows_at(width: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def rows(features: torch.Tensor) -> torch.Tensor:
            return reference.dequantize(
                [plane[features] for plane in planes],
                scales[features],
                layout.planes,
                width,
                group,
                len(features),
            )

        return rows

    contenders = {
        width: Contender(
            name=flexquant_name(str(layout), width),
            family="flexquant",
            kernel=choice.name,
            bits=width,
            bytes_read=read_up_to[index] + tiled_scales[0].nbytes,
            bytes_kept=kept,
            make=maker(width),
            dequantized=rows_at(width),
            bound=BOUND_INT8,
            group_size=group,
            layout=str(layout),
        )
        for index, width in enumerate(layout.widths)
    }
    return Nested(layout, planes, scales, group, choice.reason, contenders)


def torch_contenders(weights: Weights) -> Iterator[Contender]:
    """`F.linear` in fp32 and bf16, activations in the same type."""
    for dtype, name, bound in (
        (torch.float32, "fp32", BOUND_FP32),
        (torch.bfloat16, "bf16", BOUND_BF16),
    ):
        yield _torch_contender(weights.plain.to(dtype), name, bound)


def _torch_contender(weight: torch.Tensor, name: str, bound: float) -> Contender:
    def make() -> Call:
        copy = weight.clone()

        def call(x: torch.Tensor) -> torch.Tensor:
            return functional.linear(x, copy)

        return call

    return Contender(
        name=f"torch {name}",
        family="torch",
        kernel="torch.nn.functional.linear",
        bits=weight.itemsize * 8,
        bytes_read=weight.nbytes,
        bytes_kept=weight.nbytes,
        make=make,
        dequantized=lambda features: weight[features].float(),
        bound=bound,
        activations=weight.dtype,
    )


def symmetric_codes(
    weight: torch.Tensor, bits: int, group_size: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight fp32 [N, K] -> codes int8 [N, K] around 0, scales [N, K/g], rounded to nearest."""
    n, k = weight.shape
    groups = weight.view(n, k // group_size, group_size)
    top = (1 << (bits - 1)) - 1
    scales = (groups.abs().amax(-1) / top).to(scale_dtype)
    codes = (groups / scales.float().unsqueeze(-1)).round_().clamp_(-top - 1, top)
    return codes.to(torch.int8).view(n, k), scales


def dequantize_symmetric(
    codes: torch.Tensor, scales: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The inverse of `symmetric_codes` for some output features, in fp32."""

    def rows(features: torch.Tensor) -> torch.Tensor:
        part, scale = codes[features], scales[features].float()
        return (part.view(*scale.shape, -1).float() * scale.unsqueeze(-1)).flatten(1)

    return rows


def by_name(contenders: Sequence[Contender]) -> dict[str, Contender]:
    """Contenders by their names, which differ."""
    named = {contender.name: contender for contender in contenders}
    assert len(named) == len(contenders)
    return named
