# SPDX-License-Identifier: Apache-2.0
"""Checks of tensors before a launch, which would read whatever lies there."""

import torch


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    """Raises ValueError unless a tensor is what a kernel takes it for, and contiguous."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}: "
            f"give a contiguous {dtype} {list(shape)}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but must be on {device}: move it")


def check_width(width: torch.Tensor, device: torch.device) -> None:
    """Raises ValueError unless a width is one int32 on the device of its weight."""
    if width.device != device:
        raise ValueError(f"width is on {width.device} but the weight on {device}: move one")
    if width.dtype != torch.int32 or width.numel() != 1:
        raise ValueError(
            f"width is {width.dtype} with {width.numel()} elements: give one int32, "
            "an entry of the precision table"
        )
