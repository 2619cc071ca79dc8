# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for GPUs: the linear layer over nested weights, and what chooses its width.

Importing this needs triton, which the packages do not: import it where a kernel is launched.
"""

from .decision import DecisionState, Rules, decide, make_state
from .entropy import entropy, track_entropy
from .layout import DeviceWeight, relay
from .linear import Layer, linear, warm_up
from .probe import ProbeState, probe
from .tuning import Launch

__all__ = [
    "DecisionState",
    "DeviceWeight",
    "Launch",
    "Layer",
    "ProbeState",
    "Rules",
    "decide",
    "entropy",
    "linear",
    "make_state",
    "probe",
    "relay",
    "track_entropy",
    "warm_up",
]
