# SPDX-License-Identifier: Apache-2.0
"""The `flexquant` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_flexquant import __version__

app = typer.Typer(
    name="flexquant",
    help="Nested quantization for vLLM: quantize checkpoints, check them, see the kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the console script; a bad argument ends in one sentence, not a traceback."""
    try:
        app()
    except ValueError as error:
        typer.secho(f"flexquant: {error}", err=True, fg="red")
        raise SystemExit(2) from None


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        typer.echo(f"vllm-flexquant {__version__}")
        raise typer.Exit


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(help="Unquantized Hugging Face checkpoint (folder).")],
    out: Annotated[Path, typer.Argument(help="New folder for the flexquant checkpoint.")],
    layout: Annotated[
        str, typer.Option(help="Plane widths in bits: 4|2|2, 2|2|4 or 2|1|1|2|2.")
    ] = "4|2|2",
    group_size: Annotated[int, typer.Option(help="Largest group: 128, 64 or 32.")] = 64,
    scales: Annotated[str, typer.Option(help="per_width or shared.")] = "per_width",
    output_layer: Annotated[bool, typer.Option(help="Quantize the output layer.")] = True,
    ignore: Annotated[str, typer.Option(help="Layers to leave unquantized, comma-separated.")] = "",
    method: Annotated[
        str, typer.Option(help="gptq: with error compensation. rtn: to nearest.")
    ] = "gptq",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="mix (built in), a .txt or .jsonl file, or a dataset NAME[:CONFIG[:SPLIT]]; "
            "'none' with --method rtn: no text, no ladder. [default: mix for gptq, none for rtn]"
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(min=8, help="Calibration sequences.")] = 96,
    length: Annotated[int, typer.Option(min=32, help="Tokens of a sequence.")] = 512,
    search: Annotated[
        str, typer.Option(help="How the ladder is found: greedy or tree.")
    ] = "greedy",
    branch: Annotated[int, typer.Option(min=1, help="Candidates per node of the tree.")] = 4,
    stem: Annotated[int, typer.Option(min=1, help="Candidates that survive.")] = 2,
    cost: Annotated[
        str,
        typer.Option(
            help="Results of the kernel benchmark, whose times order the ladder. "
            "[default: bytes read]"
        ),
    ] = "",
    cost_rows: Annotated[int, typer.Option(min=1, help="Rows of activations of these times.")] = 1,
    store_output: Annotated[
        bool,
        typer.Option(
            help="Give an output layer that is tied to the embedding planes of its own: better at "
            "few bits, more bytes."
        ),
    ] = False,
    keep_widths: Annotated[
        str,
        typer.Option(
            help="Widths to keep, as in 4,6: planes and scales of others are not stored. "
            "[default: all of the layout]"
        ),
    ] = "",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Share the work out to a Ray cluster: auto, HOST:PORT, ray://HOST:PORT, or local.",
        ),
    ] = None,
) -> None:
    """Quantize MODEL and save it as planes in OUT, calibrated on text unless told otherwise."""
    from vllm_flexquant.cli.quantize import QuantizeArguments, run

    run(
        QuantizeArguments(
            model=model,
            out=out,
            format={
                "layout": layout,
                "group_size": group_size,
                "scales": scales,
                "output_layer": output_layer,
                "ignore": ignore,
            },
            method=method,
            calibration=calibration,
            search=search,
            settings={
                "sequences": sequences,
                "length": length,
                "store_output": store_output,
                "keep_widths": keep_widths,
                "branch": branch,
                "cost": cost,
                "cost_rows": cost_rows,
                "stem": stem,
                "device": device,
                "ray": ray,
            },
            resume=resume,
        )
    )


