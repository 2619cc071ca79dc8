# SPDX-License-Identifier: Apache-2.0
"""Instruction sets of the native kernels: names, what each needs, and the choice among them.

The library decides what the machine offers (``isa.cpp``). The processor flags here serve to say
why it does not, and to compile nothing where no instruction set is there.
"""

import ctypes
import logging
import os
import platform
from pathlib import Path

logger = logging.getLogger("vllm_flexquant.kernels")

ISA_VARIABLE = "VLLM_FLEXQUANT_ISA"
ISAS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2", "neon_dotprod")
"""All names, best first."""

_AVX2_FLAGS = ("avx2", "fma", "f16c")
_AVX512_FLAGS = (*_AVX2_FLAGS, "avx512f", "avx512bw", "avx512vl", "avx512_vnni")
_FLAGS: dict[str, tuple[str, ...]] = {
    "amx_int8": (*_AVX512_FLAGS, "amx_tile", "amx_int8"),
    "avx512_vnni": _AVX512_FLAGS,
    "avx_vnni": (*_AVX2_FLAGS, "avx_vnni"),
    "avx2": _AVX2_FLAGS,
    "neon_dotprod": ("asimddp",),
}
"""Flags of /proc/cpuinfo that an instruction set needs."""
_MACHINES = {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}

_library: ctypes.CDLL | None = None
_short: ctypes.PyDLL | None = None


def machine() -> str:
    """``x86_64`` or ``aarch64``, else what the platform calls itself."""
    name = platform.machine()
    return _MACHINES.get(name, name)


def isas_of_machine() -> tuple[str, ...]:
    """Names that have a source for this kind of processor, best first."""
    return tuple(name for name in ISAS if _machine_of(name) == machine())


def _machine_of(isa: str) -> str:
    return "aarch64" if isa.startswith("neon") else "x86_64"


def parse_flags(cpuinfo: str) -> frozenset[str] | None:
    """Flags of the first processor of /proc/cpuinfo; None where it lists none."""
    lines = cpuinfo.splitlines()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), None)
    return None if found is None else frozenset(found.partition(":")[2].split())


def _cpu_flags() -> frozenset[str] | None:
    try:
        return parse_flags(Path("/proc/cpuinfo").read_text())
    except OSError:
        return None


def why_not(isa: str) -> str:
    """What this machine lacks for an instruction set, as a clause; empty where nothing is seen."""
    if _machine_of(isa) != machine():
        return f"this CPU is no {_machine_of(isa)}"
    flags = _cpu_flags()
    missing = [flag for flag in _FLAGS[isa] if flags is not None and flag not in flags]
    return f"this CPU lacks {', '.join(missing)}" if missing else ""


def attach(path: Path) -> None:
    """Use the loaded library at ``path``.

    Raises:
        OSError, AttributeError: it is no library of these kernels.
    """
    global _library, _short
    library = ctypes.CDLL(str(path))
    for name in ("flexquant_supported_isas", "flexquant_selected_isa"):
        getattr(library, name).restype = ctypes.c_char_p
    library.flexquant_select_isa.argtypes = [ctypes.c_char_p]
    library.flexquant_clamped_calls.restype = ctypes.c_longlong
    short, pointer, whole = ctypes.PyDLL(str(path)), ctypes.c_void_p, ctypes.c_int64
    for name, arguments, result in (
        ("state_bytes", [], whole),
        ("begin", [pointer] * 3, None),
        ("probe", [*[pointer] * 3, *[whole] * 3], None),
        ("decide", [*[pointer] * 3, whole], None),
        ("write", [pointer, whole], None),
        ("book", [pointer] * 3, None),
        (
            "read_logits",
            [*[pointer] * 2, *[whole] * 3, ctypes.c_double, *[pointer] * 2],
            ctypes.c_bool,
        ),
    ):
        function = getattr(short, f"flexquant_{name}")
        function.argtypes, function.restype = arguments, result
    _library, _short = library, short


def _loaded() -> ctypes.CDLL:
    if _library is None:
        raise RuntimeError("the native CPU kernels are not loaded: call load_native()")
    return _library


def short_calls() -> ctypes.PyDLL:
    """The library for functions that run for microseconds: the interpreter's lock is kept.

    Raises:
        RuntimeError: the native kernels are not loaded.
    """
    _loaded()
    assert _short is not None
    return _short


def supported_isas() -> tuple[str, ...]:
    """What this machine offers, best first; empty while no library is loaded."""
    if _library is None:
        return ()
    names = _library.flexquant_supported_isas().decode()
    return tuple(names.split(",")) if names else ()


def selected_isa() -> str:
    """What calls of the kernels use from now on; ``none`` while no library is loaded."""
    return "none" if _library is None else _library.flexquant_selected_isa().decode()


def select_isa(isa: str) -> str:
    """Let the kernels use ``isa``, which is returned; for the whole process, from the next call on.

    Raises:
        ValueError: unknown here or not supported; the selection stays.
    """
    if not _loaded().flexquant_select_isa(isa.encode()):
        raise ValueError(
            f"instruction set {isa!r} cannot be selected: {_refusal(isa)}; "
            f"this machine supports {', '.join(supported_isas()) or 'none'}"
        )
    return isa


def _refusal(isa: str) -> str:
    if isa not in ISAS:
        return "no such name"
    return why_not(isa) or "the operating system does not offer it"


def clamped_calls() -> int:
    """Native calls of ``linear`` so far whose width was outside the layout."""
    return 0 if _library is None else int(_library.flexquant_clamped_calls())


def wanted_isa() -> str | None:
    """What ``VLLM_FLEXQUANT_ISA`` names, None where it is not set.

    Raises:
        ValueError: no instruction set has that name.
    """
    named = os.environ.get(ISA_VARIABLE, "").strip()
    if named and named not in ISAS:
        raise ValueError(
            f"{ISA_VARIABLE} is {named!r}, which is no instruction set; give one of "
            f"{', '.join(ISAS)}, or unset it for the best that the machine offers"
        )
    return named or None


def choose_isa() -> str:
    """Name to select: the wanted one, else the best below it, else (with a warning) the best."""
    supported = supported_isas()
    wanted = wanted_isa()
    if wanted is None or wanted in supported:
        return wanted or supported[0]
    below = [name for name in supported if ISAS.index(name) > ISAS.index(wanted)]
    chosen = (below or supported)[0]
    logger.warning(
        "%s is %s, which this machine does not offer (%s): using %s. It supports %s.",
        ISA_VARIABLE,
        wanted,
        _refusal(wanted),
        chosen,
        ", ".join(supported),
    )
    return chosen
