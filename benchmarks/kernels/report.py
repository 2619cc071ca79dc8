# SPDX-License-Identifier: Apache-2.0
"""What a run prints: times per width, the crossover, and the targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.kernels.contenders import flexquant_name
from benchmarks.kernels.targets import PLACES, place
from vllm_flexquant.format.layout import PlaneLayout

CLEAN_ENOUGH = 0.5
"""Share of a cell's turns that should not have lost a CPU to others (see `timing.py`)."""


def _table(title: str, *columns: str) -> Table:
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", no_wrap=number > 0)
    return made


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def speed_tables(cells: Sequence[dict[str, Any]]) -> list[Table]:
    """µs per call, a table for each residence and number of threads: contenders by shape and rows.

    A name that one shape lacks has a dash there.
    """
    tables = []
    kinds = sorted({(cell["residence"], cell["threads"]) for cell in cells}, reverse=True)
    for residence, threads in kinds:
        chosen = [c for c in cells if (c["residence"], c["threads"]) == (residence, threads)]
        shown = [c for c in chosen if c["rows"] in (1, 16, 256)] or chosen
        names = list(dict.fromkeys(name for cell in shown for name in cell["time_us"]))
        made = _table(
            f"µs per call, {PLACES[residence]}, threads: {threads} (columns: shape, rows)",
            "",
            *(f"{cell['shape']}, {cell['rows']}" for cell in shown),
        )
        for name in names:
            medians = [cell["time_us"].get(name, {}).get("median") for cell in shown]
            made.add_row(name, *("-" if value is None else _number(value) for value in medians))
        tables.append(made)
    return tables


def crossover_table(curves: Sequence[dict[str, Any]], layouts: Sequence[str]) -> Table:
    """µs per row in cache, by rows, at the lowest and highest width of each layout."""
    rows = sorted({cell["rows"] for cell in curves})
    made = _table("crossover: µs per row, in cache, by rows", "", *map(str, rows))
    for shape, threads in dict.fromkeys((cell["shape"], cell["threads"]) for cell in curves):
        found = {c["rows"]: c for c in curves if (c["shape"], c["threads"]) == (shape, threads)}
        for layout in layouts:
            for width in PlaneLayout.parse(layout).widths:
                name = flexquant_name(layout, width)
                made.add_row(
                    f"{shape}, {threads}t, {layout} {width} bit",
                    *(
                        _number(found[count]["time_us"][name]["median"] / count)
                        if count in found
                        else "-"
                        for count in rows
                    ),
                )
    return made


def target_table(judged: Sequence[dict[str, Any]]) -> Table:
    """One line per target and layout, with the worst case."""
    made = _table("targets", "target", "layout", "bound", "", "cases met", "worst", "where")
    for one in judged:
        if one["met"] is None:
            made.add_row(
                one["target"], one["layout"], str(one["bound"]), "not measured", "", "", ""
            )
            continue
        worst = one["worst"]
        sign = "≤" if one["bound_is"] == "at most" else "≥"
        made.add_row(
            one["target"],
            one["layout"],
            f"{sign} {one['bound']}",
            "met" if one["met"] else "NOT MET",
            f"{one['cases_met']} of {one['cases']}",
            f"{worst['value']:.2f}",
            place(worst),
        )
    return made


def caution(cells: Sequence[dict[str, Any]]) -> str | None:
    """A sentence when others used the machine so much that the times say little."""
    disturbed = [cell for cell in cells if cell["clean_turns"] < CLEAN_ENOUGH]
    if not disturbed:
        return None
    return (
        f"The machine was busy: in {len(disturbed)} of {len(cells)} cells less than "
        f"{CLEAN_ENOUGH:.0%} of the turns kept their CPUs. Repeat the run on an idle machine."
    )


def error_table(gates: dict[str, Any]) -> Table:
    """The largest errors of each of our kernels over all shapes, and of the baselines."""
    made = _table(
        "errors (relative, Frobenius)", "", "to the int8 reference", "to fp32 activations"
    )
    errors: dict[str, list[list[float]]] = {}
    for found in gates.values():
        for check in found["checks"]:
            reference = check.get("int8_reference_error")
            truth = check.get("int8_activation_error", check.get("error"))
            kept = errors.setdefault(check["contender"], [[], []])
            for values, value in zip(kept, (reference, truth), strict=True):
                if value is not None:
                    values.append(value)
    for name, (references, truths) in errors.items():
        made.add_row(
            name,
            f"{max(references):.1e}" if references else "-",
            f"{max(truths):.4f}" if truths else "-",
        )
    return made
