# SPDX-License-Identifier: Apache-2.0
"""The nested weight format: what a plane is, how groups are chosen, how checkpoints are stored."""

from vllm_flexquant.format.layout import (
    GROUP_SIZES,
    PARENT_BITS,
    PlaneLayout,
    ScaleMode,
    choose_group_size,
)

__all__ = ["GROUP_SIZES", "PARENT_BITS", "PlaneLayout", "ScaleMode", "choose_group_size"]
