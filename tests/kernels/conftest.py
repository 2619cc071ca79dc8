# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the kernel tests: nested weights, the native library, poisoned memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from flexquant_kernels import (
    layout_widths,
    load_native,
    native_status,
    pack_planes,
    select_isa,
    supported_isas,
    tile_plane,
    tile_scales,
)
from flexquant_kernels.cpu import native as native_isas

LAYOUTS = [(4, 2, 2), (2, 2, 4), (2, 1, 1, 2, 2)]


@dataclass(frozen=True)
class Weight:
    """One weight in both forms. ``scales`` is fp16 [N, K/g, S, 2]."""

    codes: torch.Tensor
    planes: list[torch.Tensor]
    scales: torch.Tensor
    tiled: list[torch.Tensor]
    tiled_scales: torch.Tensor
    layout: tuple[int, ...]
    group_size: int

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    @property
    def widths(self) -> tuple[int, ...]:
        return layout_widths(self.layout)

    def storage_args(self, bias: torch.Tensor | None = None) -> dict[str, object]:
        """Keyword arguments of the reference functions, less x and width."""
        return {
            "planes": self.planes,
            "scales": self.scales,
            "bias": bias,
            "layout": self.layout,
            "group_size": self.group_size,
            "out_features": self.n,
        }

    def op(
        self, x: torch.Tensor, width: int | torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """flexquant::linear on the tiled form."""
        if isinstance(width, int):
            width = torch.tensor([width], dtype=torch.int32)
        return torch.ops.flexquant.linear(
            x, self.tiled, self.tiled_scales, width, bias, self.layout, self.group_size, self.n, 16
        )


def _make_weight(
    n: int,
    k: int,
    group_size: int = 32,
    layout: tuple[int, ...] = (4, 2, 2),
    shared: bool = False,
    seed: int = 0,
) -> Weight:
    """Uniform codes over about +-2; scales differ a little per width, as refitted ones do."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator)
    planes = pack_planes(codes, layout)
    base = torch.rand(n, k // group_size, 1, generator=generator) * 0.01 + 0.01
    steps = torch.tensor([1.0] if shared else [2.0 ** (8 - b) for b in layout_widths(layout)])
    jitter = 1 + 0.05 * torch.rand(n, k // group_size, len(steps), generator=generator)
    scale = base * steps * jitter
    offset = base * ((steps - 1) / 2 - 127.5) * jitter
    scales = torch.stack([scale, offset], dim=-1).half()
    tiled = [tile_plane(p, w, k) for p, w in zip(planes, layout, strict=True)]
    return Weight(codes, planes, scales, tiled, tile_scales(scales), layout, group_size)


@pytest.fixture(scope="session")
def make_weight() -> Callable[..., Weight]:
    return _make_weight


def _make_logits(rows: int, vocabulary: int, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * vocabulary)
    return torch.randn(rows, vocabulary, generator=generator) * spread


@pytest.fixture(scope="session")
def make_logits() -> Callable[..., torch.Tensor]:
    """Normal logits, fp32 [rows, vocabulary], the same for the same arguments."""
    return _make_logits


def _check_entropy(got: torch.Tensor, logits: torch.Tensor, tolerance: float) -> None:
    p = logits.double().softmax(-1)
    want = -torch.where(p > 0, p * p.log(), 0.0).sum(-1)
    assert (got.dtype, got.shape) == (torch.float32, logits.shape[:1])
    torch.testing.assert_close(got.double().cpu(), want, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="session")
def check_entropy() -> Callable[[torch.Tensor, torch.Tensor, float], None]:
    """Asserts that entropies are those of the rows of logits in fp64, within a tolerance."""
    return _check_entropy


EXTREME = [[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38], [1e4, 1e4, -1e4], [-200.0, -1e30, -200.0]]


@pytest.fixture(scope="session")
def extreme_logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits fp32 [4, 3] near the ends of fp32, and their entropies."""
    return torch.tensor(EXTREME), torch.tensor([0.0, 3.0, 2.0, 2.0]).log().clamp(min=0)


@pytest.fixture(scope="session")
def native() -> str:
    """Path of the native library; skips the test where the machine cannot have it."""
    status = load_native()
    if not status.loaded:
        pytest.skip(f"native kernels not available: {status.reason}")
    assert status.path is not None
    return status.path


@pytest.fixture
def selected(native) -> Iterator[str]:
    """The instruction set in use at the start of the test, selected again after it."""
    before = native_status().isa
    yield before
    select_isa(before)


@pytest.fixture(params=native_isas.isas_of_machine())
def isa(request, selected) -> str:
    """Each instruction set of this machine, selected; the others are skipped."""
    if request.param not in supported_isas():
        lacks = native_isas.why_not(request.param) or "the operating system does not offer it"
        pytest.skip(f"{request.param} cannot run here: {lacks}")
    return select_isa(request.param)


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Every torch.empty, also from C++, is filled with NaN (floats) or the largest integer."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(64).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
