# SPDX-License-Identifier: Apache-2.0
"""What `flexquant quantize` does with its arguments: checks, progress bars, the closing lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_flexquant.format.record import CalibrationRecord, LadderRecord
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.quantize.calibrate import CalibrationOptions, Search, calibrate_checkpoint
from vllm_flexquant.quantize.calibration import BUILT_IN
from vllm_flexquant.quantize.pipeline import quantize_checkpoint
from vllm_flexquant.quantize.prune import prune_checkpoint
from vllm_flexquant.quantize.rounding import Method
from vllm_flexquant.speculation.gate import best_draft

NO_TEXT = "none"


@dataclass(frozen=True)
class QuantizeArguments:
    """As typed; `format` and `settings` by the names of the options that they become."""

    model: Path
    out: Path
    format: dict[str, Any]
    method: str
    calibration: str | None
    search: str
    settings: dict[str, Any]
    resume: bool


def run(arguments: QuantizeArguments) -> None:
    """Quantize, show progress, and print what came out.

    Raises:
        ValueError: a bad argument, or the model or text cannot be used.
    """
    check_choice("method", arguments.method, get_args(Method))
    check_choice("search", arguments.search, get_args(Search))
    options = FlexQuantOptions().updated(arguments.format, "command line")
    text = arguments.calibration or (BUILT_IN if arguments.method == "gptq" else NO_TEXT)
    if text == NO_TEXT and arguments.method == "gptq":
        raise ValueError(
            "--method gptq needs calibration text; drop --calibration none, or use rtn"
        )
    keep_widths = parse_widths(arguments.settings["keep_widths"])
    with progress_bars() as advance:
        if text == NO_TEXT:
            modules = quantize_checkpoint(
                arguments.model,
                arguments.out,
                options,
                lambda name, done, total: advance("rounding", done / total),
                keep_widths=keep_widths,
            )
            weights = sum(rows * columns for rows, columns in modules.values())
            lines = [f"{len(modules)} layers, {weights / 1e6:.1f} M weights, not calibrated"]
        else:
            settings = CalibrationOptions(
                text=text,
                method=cast(Method, arguments.method),
                search=cast(Search, arguments.search),
                **arguments.settings | {"keep_widths": keep_widths},
            )
            record = calibrate_checkpoint(
                arguments.model, arguments.out, options, settings, arguments.resume, advance
            )
            lines = list(describe(record))
    for line in [*lines, f"planes {options.layout}: {arguments.out}"]:
        typer.echo(line)


def prune(checkpoint: Path, out: Path, top_bits: float) -> None:
    """Prune, and print what is left.

    Raises:
        ValueError: as `prune_checkpoint`.
    """
    with progress_bars() as advance:
        record = prune_checkpoint(checkpoint, out, top_bits, partial(advance, "writing"))
    for line in describe(record):
        typer.echo(line)
    sizes = [sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (checkpoint, out)]
    typer.echo(f"{out}: {sizes[1] / 1e6:.1f} MB of {sizes[0] / 1e6:.1f} MB")


def parse_widths(text: str) -> tuple[int, ...]:
    """`"4,6"` as widths in bits, ascending; none for an empty text.

    Raises:
        ValueError: a part is no number.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if wrong := [part for part in parts if not part.isdigit()]:
        raise ValueError(f"--keep-widths has '{wrong[0]}'; give widths in bits, as in 4,6")
    return tuple(sorted({int(part) for part in parts}))


_DRAFTS = 4


def _recommended(record: CalibrationRecord, ladder: LadderRecord) -> str:
    """The draft that the engine would choose, in words."""
    top = max(ladder.rungs[0].bytes_read, 1)
    cost = [rung.bytes_read / top for rung in reversed(ladder.rungs)]
    levels = [(level, draft.mean_greedy) for draft, level, _ in record.draft_levels()]
    best = best_draft(levels, cost, _DRAFTS)
    return (
        f"self-speculation with up to {_DRAFTS} drafts would take level {best.level}: by bytes, "
        f"{best.length} of them give one request {best.speedup:.2f} times the tokens per second"
    )


def describe(record: CalibrationRecord) -> Iterator[str]:
    """KL at uniform widths and along the ladder."""
    yield f"{'':14}{'KL nats':>9}{'error':>9}{'mean bits':>11}{'MB read':>9}{'MB stored':>11}"
    total = sum(unit.weights for unit in record.units)
    for width, (kl, error) in record.uniform_kl.items():
        yield f"{f'uniform {width}':14}{kl:9.4f}{error:9.4f}{width:11.2f}"
    if record.ladder:
        for rung in reversed(record.ladder.rungs):
            if rung.measured:
                level = len(record.ladder.rungs) - 1 - rung.steps
                yield (
                    f"{f'level {level}':14}{rung.kl_nats:9.4f}{rung.error or 0:9.4f}"
                    f"{rung.mean_bits:11.2f}{rung.bytes_read / 1e6:9.1f}"
                    f"{rung.bytes_stored / 1e6:11.1f}"
                )
        yield "MB stored: of a checkpoint pruned to that level"
        yield (
            f"{len(record.ladder.rungs)} levels by {record.ladder.search} search, least KL for "
            f"{record.ladder.cost} saved"
        )
    checked = record.text.get("estimate_checked", {})
    if (correlation := checked.get("rank_correlation")) is not None:
        yield (
            f"sensitivities: estimated; rank correlation with measured KL {correlation:.3f} "
            f"over {len(checked['pairs'])} pairs"
        )
    if record.probe:
        levels = record.probe.levels
        at = f"at levels {levels[0]} and {levels[1]}" if levels else "before pruning"
        yield (
            f"probe: at {record.probe.layer}, KL {record.probe.relative_kl:.2f} of a random half's "
            f"{at}"
        )
    if record.int8_activations:
        kl, error = record.int8_activations
        yield f"int8 activations of the CPU kernels add a KL of {kl:.4f} ± {error:.4f}"
    if record.drafts:
        yield "as drafts for the best level: the share of greedy and of drawn tokens that it keeps"
        for draft, level, bits in record.draft_levels():
            yield (
                f"{f'level {level}':14}{bits:9.2f} bits, KL {draft.kl_nats:.4f}: "
                f"{draft.mean_greedy:.3f} {draft.mean_sampled:.3f}"
            )
        if record.ladder:
            yield _recommended(record, record.ladder)
    yield f"{len(record.units)} units, {total / 1e6:.1f} M weights"


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse an option's value that is not among those known."""
    if value not in known:
        raise ValueError(f"--{name} is '{value}'; use {' or '.join(known)}")


@contextmanager
def progress_bars() -> Iterator[Callable[[str, float], None]]:
    """A bar for each stage, with the time that is left."""
    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns) as bars:
        tasks: dict[str, Any] = {}

        def advance(name: str, share: float) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=1.0)
            bars.update(tasks[name], completed=share)

        yield advance
