# SPDX-License-Identifier: Apache-2.0
"""Shapes and layouts as the kernel benchmarks read and write them. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def layout_name(planes: Sequence[int]) -> str:
    """`(4, 2, 2)` -> `4|2|2`."""
    return "|".join(map(str, planes))


def shape(text: str, k_multiple: int = 1) -> tuple[int, int]:
    """`1536x576` -> `(1536, 576)`, N and K.

    Raises:
        argparse.ArgumentTypeError: that is no shape, or K is no multiple.
    """
    n, _, k = text.partition("x")
    if n.isdigit() and k.isdigit() and int(n) > 0 and int(k) > 0 and int(k) % k_multiple == 0:
        return int(n), int(k)
    how = " as in 1536x576" if k_multiple == 1 else f", K a multiple of {k_multiple}"
    raise argparse.ArgumentTypeError(f"{text!r} is no shape; write N x K{how}")
