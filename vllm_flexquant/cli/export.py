# SPDX-License-Identifier: Apache-2.0
"""What `flexquant export` does with its arguments: checks, a progress bar, the closing lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import typer

from vllm_flexquant.cli.quantize import NO_TEXT, check_choice, progress_bars
from vllm_flexquant.quantize.calibration import BUILT_IN
from vllm_flexquant.quantize.one_width import (
    FORMAT,
    SYMMETRIC,
    Exported,
    ExportOptions,
    export_checkpoint,
)
from vllm_flexquant.quantize.rounding import Method


@dataclass(frozen=True)
class ExportArguments:
    """As typed; `settings` by the names of the options that they become."""

    checkpoint: Path
    out: Path
    width: int
    format: str
    method: str
    calibration: str | None
    settings: dict[str, Any]


def run(arguments: ExportArguments) -> None:
    """Export, show progress, and print what came out.

    Raises:
        ValueError: a bad argument, or the checkpoint or text cannot be used.
    """
    check_choice("format", arguments.format, (FORMAT,))
    check_choice("method", arguments.method, get_args(Method))
    if arguments.method == "gptq" and arguments.calibration == NO_TEXT:
        raise ValueError(
            "--method gptq needs calibration text; drop --calibration none, or use rtn"
        )
    if arguments.method == "rtn" and arguments.calibration not in (None, NO_TEXT):
        raise ValueError(
            f"--method rtn reads no text; drop --calibration {arguments.calibration}, or use gptq"
        )
    options = ExportOptions(
        width=arguments.width,
        method=cast(Method, arguments.method),
        text=arguments.calibration or BUILT_IN,
        **arguments.settings,
    )
    with progress_bars() as advance:
        exported = export_checkpoint(arguments.checkpoint, arguments.out, options, advance)
    for line in _describe(exported, options, arguments.out):
        typer.echo(line)


def _describe(exported: Exported, options: ExportOptions, out: Path) -> Iterator[str]:
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    zeros = "symmetric" if SYMMETRIC[options.width] else "a zero for each group"
    yield f"{len(exported.layers)} layers at {options.width} bits, {zeros}; {size / 1e6:.1f} MB"
    for name, why in exported.plain.items():
        yield f"unquantized: {name} ({why})"
    if options.width != min(SYMMETRIC):
        yield "vLLM has kernels for this width on GPUs only; --width 4 runs on CPUs too"
    yield f"vllm serve {out}"
