# SPDX-License-Identifier: Apache-2.0
"""The state of one worker, made of what was loaded; and what changes it by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from flexquant_kernels.state import State
from vllm_flexquant.format.layout import PARENT_BITS
from vllm_flexquant.planner.figures import Figures, Probe
from vllm_flexquant.planner.ladder import Ladder
from vllm_flexquant.planner.table import LayerRecord, allowed_widths
from vllm_flexquant.policy.budget import NO_PAST, OTHER

LEDGER = ("balance", "spent", "tokens", "needed", "foreseen")
"""What of the accounts changes from step to step."""

CARRIED = (*LEDGER, "decisions")


def make_state(
    table: torch.Tensor,
    layers: Sequence[LayerRecord],
    ladder: Ladder,
    slots: int,
    rows: int,
    figures: Figures,
    listening: Probe | None = None,
) -> State:
    """The state of a worker before its first step: at the best level, with empty accounts.

    Args:
        table: int32 [layers], the precision table.
        slots: sequences that run at a time at most.
        rows: of a forward pass at most.
        figures: as `figures.read_figures`, or `figures.without_calibration`.
    """
    state = empty_state(table, figures, slots, rows, listening)
    fill(state, rungs=ladder.widths, allowed=allowed_widths(layers))
    return state


def empty_state(
    table: torch.Tensor, figures: Figures, slots: int, rows: int, listening: Probe | None = None
) -> State:
    """As `make_state`, without widths."""
    state = State(
        table.device,
        table,
        levels=len(figures["kl"]),
        layers=len(table),
        slots=slots + 1,
        rows=rows,
        entropy_bins=len(figures["need_by_entropy"]),
        average_bins=len(figures["need_by_average"]),
        hidden=0 if listening is None else len(listening.weight),
    )
    top = state.sizes["levels"] - 1
    fill(state, **figures, ceiling=top, pinned=top, price=-1.0, row_account=OTHER)
    fill(state, needed=NO_PAST, foreseen=NO_PAST, bounds=PARENT_BITS)
    state.decisions[:, 0] = top
    state.late_kl[:] = state.kl - state.early_kl
    state.late_cost[:] = state.cost - state.early_cost
    if listening is not None:
        fill(state, weight=listening.weight, bias=listening.bias, probe_layer=listening.layer)
    return state


def fill(state: State, **values: Any) -> None:
    """Write fields from numbers, lists or tensors. Not within a step: a GPU is waited for."""
    for name, value in values.items():
        field = state.tensor(name)
        if not isinstance(value, torch.Tensor):
            value = torch.from_numpy(np.array(value))
        field.copy_(value.expand(field.shape) if value.dim() == 0 else value.view(field.shape))


def carried(state: State) -> dict[str, Any]:
    """All that the next decision depends on beside its step, as plain values (syncs a GPU)."""
    return {name: state.tensor(name).tolist() for name in CARRIED}


def restore(state: State, values: Mapping[str, Any]) -> None:
    """Go on from what `carried` returned."""
    fill(state, **{name: values[name] for name in CARRIED})
