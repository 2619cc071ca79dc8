# SPDX-License-Identifier: Apache-2.0
"""What ours is compared with: vLLM's CPU kernels, and ARK where it is installed.

vLLM's own classes choose the kernel for a shape and prepare its weights, as when it loads a
checkpoint. A timed call is the operator that `apply_weights` would reach, without the Python
around it, which torch.compile takes away: the baselines gain from that, not we. That both give
the same output is checked each time.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.kernels.contenders import (
    BOUND_BF16,
    BOUND_INT8,
    Call,
    Contender,
    UnavailableError,
    Weights,
    dequantize_symmetric,
    symmetric_codes,
)

W4_GROUPS = (128, 64)
ARK_MODULE = "auto_round_kernel"
PRIMITIVES = 32
"""oneDNN primitives that vLLM caches for a layer."""


def vllm_contenders(weights: Weights) -> Iterator[Contender | tuple[str, str]]:
    """vLLM's kernels for one weight; (name, reason) for each that cannot run here."""
    try:
        platforms = importlib.import_module("vllm.platforms")
        platforms.current_platform.import_kernels()
        importlib.import_module("vllm._custom_ops")
    except ImportError as error:
        yield "vllm", f"vLLM is not installed ({error})"
        return
    if not hasattr(torch.ops._C, "onednn_mm"):
        yield "vllm", "this build of vLLM has no CPU kernels"
        return
    makers: list[tuple[str, Callable[[], Contender]]] = [
        ("vllm bf16", lambda: _bf16(weights.plain)),
        ("vllm w8a8", lambda: _w8a8(weights.plain, chosen=True)),
        ("vllm w8a8 onednn", lambda: _w8a8(weights.plain, chosen=False)),
    ]
    for group in W4_GROUPS:
        for int8 in (False, True):
            name = f"vllm {'w4a8' if int8 else 'w4a16'} g{group}"
            makers.append((name, _w4_maker(weights.plain, group, int8, name)))
    for name, maker in makers:
        try:
            yield maker()
        except UnavailableError as error:
            yield name, str(error)


def _parameter(tensor: torch.Tensor, **attributes: int) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    for name, value in attributes.items():
        setattr(parameter, name, value)
    return parameter


def _check_same(call: Call, applied: Callable[[torch.Tensor], torch.Tensor], k: int) -> None:
    x = torch.randn(3, k).bfloat16()
    got = call(x)
    assert isinstance(got, torch.Tensor)
    if not torch.equal(got, applied(x)):
        raise RuntimeError("the operator that is timed does not give what vLLM's layer gives")


def _bf16(plain: torch.Tensor) -> Contender:
    """The unquantized layer: the SGL kernel for small weights where AMX is, else oneDNN."""
    utils = importlib.import_module("vllm.model_executor.layers.utils")
    ops = importlib.import_module("vllm._custom_ops")
    weight = plain.bfloat16()
    n, k = weight.shape

    def layer() -> torch.nn.Module:
        made = torch.nn.Module()
        made.weight = _parameter(weight)
        made.bias = None
        utils.dispatch_cpu_unquantized_gemm(made, remove_weight=True)
        return made

    def sgl() -> Call:
        packed = torch.ops._C.convert_weight_packed(weight)
        operator = torch.ops._C.weight_packed_linear.default

        def call(x: torch.Tensor) -> torch.Tensor:
            out = torch.empty((x.shape[0], n), dtype=x.dtype)
            operator(out, x, packed, None, True)
            return out

        return call

    def onednn() -> Call:
        handler = ops.create_onednn_mm(weight.t(), PRIMITIVES)
        operator, pointer = torch.ops._C.onednn_mm.default, handler.handler_tensor

        def call(x: torch.Tensor, keep: object = handler) -> torch.Tensor:
            out = torch.empty((x.shape[0], n), dtype=x.dtype)
            operator(out, x, None, pointer)
            return out

        return call

    small = utils.check_cpu_sgl_kernel(n, k, torch.bfloat16)
    make = sgl if small else onednn
    try:
        make()
    except RuntimeError as error:  # a processor without instructions for bf16
        raise UnavailableError(
            f"oneDNN has no bf16 product here, vLLM falls back to torch's ({str(error)[:80]})"
        ) from None
    whole = layer()
    _check_same(make(), lambda x: whole.cpu_linear(x, whole.weight, None), k)
    return Contender(
        name="vllm bf16",
        family="vllm",
        kernel="_C.weight_packed_linear (SGL)" if small else "_C.onednn_mm (oneDNN)",
        bits=16,
        bytes_read=weight.nbytes,
        bytes_kept=weight.nbytes,
        make=make,
        dequantized=lambda features: weight[features].float(),
        bound=BOUND_BF16,
    )


