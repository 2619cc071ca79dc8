# SPDX-License-Identifier: Apache-2.0
"""The operator by which a layer tells the controller what it is given, in the same step.

It says that it changes its argument, which it does not: so compiled code keeps it where it stands,
before the argument's next use. What it does change, the precision table, compiled code knows as a
constant address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_flexquant.planner.planner import Controller

_library = torch.library.Library("flexquant", "FRAGMENT")
_library.define("probe(Tensor(a!) x) -> ()")

_connected: list[Controller] = []


def connect(controller: Controller) -> None:
    """From now on, `flexquant::probe` calls this controller; a worker process has one."""
    _connected[:] = [controller]


def _probe(x: torch.Tensor) -> None:
    for controller in _connected:
        controller.probe(x)


_library.impl("probe", _probe, "CompositeExplicitAutograd")


@torch.library.register_fake("flexquant::probe")
def _probe_fake(x: torch.Tensor) -> None:
    return None
