# SPDX-License-Identifier: Apache-2.0
"""GPUs and the Triton that would compile for them, without importing it where there is no GPU."""

from functools import cache

import torch

OLDEST_TRITON = (3, 6)
TARGETS = (
    "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121", "gfx942",
)  # fmt: skip
"""Those that the kernels are compiled for, and others of the same instructions."""


@cache
def target_of(device: torch.device) -> str:
    """``sm_90``, ``gfx942``, ...; ``none`` without a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "none"
    if torch.version.hip is not None:
        name = str(torch.cuda.get_device_properties(device).gcnArchName)
        return name.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units; 1 without a GPU."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def triton_version() -> str | None:
    """That of the Triton which can be imported; None if none can."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def why_no_triton(device: torch.device) -> str | None:
    """A clause that says why the Triton kernels cannot run on a GPU; None if they can."""
    target = target_of(device)
    if target == "none":
        return f"torch {torch.__version__} can use no cuda device here: install its CUDA build"
    if target not in TARGETS:
        return f"GPU {target} is none of those that they are compiled for ({', '.join(TARGETS)})"
    version = triton_version()
    oldest = ".".join(map(str, OLDEST_TRITON))
    if version is None:
        return f"triton is not installed: install triton>={oldest}, as torch's CUDA builds do"
    parts = version.split(".")[:2]
    if not all(part.isdigit() for part in parts) or tuple(map(int, parts)) < OLDEST_TRITON:
        return f"triton {version} is too old: install triton>={oldest}"
    return None
