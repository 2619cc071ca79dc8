# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for GPUs: device form of a weight, the linear layer over it, entropy of logits.

Importing this needs triton, which the packages do not: import it where a kernel is launched.
"""

from .entropy import entropy, track_entropy
from .layout import DeviceWeight, relay
from .linear import linear

__all__ = ["DeviceWeight", "entropy", "linear", "relay", "track_entropy"]
