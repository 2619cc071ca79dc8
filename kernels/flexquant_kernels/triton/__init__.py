# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for GPUs: device form of a weight and the linear layer over it.

Importing this needs triton, which the packages do not: import it where a kernel is launched.
"""

from .layout import DeviceWeight, relay
from .linear import linear

__all__ = ["DeviceWeight", "linear", "relay"]
