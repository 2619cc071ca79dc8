# SPDX-License-Identifier: Apache-2.0
"""The gate before any speed: the KL of each configuration, from the engine that will be timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum, sqrt
from pathlib import Path
from typing import Any

from benchmarks.quality.engine import agreement, compute_references
from benchmarks.quality.sequences import (
    TokenSequence,
    mean_and_error,
    read_records,
    save_sequences,
    scored,
    summarise,
)
from benchmarks.serving.configurations import Configuration
from benchmarks.serving.process import EngineError, EngineProcess, reason

OVER, LITTLE = 1.5, 0.01
"""A budget is far exceeded above so many times what was asked, and so many nats: few tokens, of a
text that is not the calibrated one."""

ROWS = 4
"""Sequences decoded at a time."""


def references(
    model: str,
    configurations: Sequence[Configuration],
    sequences: Sequence[TokenSequence],
    folder: Path,
) -> dict[str, Any]:
    """Write the fp32 reference into `folder`; returns the plain implementation's KL by width."""
    widths = sorted({c.width for c in configurations if c.width is not None})
    save_sequences(folder / "sequences.json", sequences)
    return compute_references(model, sequences, folder, widths, "bfloat16")


def measure(
    engine: EngineProcess,
    configuration: Configuration,
    sequences: Sequence[TokenSequence],
    folder: Path,
) -> list[dict[str, Any]]:
    """Records of all scored tokens (`benchmarks.quality.teacher_forcing`)."""
    engine.ask(
        "force",
        run=configuration.name,
        sequences=str(folder / "sequences.json"),
        reference=str(folder / "reference.npy"),
        record=str(folder / "records.jsonl"),
        rows=ROWS,
        change=configuration.change,
    )
    return scored(read_records(folder / "records.jsonl", configuration.name), sequences)


def judge(
    configurations: Sequence[Configuration],
    kl: Mapping[str, Sequence[float]],
    planes: Mapping[str, Any],
) -> dict[str, str]:
    """What is wrong, by configuration; empty when the gate is green.

    A configuration's KL must be under its limit. That of flexquant must also be the plain
    implementation's with int8 activations at that width: by `agreement`, or as a distance, for
    which the square root of a small KL stands, not further from it than bf16 is from the reference
    (plain arithmetic in fp32 does not round to bf16). With an unquantized output layer, or
    calibrated, it must not be above it by more. That of a budget may be `OVER` times what is asked,
    and `LITTLE`.

    Args:
        kl: nats of each scored token, by configuration; `bf16` among them.
        planes: as `references`.
    """
    rounding = sqrt(fsum(kl["bf16"]) / len(kl["bf16"]))
    wrong = {}
    for configuration in configurations:
        values = kl[configuration.name]
        mean, _ = mean_and_error(values)
        if not mean <= configuration.limit:  # NaN is not either
            wrong[configuration.name] = f"KL {mean:.4f} is above {configuration.limit:g}"
        elif configuration.asked is not None and not mean <= OVER * configuration.asked + LITTLE:
            wrong[configuration.name] = f"KL {mean:.4f} is far above {configuration.asked:g}"
        elif configuration.width is not None:
            plain = planes[str(configuration.width)]["int8"]["kl"]
            expected = fsum(plain) / len(plain)
            further = sqrt(mean) - sqrt(expected)
            if not configuration.exact:
                further = max(further, 0.0)
            if not agreement(values, plain)["agrees"] and not abs(further) <= rounding:
                wrong[configuration.name] = (
                    f"KL {mean:.4f} is not the plain implementation's {expected:.4f}"
                )
    return wrong


def run_gate(
    engines: dict[str, EngineProcess],
    configurations: Sequence[Configuration],
    sequences: Sequence[TokenSequence],
    planes: Mapping[str, Any],
    folder: Path,
    unavailable: dict[str, str],
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The quality of each configuration, and what is wrong with it (as `judge`).

    An engine that dies of its first steps, as one does whose kernels this processor lacks, is taken
    out of `engines`, its reason goes to `unavailable`, and its configurations have no quality.
    """
    records = {}
    for configuration in configurations:
        if configuration.engine in engines:
            engine = engines[configuration.engine]
            try:
                records[configuration.name] = measure(engine, configuration, sequences, folder)
            except EngineError as error:
                unavailable[configuration.engine] = reason(str(error))
                del engines[configuration.engine]
    quality = {}
    for configuration in (c for c in configurations if c.engine in engines):
        summary = summarise(records[configuration.name])
        if configuration.width is not None:
            plain = planes[str(configuration.width)]["int8"]["kl"]
            summary["plain_kl"] = fsum(plain) / len(plain)
        quality[configuration.name] = summary
    kl = {name: [r["kl"] for r in records[name]] for name in quality}
    return quality, judge([c for c in configurations if c.name in quality], kl, planes)
