# SPDX-License-Identifier: Apache-2.0
"""Returning freed host memory to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache


@lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # not glibc
        return None


def trim_heap() -> None:
    """Give freed heap memory back, where the C library can.

    glibc keeps what is freed below its (growing) mmap threshold: after quantizing a 135M model
    layer by layer, 100 MB that nobody uses.
    """
    if trim := _malloc_trim():
        trim(0)
