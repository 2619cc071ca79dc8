# SPDX-License-Identifier: Apache-2.0
"""gemlite and vLLM's Marlin as baselines on a GPU: 4 and 8 bit, groups of 64, bf16 activations.

Written from the sources of gemlite 0.6 and vLLM 0.32, and never run: what one of them cannot do is
said, not timed. Nothing is imported before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.kernels.gpu_baselines import Baseline, Call, UnavailableError

GROUP = 64
MARLIN_BLOCKS = 4
"""Of a multiprocessor that Marlin's locks must serve; as vLLM 0.32 makes them."""


def quantized(n: int, k: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random weights: codes uint8 [n, k] and scales bf16 [n, k / 64], different in each group.

    A weight is ``(code - 2 ** (bits - 1)) * scale``.
    """
    generator = torch.Generator().manual_seed(n + k + bits)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(n, k // GROUP, generator=generator) + 0.5) * 0.08 / (1 << bits)
    return codes, scales.bfloat16()


def dequantized(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The weights that those are, rounded to bf16 [n, k]."""
    centred = codes.bfloat16() - (1 << (bits - 1))  # exact: at most 8 bits
    return centred * scales.repeat_interleave(GROUP, dim=1)


def gptq_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [n, k] -> int32 [k * bits / 32, n], lower k in lower bits: GPTQ's packing."""
    n, k = codes.shape
    each = 32 // bits
    rows = codes.T.reshape(k // each, each, n)
    words = torch.zeros(k // each, n, dtype=torch.int32, device=codes.device)
    for i in range(each):
        words |= rows[:, i].int() << bits * i
    return words


def _baseline(
    name: str,
    shape: tuple[int, int, int],
    device: torch.device,
    pack: Callable[[torch.Tensor, torch.Tensor], Call],
    bytes_for_a_group: int,
) -> Baseline:
    """`pack` makes a call from codes and scales on the device, in memory of its own."""
    n, k, bits = shape
    codes, scales = (t.to(device) for t in quantized(n, k, bits))
    bytes_read = n * k * bits // 8 + n * (k // GROUP) * bytes_for_a_group
    return Baseline(name, bytes_read, lambda: pack(codes, scales), dequantized(codes, scales, bits))


def _check(name: str, k: int, device: torch.device) -> None:
    if device.type != "cuda":
        raise UnavailableError(f"{name} needs a GPU")
    if k % GROUP:
        raise UnavailableError(f"{name} is measured with groups of {GROUP}, and k is {k}")


def gemlite(n: int, k: int, bits: int, device: torch.device) -> Baseline:
    """gemlite's weight-only linear with a scale and a zero for each group.

    Args:
        bits: 4 or 8.

    Raises:
        UnavailableError: it cannot be imported, or not be used for this shape or device.
    """
    name = f"gemlite W{bits}A16 g{GROUP}"
    _check(name, k, device)
    try:
        from gemlite import helper

        kind = {4: helper.A16W4_HQQ_INT, 8: helper.A16W8_HQQ_INT}[bits]
    except (ImportError, AttributeError) as error:
        raise UnavailableError(f"gemlite cannot be imported: {error}") from error

    def pack(codes: torch.Tensor, scales: torch.Tensor) -> Call:
        zeros = torch.full_like(scales, 1 << (bits - 1))
        # It takes a weight for (code - zero) * scale, and rearranges what it is given.
        layer: Call = kind(device=str(device), dtype=torch.bfloat16).from_weights(
            codes.clone(), scales.clone(), zeros
        )
        return layer

    return _baseline(name, (n, k, bits), device, pack, bytes_for_a_group=4)


def marlin(n: int, k: int, bits: int, device: torch.device) -> Baseline:
    """Marlin as vLLM compiles it, on symmetric codes.

    Args:
        bits: 4 or 8.

    Raises:
        UnavailableError: vLLM cannot be imported, or has no Marlin for this shape or device.
    """
    name = f"Marlin W{bits}A16 g{GROUP}"
    _check(name, k, device)
    try:
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.quantization.utils import marlin_utils
        from vllm.scalar_type import scalar_types
    except ImportError as error:
        raise UnavailableError(f"Marlin comes with vLLM, which cannot be imported: {error}") from (
            error
        )
    compiled = getattr(torch.ops, "_C", None)
    missing = [x for x in ("gptq_marlin_repack", "marlin_gemm") if not hasattr(compiled, x)]
    if missing:
        raise UnavailableError(f"this build of vLLM has no {' and no '.join(missing)}")
    kind = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}[bits]
    if not marlin_utils.check_marlin_supported(kind, GROUP):
        raise UnavailableError(f"Marlin does not take {kind} in groups of {GROUP} on this GPU")
    fits, why = marlin_utils.check_marlin_supports_shape(n, k, k, GROUP)
    if not fits:
        raise UnavailableError(f"Marlin: {why}")

    def pack(codes: torch.Tensor, scales: torch.Tensor) -> Call:
        words = ops.gptq_marlin_repack(gptq_words(codes, bits), k, n, bits)
        own = marlin_utils.marlin_permute_scales(scales.T.contiguous(), k, n, GROUP)
        locks = marlin_utils.marlin_make_workspace_new(device, MARLIN_BLOCKS)
        no_zeros = torch.empty(0, dtype=torch.int32, device=device)

        def call(x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = ops.marlin_gemm(
                x, None, words, None, own, None, None, no_zeros, locks, kind,
                size_m=x.shape[0], size_n=n, size_k=k, use_fp32_reduce=True,
            )  # fmt: skip
            return out

        return call

    return _baseline(name, (n, k, bits), device, pack, bytes_for_a_group=2)
