# SPDX-License-Identifier: Apache-2.0
"""Kernels over nested 8-bit weights: packing, reference and the ``flexquant::`` operators."""

from .ops import (
    KernelChoice,
    NativeStatus,
    clamped_calls,
    dispatch,
    load_native,
    native_status,
    row_paths,
    select_isa,
    supported_isas,
)
from .pack import (
    DEFAULT_LAYOUT,
    GROUP_SIZES,
    TILE,
    check_layout,
    clamp_width,
    layout_widths,
    pack_planes,
    planes_for_width,
    tile_plane,
    tile_scales,
    unpack_planes,
    untile_plane,
    untile_scales,
)
from .reference import dequantize, entropy, linear, linear_int8

__all__ = [
    "DEFAULT_LAYOUT",
    "GROUP_SIZES",
    "TILE",
    "KernelChoice",
    "NativeStatus",
    "check_layout",
    "clamp_width",
    "clamped_calls",
    "dequantize",
    "dispatch",
    "entropy",
    "layout_widths",
    "linear",
    "linear_int8",
    "load_native",
    "native_status",
    "pack_planes",
    "planes_for_width",
    "row_paths",
    "select_isa",
    "supported_isas",
    "tile_plane",
    "tile_scales",
    "unpack_planes",
    "untile_plane",
    "untile_scales",
]
