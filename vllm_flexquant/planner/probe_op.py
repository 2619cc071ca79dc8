# SPDX-License-Identifier: Apache-2.0
"""The operator by which a layer tells the planner what it is given, in the same step.

It says that it changes its argument, which it does not: so compiled code keeps it where it stands,
before the argument's next use. What it does change, the precision table, compiled code knows as a
constant address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

if TYPE_CHECKING:
    from vllm_flexquant.planner.planner import Planner

_library = torch.library.Library("flexquant", "FRAGMENT")
_library.define("probe(Tensor(a!) x, Tensor width) -> ()")

_planners: WeakValueDictionary[int, Planner] = WeakValueDictionary()
"""By the address of the precision table that they write. An engine is told from others of the
process by a tensor, not by a number: that would be a constant of the compiled graph, and a graph
from the cache would call the planner of another engine."""


def connect(planner: Planner) -> None:
    """From now on, `flexquant::probe` of a layer in the planner's table calls it."""
    assert planner.table is not None
    _planners[planner.table.tensor.untyped_storage().data_ptr()] = planner


def _probe(x: torch.Tensor, width: torch.Tensor) -> None:
    planner = _planners.get(width.untyped_storage().data_ptr())
    if planner is not None:
        planner.probe(x)


_library.impl("probe", _probe, "CompositeExplicitAutograd")


@torch.library.register_fake("flexquant::probe")
def _probe_fake(x: torch.Tensor, width: torch.Tensor) -> None:
    return None
