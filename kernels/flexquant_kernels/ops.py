# SPDX-License-Identifier: Apache-2.0
"""``flexquant::`` operators: schemas, fakes, plain-torch implementation and the choice of kernel.

The plain-torch reference is registered under CompositeExplicitAutograd, so every device has an
implementation. ``load_native`` adds the CPU key from C++, which then takes precedence on CPU
tensors and hands what it does not cover (tile 0, other layouts) to
``flexquant::linear_reference``. On GPUs, weights in the form of ``triton/layout.py`` go through
``flexquant::linear_relaid``, and ``flexquant::entropy`` takes the Triton kernel where there is one.

Importing this module registers the operators and does nothing else: it neither builds nor loads.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from . import gpu, reference
from .cpu import build as cpu_build
from .cpu import native
from .pack import GROUP_SIZES, K_MULTIPLE, TILE, check_layout, clamp_width

logger = logging.getLogger("vllm_flexquant.kernels")

NAMESPACE = "flexquant"
NATIVE_LAYOUTS: frozenset[tuple[int, ...]] = frozenset({(4, 2, 2), (2, 2, 4), (2, 1, 1, 2, 2)})
NATIVE_DTYPES: frozenset[torch.dtype] = frozenset({torch.float32, torch.bfloat16, torch.float16})
TRITON_DTYPES: frozenset[torch.dtype] = frozenset({torch.bfloat16, torch.float16})

INT8_KERNELS = "cpu_"
"""How the names of kernels begin that quantize activations to int8."""

_LINEAR_SIGNATURE = (
    "(Tensor x, Tensor[] planes, Tensor scales, Tensor width, Tensor? bias, int[] layout, "
    "int group_size, int out_features, int tile) -> Tensor"
)
_SCHEMAS = {
    "linear": _LINEAR_SIGNATURE,
    "linear_reference": _LINEAR_SIGNATURE,
    # `counters` is written, but is what it was when the call is over, so no caller can tell. If it
    # were declared as mutated, torch.compile would copy it before each call or write it back after.
    "linear_relaid": (
        "(Tensor x, Tensor[] planes, Tensor scales, Tensor counters, Tensor width, Tensor? bias, "
        "int[] layout, int group_size, int out_features) -> Tensor"
    ),
    "entropy": "(Tensor logits) -> Tensor",
}


_clamped = 0  # reference calls of linear whose width was outside the layout
_clamped_lock = threading.Lock()


def _note_clamped(wanted: int, used: int, layout: Sequence[int]) -> None:
    global _clamped
    with _clamped_lock:
        _clamped += 1
        first = _clamped == 1
    if first:
        logger.warning(
            "flexquant::linear was asked for width %d, which is not in layout %s, and uses %d; "
            "further ones are counted, not reported",
            wanted,
            tuple(layout),
            used,
        )


def clamped_calls() -> int:
    """Calls of ``linear`` in this process whose width was outside the layout, on any path."""
    return _clamped + native.clamped_calls()


def _linear(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    width: torch.Tensor,
    bias: torch.Tensor | None,
    layout: Sequence[int],
    group_size: int,
    out_features: int,
    tile: int,
) -> torch.Tensor:
    wanted = int(width.item())
    bits = clamp_width(layout, wanted)
    if bits != wanted:
        _note_clamped(wanted, bits, layout)
    return reference.linear(x, planes, scales, bits, bias, layout, group_size, out_features, tile)


def _linear_fake(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    width: torch.Tensor,
    bias: torch.Tensor | None,
    layout: Sequence[int],
    group_size: int,
    out_features: int,
    tile: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_relaid(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    counters: torch.Tensor,
    width: torch.Tensor,
    bias: torch.Tensor | None,
    layout: Sequence[int],
    group_size: int,
    out_features: int,
) -> torch.Tensor:
    from . import triton

    weight = triton.DeviceWeight(
        tuple(planes), scales, counters, tuple(layout), group_size, out_features, x.shape[-1]
    )
    return triton.linear(x.contiguous(), weight, width, bias)


def _linear_relaid_fake(
    x: torch.Tensor,
    planes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    counters: torch.Tensor,
    width: torch.Tensor,
    bias: torch.Tensor | None,
    layout: Sequence[int],
    group_size: int,
    out_features: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    if (
        logits.device.type == "cuda"
        and logits.dtype in NATIVE_DTYPES
        and triton_status(logits.device) is None
    ):
        from . import triton

        return triton.entropy(logits)
    return reference.entropy(logits)


def _entropy_fake(logits: torch.Tensor) -> torch.Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.float32)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "linear": (_linear, _linear_fake),
    "linear_reference": (_linear, _linear_fake),
    "linear_relaid": (_linear_relaid, _linear_relaid_fake),
    "entropy": (_entropy, _entropy_fake),
}


def _is_defined(name: str) -> bool:
    return hasattr(getattr(torch.ops, NAMESPACE), name)


def _register() -> None:
    """Define what is not yet defined, so that a second import of the package changes nothing."""
    namespace = getattr(torch.ops, NAMESPACE)
    missing = [name for name in _SCHEMAS if not _is_defined(name)]
    if not missing:
        return
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name in missing:
        implementation, fake = _IMPLEMENTATIONS[name]
        library.define(name + _SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    # A Library unregisters its operators when it is collected. The namespace outlives this module,
    # which may be imported again after a removal from sys.modules.
    namespace.python_registration = library


_register()


@dataclass(frozen=True)
class NativeStatus:
    """Outcome of ``load_native``; ``reason`` is a sentence for the operator in both cases."""

    loaded: bool
    reason: str
    isa: str = "none"
    path: str | None = None


@dataclass(frozen=True)
class KernelChoice:
    """Kernel of one layer, the form its planes must have and why.

    tile: 0 (storage form) or 16. relaid: in the form of ``triton/layout.py`` instead, for
    ``flexquant::linear_relaid``.
    """

    name: str
    tile: int
    reason: str
    relaid: bool = False


_lock = threading.Lock()
_status: NativeStatus | None = None
_warned = False
_warned_gpu = False


def native_status() -> NativeStatus:
    """What the last ``load_native`` found, without building or loading anything."""
    return _status or NativeStatus(
        False, "the native CPU kernels have not been loaded yet: call load_native()"
    )


def load_native(build: bool = True) -> NativeStatus:
    """Load the native CPU kernels, built first unless cached (``build=False``: never build).

    A failure leaves the reference path in place and is warned about once. The outcome is kept for
    the process, except that a failure under ``build=False`` is tried again by a call that may
    build.
    """
    global _status, _warned
    with _lock:
        if _status is not None and (_status.loaded or not build or _warned):
            return _status
        try:
            path, isa = cpu_build.load(build=build)
        except cpu_build.NativeUnavailableError as error:
            _status = NativeStatus(False, str(error))
            if build and not _warned:
                _warned = True
                logger.warning(
                    "flexquant runs on its plain-torch reference path, because %s: every layer is "
                    "dequantized at every step; expect 10-50x slower.",
                    error,
                )
        else:
            _status = NativeStatus(True, _loaded_reason(isa), isa, str(path))
        return _status


def supported_isas() -> tuple[str, ...]:
    """Instruction sets of the native CPU kernels on this machine, best first; () if not loaded."""
    return native.supported_isas()


def select_isa(isa: str) -> str:
    """Let the native CPU kernels of this process use ``isa``, which is returned.

    For tests and benchmarks: results are the same bits on all of them. What ``dispatch`` said of a
    layer before keeps the name it gave.

    Raises:
        ValueError: unknown here or not supported; nothing changes.
        RuntimeError: the native kernels are not loaded.
    """
    global _status
    native.select_isa(isa)
    with _lock:
        if _status is not None:
            _status = replace(_status, isa=isa, reason=_loaded_reason(isa))
    return isa


def _loaded_reason(isa: str) -> str:
    return f"the native kernels are loaded and use {isa}"


@cache
def triton_status(device: torch.device) -> str | None:
    """A clause that says why a GPU has no Triton kernels; None if it has. Warned about once."""
    global _warned_gpu
    why = gpu.why_no_triton(device)
    with _lock:
        if why is not None and not _warned_gpu:
            _warned_gpu = True
            logger.warning(
                "flexquant runs on its plain-torch reference path on %s, because the Triton "
                "kernels cannot: %s. Every layer is dequantized at every step.",
                device,
                why,
            )
    return why


_FUSED = "fused: planes are unpacked into registers and multiplied at once"
_PANEL = "blocked: a tile of planes is unpacked into a panel, and blocks of rows multiplied from it"
_TILES = "AMX: a tile of planes is unpacked into a panel, which is one operand of a tile product"


def row_paths(isa: str) -> list[tuple[str, str]]:
    """(rows, what runs) of ``linear`` by number of rows, for an instruction set or ``none``."""
    if isa not in native.ISAS:
        return [("all", "plain torch: the weight is dequantized at every call")]
    fused = 4 if isa in ("amx_int8", "avx512_vnni") else 2
    return [
        (f"1 to {fused}", _FUSED),
        (f"{fused + 1} and more", _TILES if isa == "amx_int8" else _PANEL),
    ]


def dispatch(
    device: str | torch.device,
    dtype: torch.dtype,
    k: int,
    n: int,
    group_size: int,
    layout: Sequence[int],
) -> KernelChoice:
    """Kernel for one linear layer [n, k]; never builds: call ``load_native`` first.

    Args:
        device: ``cuda`` without an index is the current GPU.
        dtype: of the activations.
        layout: plane widths, most significant first.

    Raises:
        ValueError: ``layout`` is none.
    """
    layout = check_layout(layout)
    device = torch.device(device)
    what = f"on {dtype}, [{n}, {k}], groups of {group_size}, layout {layout}"
    if device.type == "cpu":
        status = native_status()
        missing = None if status.loaded else status.reason
        name, tile, dtypes = f"{INT8_KERNELS}{status.isa}", TILE, NATIVE_DTYPES
        reason = f"{status.isa} {what}"
    elif device.type == "cuda":
        if device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        missing = triton_status(device)
        name, tile, dtypes = "triton", 0, TRITON_DTYPES
        reason = f"Triton on {gpu.target_of(device)} {what}" if missing is None else ""
    else:
        missing = f"device type {device.type} has no native kernel"
        name, tile, dtypes, reason = "", 0, frozenset(), ""
    if missing is not None:
        reason = f"the plain-torch reference is used because {missing}"
    elif layout not in NATIVE_LAYOUTS:
        reason = (
            f"layout {layout} has no native kernel; those with one are {sorted(NATIVE_LAYOUTS)}"
        )
    elif dtype not in dtypes:
        known = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        reason = f"dtype {dtype} has no native kernel; use one of {known}"
    elif k <= 0 or n <= 0 or k % K_MULTIPLE:
        reason = (
            f"shape [{n}, {k}] does not fit the native kernel, "
            f"which needs k in multiples of {K_MULTIPLE}"
        )
    elif group_size not in GROUP_SIZES or k % group_size:
        reason = (
            f"group size {group_size} does not fit the native kernel, "
            f"which takes {GROUP_SIZES} dividing k = {k}"
        )
    else:
        return KernelChoice(name, tile, reason, relaid=device.type == "cuda")
    return KernelChoice("reference", 0, reason)