def _w8a8(plain: torch.Tensor, chosen: bool) -> Contender:
    """Int8 weights per output channel, int8 activations per token, quantized in the call.

    Args:
        chosen: the kernel that vLLM takes here; else its oneDNN path, taken where AMX is missing.
    """
    linear = importlib.import_module("vllm.model_executor.kernels.linear")
    ops = importlib.import_module("vllm._custom_ops")
    n, k = plain.shape
    codes, scales = symmetric_codes(plain, 8, k, torch.float32)
    kernel = linear.init_int8_linear_kernel(
        is_channelwise=True, is_static_input_scheme=False, input_symmetric=True, module_name="bench"
    )
    if type(kernel).__name__ != "CPUInt8ScaledMMLinearKernel":
        raise UnavailableError(f"vLLM takes {type(kernel).__name__} here, which is not measured")
    layer = torch.nn.Module()
    layer.bias, layer.logical_widths = None, [n]
    values = (_parameter(codes.clone()), _parameter(scales.clone()), None, None, None)
    for name, value in zip(kernel.layer_param_names, values, strict=True):
        setattr(layer, name, value)
    with _default_dtype(torch.bfloat16):  # oneDNN's handler takes the output's type from it
        if chosen:
            kernel.process_weights_after_loading(layer)
            sgl = kernel.linear_method == kernel._apply_weights_sgl
        else:
            kernel.process_weights_for_onednn(layer)
            kernel.linear_method = kernel._apply_weights_onednn
            sgl = False
            if not _takes_sgl(n, k):
                raise UnavailableError("it is what vLLM takes here, see 'vllm w8a8'")
    names = kernel.layer_param_names

    def make_sgl() -> Call:
        packed, scale = (getattr(layer, name).detach().clone() for name in names[:2])
        operator = torch.ops._C.int8_scaled_mm_with_quant.default

        def call(x: torch.Tensor) -> torch.Tensor:
            return operator(x, packed, scale, None, x.dtype, True)

        return call

    def make_onednn() -> Call:
        handler = ops.create_onednn_scaled_mm(
            codes.t(), scales, torch.bfloat16, True, False, PRIMITIVES
        )
        adjustment, pointer = getattr(layer, names[4]), handler.handler_tensor
        quantize = torch.ops._C.dynamic_scaled_int8_quant.default
        multiply = torch.ops._C.onednn_scaled_mm.default

        def call(x: torch.Tensor, keep: object = handler) -> torch.Tensor:
            quantized = torch.empty(x.shape, dtype=torch.int8)
            scale = torch.empty((x.shape[0], 1), dtype=torch.float32)
            quantize(quantized, x, scale, None)
            out = torch.empty((x.shape[0], n), dtype=x.dtype)
            multiply(out, quantized, scale, None, adjustment, None, pointer)
            return out

        return call

    make = make_sgl if sgl else make_onednn
    _check_same(make(), lambda x: kernel.apply_weights(layer, x), k)
    return Contender(
        name="vllm w8a8" if chosen else "vllm w8a8 onednn",
        family="vllm",
        kernel="_C.int8_scaled_mm_with_quant (SGL)" if sgl else "_C.onednn_scaled_mm (oneDNN)",
        bits=8,
        bytes_read=codes.nbytes + scales.nbytes,
        bytes_kept=codes.nbytes + scales.nbytes,
        make=make,
        dequantized=dequantize_symmetric(codes, scales),
        bound=BOUND_INT8,
        group_size=k,
    )


def _takes_sgl(n: int, k: int) -> bool:
    """vLLM takes SGL's int8 kernel for this shape."""
    utils = importlib.import_module("vllm.model_executor.layers.utils")
    return bool(utils.check_cpu_sgl_kernel(n, k, torch.int8))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _w4_maker(plain: torch.Tensor, group: int, int8: bool, name: str) -> Callable[[], Contender]:
    return lambda: _w4(plain, group, int8, name)


