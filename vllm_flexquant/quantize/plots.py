# SPDX-License-Identifier: Apache-2.0
"""Pictures of what calibration found, for the model card; they need matplotlib."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_flexquant.format.record import CalibrationRecord

_SMALLEST_NATS = 1e-7


def write_plots(folder: Path, record: CalibrationRecord) -> dict[str, str]:
    """Write PNG files into `folder`; returns what each shows, by file name.

    Nothing is written where matplotlib is not installed.
    """
    if record.ladder is None or find_spec("matplotlib") is None:
        return {}
    plots = {
        "kl.png": ("KL against mean bits", _ladder),
        "sensitivity.png": ("Sensitivity by unit and width", _sensitivity),
        "storage.png": ("KL of the best level against bytes stored, if pruned", _storage),
    }
    for name, (_, draw) in plots.items():
        figure = draw(record)
        figure.savefig(folder / name, dpi=150)
    return {name: title for name, (title, _) in plots.items()}


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _ladder(record: CalibrationRecord) -> Any:
    assert record.ladder is not None
    figure, axes = _figure(7, 4.5)
    rungs = record.ladder.rungs
    axes.plot([r.mean_bits for r in rungs], [r.kl_nats for r in rungs], label="ladder")
    measured = [r for r in rungs if r.measured]
    axes.errorbar(
        [r.mean_bits for r in measured],
        [r.kl_nats for r in measured],
        [r.error or 0.0 for r in measured],
        fmt="o",
        markersize=4,
        color="C0",
        label="measured",
    )
    uniform = sorted(record.uniform_kl.items())
    axes.plot([w for w, _ in uniform], [kl for _, (kl, _) in uniform], "s--", label="uniform width")
    axes.set(yscale="log", xlabel="mean bits", ylabel="KL, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _sensitivity(record: CalibrationRecord) -> Any:
    """Units of one name in a row, blocks from left to right, a panel for each width."""
    import matplotlib.colors
    import matplotlib.figure
    import numpy as np

    found = {w for unit in record.units for w in unit.sensitivity}
    widths = sorted(found)[:-1] or sorted(found)
    rows: dict[str, dict[int, dict[int, float]]] = {}
    for unit in record.units:
        parts = unit.name.split(".")
        block = next((int(part) for part in parts if part.isdigit()), 0)
        for width, (kl, _) in unit.sensitivity.items():
            rows.setdefault(parts[-1], {}).setdefault(width, {})[block] = kl
    blocks = 1 + max(b for by in rows.values() for at in by.values() for b in at)
    figure = matplotlib.figure.Figure(
        figsize=(2 + blocks * 0.25, 1 + 0.3 * len(rows) * len(widths)), layout="constrained"
    )
    panels = figure.subplots(len(widths), 1, squeeze=False, sharex=True)[:, 0]
    grids = []
    for width in widths:
        grid = np.full((len(rows), blocks), np.nan)
        for i, by in enumerate(rows.values()):
            for block, kl in by.get(width, {}).items():
                grid[i, block] = max(kl, _SMALLEST_NATS)
        grids.append(grid)
    norm = matplotlib.colors.LogNorm(
        min(float(np.nanmin(g)) for g in grids), max(float(np.nanmax(g)) for g in grids)
    )
    for panel, width, grid in zip(panels, widths, grids, strict=True):
        image = panel.imshow(grid, norm=norm, aspect="auto", cmap="viridis")
        panel.set_yticks(range(len(rows)), list(rows))
        panel.set_title(f"{width} bit", loc="left", fontsize="medium")
    panels[-1].set_xlabel("block")
    figure.colorbar(image, ax=list(panels), label="KL, nats per token")
    return figure


def _storage(record: CalibrationRecord) -> Any:
    assert record.ladder is not None
    figure, axes = _figure(7, 4.5)
    rungs = [rung for rung in record.ladder.rungs if rung.measured]
    axes.plot([r.bytes_stored / 1e6 for r in rungs], [r.kl_nats for r in rungs], "o-")
    axes.set(yscale="log", xlabel="MB stored", ylabel="KL of the best level left, nats per token")
    axes.grid(alpha=0.3)
    return figure