@app.command()
def prune(
    checkpoint: Annotated[Path, typer.Argument(help="Calibrated flexquant checkpoint (folder).")],
    out: Annotated[Path, typer.Argument(help="New folder for the pruned checkpoint.")],
    top_bits: Annotated[
        float, typer.Option(help="Mean bits of the best level that is kept.", min=2, max=8)
    ],
) -> None:
    """Drop planes that only levels above TOP_BITS need; `inspect` says what each level weighs."""
    from vllm_flexquant.cli.quantize import prune as run_prune

    run_prune(checkpoint, out, top_bits)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Saved flexquant checkpoint (folder).")],
    out: Annotated[Path, typer.Argument(help="New folder for the static checkpoint.")],
    width: Annotated[
        int, typer.Option(help="Bits of all layers: 4, or 8, which vLLM serves on GPUs only.")
    ] = 4,
    format_name: Annotated[
        str, typer.Option("--format", help="compressed-tensors (pack-quantized, weights only).")
    ] = "compressed-tensors",
    method: Annotated[
        str, typer.Option(help="gptq: with error compensation. rtn: to nearest, needs no text.")
    ] = "gptq",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="mix (built in), a .txt or .jsonl file, or a dataset NAME[:CONFIG[:SPLIT]]. "
            "[default: mix for gptq]"
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(min=8, help="Calibration sequences.")] = 96,
    length: Annotated[int, typer.Option(min=32, help="Tokens of a sequence.")] = 512,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Write CHECKPOINT at one width into OUT, for vLLM without this plugin."""
    from vllm_flexquant.cli.export import ExportArguments, run

    run(
        ExportArguments(
            checkpoint=checkpoint,
            out=out,
            width=width,
            format=format_name,
            method=method,
            calibration=calibration,
            settings={"sequences": sequences, "length": length, "device": device},
        )
    )


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Saved flexquant checkpoint (folder).")],
    as_json: Annotated[bool, typer.Option("--json", help="The record as JSON.")] = False,
) -> None:
    """Print what a saved checkpoint knows of itself: format, KL by width, ladder."""
    from vllm_flexquant.cli.inspect import report

    for line in report(checkpoint, as_json):
        typer.echo(line)


@app.command()
def validate(
    checkpoint: Annotated[Path, typer.Argument(help="Saved flexquant checkpoint (folder).")],
    verify: Annotated[bool, typer.Option(help="Also compare file hashes.")] = True,
) -> None:
    """Check a saved checkpoint without loading it."""
    from vllm_flexquant.format.checkpoint import validate_checkpoint

    if not (checkpoint / "config.json").exists():
        raise ValueError(f"{checkpoint} has no config.json; give a checkpoint folder")
    modules = validate_checkpoint(checkpoint, verify)
    typer.echo(f"{checkpoint}: {len(modules)} layers in planes, all present and whole")


@app.command()
def kernels(
    build: Annotated[
        bool, typer.Option(help="Build the CPU kernels if they are not cached.")
    ] = True,
) -> None:
    """Say which kernels this machine runs, and why."""
    from vllm_flexquant.cli.kernels import report

    for line in report(build):
        typer.echo(line)


@app.command()
def trace(
    out: Annotated[Path, typer.Argument(help="File to write, .npz.")],
    url: Annotated[str, typer.Option(help="The server.")] = "http://localhost:8000",
    api_key: Annotated[
        str, typer.Option(envvar="VLLM_API_KEY", help="As `vllm serve --api-key`.")
    ] = "",
    operator_key: Annotated[
        str,
        typer.Option(
            envvar="VLLM_FLEXQUANT_OPERATOR_KEY", help="As set where the server was started."
        ),
    ] = "",
) -> None:
    """Fetch what a server recorded of its last steps (its option trace_steps says how many)."""
    from vllm_flexquant.cli.trace import fetch

    typer.echo(fetch(url, api_key, operator_key, out))


@app.command()
def replay(
    recorded: Annotated[Path, typer.Argument(help="File of `flexquant trace`.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="OPTION=VALUE that differs from the recorded; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Decide recorded steps again, by the recorded policy or by another one."""
    from vllm_flexquant.cli.trace import replayed

    for line in replayed(recorded, changes or [], as_json):
        typer.echo(line)