def _w4(plain: torch.Tensor, group: int, int8: bool, name: str) -> Contender:
    """4-bit weights in groups: activations in bf16 (W4A16), or int8 (what vLLM takes with AMX)."""
    linear = importlib.import_module("vllm.model_executor.kernels.linear")
    quant = importlib.import_module("vllm.model_executor.layers.quantization.utils.quant_utils")
    types = importlib.import_module("vllm.scalar_type").scalar_types
    n, k = plain.shape
    if k % group:
        raise UnavailableError(f"groups of {group} do not divide k = {k}")
    codes, scales = symmetric_codes(plain, 4, group, torch.bfloat16)
    config = linear.MPLinearLayerConfig(
        full_weight_shape=(k, n),
        partition_weight_shape=(k, n),
        weight_type=types.uint4b8,
        act_type=torch.bfloat16,
        group_size=group,
        zero_points=False,
    )
    try:
        kernel_type = linear.choose_mp_linear_kernel(config)
    except ValueError as error:
        raise UnavailableError(f"vLLM has no kernel for it ({error})") from error
    if kernel_type.__name__ != "CPUWNA16LinearKernel":
        raise UnavailableError(f"vLLM takes {kernel_type.__name__} here, which is not measured")
    packed = quant.pack_quantized_values_into_int32(
        codes.to(torch.int32) + 8, types.uint4b8, 1
    )  # [N, K / 8], as compressed-tensors stores it
    layer = torch.nn.Module()
    layer.bias = None
    layer.weight_packed = _parameter(packed, input_dim=1, output_dim=0, packed_dim=1)
    layer.weight_scale = _parameter(scales.clone(), input_dim=1, output_dim=0)
    kernel = kernel_type(config, "weight_packed", "weight_scale", "weight_zero_point")
    with _environment("VLLM_CPU_INT4_W4A8", str(int(int8))):
        kernel.process_weights_after_loading(layer)
    if not int8 and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        raise UnavailableError("vLLM has no cpu_gemm_wna16 for this processor")
    if layer.use_w4a8 != int8:
        raise UnavailableError("vLLM needs AMX for int8 activations with 4-bit weights")
    parts = [
        part.detach()
        for part in (layer.weight_packed, layer.weight_scale, layer.weight_zero_point)
        if part is not None
    ]

    def make_w4a8() -> Call:
        weight, scale, zero = (part.clone() for part in parts)
        operator = torch.ops._C.int4_scaled_mm_cpu.default

        def call(x: torch.Tensor) -> torch.Tensor:
            return operator(x, weight, zero, scale, None)

        return call

    def make_w4a16() -> Call:
        weight, scale = (part.clone() for part in parts)
        operator = torch.ops._C.cpu_gemm_wna16.default

        def call(x: torch.Tensor) -> torch.Tensor:
            out = torch.empty((x.shape[0], n), dtype=x.dtype)
            operator(x, weight, out, scale, None, None, 8, layer.isa_hint)
            return out

        return call

    make = make_w4a8 if int8 else make_w4a16
    _check_same(make(), lambda x: kernel.apply_weights(layer, x), k)
    size = sum(part.nbytes for part in parts)
    return Contender(
        name=name,
        family="vllm",
        kernel="_C.int4_scaled_mm_cpu" if int8 else f"_C.cpu_gemm_wna16 ({layer.isa_hint})",
        bits=4,
        bytes_read=size,
        bytes_kept=size,
        make=make,
        dequantized=dequantize_symmetric(codes, scales),
        bound=BOUND_INT8 if int8 else BOUND_BF16,
        group_size=group,
    )


def ark_contenders(weights: Weights, widths: list[int]) -> Iterator[Contender | tuple[str, str]]:
    """ARK (package auto-round-lib) at each width; one (name, reason) where it cannot be used.

    Its CPU kernels take fp32 activations: with bf16 they write out of bounds (version 0.16.0).
    Its own wrapper, which converts on both sides, is what a bf16 model has to call.
    """
    try:
        ark: Any = importlib.import_module(ARK_MODULE)
    except ImportError as error:
        yield "ark", f"not installed ({error}): pip install auto-round-lib"
        return
    if getattr(ark, "cpu_lib", None) is None:
        yield "ark", "auto-round-lib does not load its CPU library here"
        return
    for width in widths:
        yield _ark(ark, weights, width)


def _ark(ark: Any, weights: Weights, width: int) -> Contender:
    n, k, group = weights.n, weights.k, weights.group_size
    codes, scales = symmetric_codes(weights.plain, width, group, torch.float32)
    form = ("auto", f"int{width}", "fp32", False)  # compute, weight and scale type, asymmetric
    blob = ark.repack_quantized_weight(
        codes.t().contiguous(), scales.t().contiguous(), torch.empty(0, dtype=torch.int8),
        group, *form,
    )  # fmt: skip
    linear = ark.woqgemm_linear

    def make() -> Call:
        copy = blob.clone()

        def call(x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = linear(x, copy, None, n, k, group, *form)
            return out

        return call

    return Contender(
        name=f"ark int{width}",
        family="ark",
        kernel="auto_round_kernel.woqgemm_linear, compute type auto",
        bits=width,
        bytes_read=blob.nbytes,
        bytes_kept=blob.nbytes,
        make=make,
        dequantized=dequantize_symmetric(codes, scales),
        bound=BOUND_INT8,
        group_size=group,
    )
