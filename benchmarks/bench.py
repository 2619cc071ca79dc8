# SPDX-License-Identifier: Apache-2.0
"""All measurements of the report, one stage after another; what was done is not done again.

    make bench                # 60 to 90 minutes on 2 cores; before it calibration, 15 to 20
    make bench QUICK=1        # ten minutes: fewer systems, fewer rounds, less text
    make bench ARGS='--stages speed replay'
    make bench ARGS=--execute # HumanEval too, which runs programs that the model wrote

A stage is a script that writes one JSON file. All go to `benchmarks/results/MACHINE/`, those of
`--quick` to `benchmarks/out/MACHINE/`, where git does not look. `run.json` beside them says which
stages are done, with which arguments and on which sources: after an interrupt or a failure the same
command goes on with the next. A stage that fails does not stop the others; at the end the report is
made of what there is, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.provenance import ROOT, machine_name, write_json
from demo.get_model import ModelError, get_model

SOURCES = ("vllm_flexquant", "kernels", "benchmarks", "demo")
NO_SOURCES = (
    "benchmarks/results",
    "benchmarks/report",
    "benchmarks/regression",
    "benchmarks/bench",
)
"""What no stage's figures depend on."""

CALIBRATE = "calibrate"

WIDE = "140"
"""Columns of the stages' tables where there is no terminal to ask."""


@dataclass(frozen=True)
class Stage:
    """One script. minutes, quick_minutes: what it takes on 2 cores, None where it is left out."""

    name: str
    module: str
    minutes: float
    quick_minutes: float | None
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--quick",)
    model: bool = True
    calibrated: str = "--calibrated"

    def file(self, folder: Path) -> Path:
        """Where its results go."""
        return folder / f"{self.name}.json"


STAGES = (
    Stage("speed", "benchmarks.serving.run", 18, 4, ("--batches", "1", "4", "16")),
    Stage("quality", "benchmarks.quality.served", 11, None),
    Stage("replay", "benchmarks.serving.replay", 20, 4),
    Stage("vllm-bench", "benchmarks.serving.vllm_bench", 20, None),
    Stage("tasks", "benchmarks.quality.tasks", 13, None),
    Stage(
        "policies",
        "benchmarks.serving.policies",
        12,
        None,
        ("--batches", "1", "16", "--rounds", "5", "--tokens", "24"),
        model=False,
        calibrated="--checkpoint",
    ),
)


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="All measurements of the report.")
    parser.add_argument("--model", help="unquantized checkpoint folder (default: the demo's model)")
    parser.add_argument(
        "--calibrated", type=Path, help="calibrated checkpoint (default: made beside the model)"
    )
    parser.add_argument("--quick", action="store_true", help="ten minutes")
    parser.add_argument("--trace", help="arrival times and lengths for the replay, a CSV file")
    parser.add_argument(
        "--execute", action="store_true", help="HumanEval too: runs programs that the model wrote"
    )
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args(arguments)
    names = [stage.name for stage in STAGES]
    if wrong := [name for name in options.stages or () if name not in names]:
        parser.error(f"--stages: {wrong[0]} is none of {', '.join(names)}")
    if options.out is None:
        kind = "out" if options.quick else "results"
        options.out = ROOT / "benchmarks" / kind / machine_name()
    return options


def fingerprint(root: Path = ROOT) -> str:
    """Hash of all sources on which figures depend, as they are in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *SOURCES],
        cwd=root,
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    digest = hashlib.sha256()
    for name in sorted(filter(None, listed)):
        path = root / name.decode()
        if path.suffix in (".py", ".cpp", ".h", ".json") and path.is_file():
            if path.relative_to(root).as_posix().startswith(NO_SOURCES):
                continue
            digest.update(name + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


class Run:
    """What is done in one folder of results."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.json"
        self.done: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            self.done = json.loads(self.path.read_text(encoding="utf-8"))["results"]

    def is_done(self, stage: Stage, command: Sequence[str], sources: str) -> bool:
        """Whether the stage's results are there, by this command and of these sources."""
        entry = self.done.get(stage.name, {})
        return (
            entry.get("command") == list(command)
            and entry.get("sources") == sources
            and stage.file(self.path.parent).is_file()
        )

    def add(self, stage: Stage, command: Sequence[str], sources: str, seconds: float) -> None:
        """Write down that a stage is done."""
        self.done[stage.name] = {
            "command": list(command),
            "sources": sources,
            "seconds": round(seconds, 1),
        }
        write_json(self.path, self.done, {"written_by": "benchmarks.bench"})


def shown(path: Path) -> str:
    """A path as it is written down: within the repository from there, else its name."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def command_of(
    stage: Stage, options: argparse.Namespace, model: str, calibrated: Path
) -> list[str]:
    """The command of a stage, less Python."""
    command = ["-m", stage.module, "--out", str(stage.file(options.out))]
    if stage.model:
        command += ["--model", model]
    command += [stage.calibrated, str(calibrated)]
    command += stage.quick if options.quick else stage.arguments
    if stage.name == "replay" and options.trace:
        command += ["--trace", options.trace]
    if stage.name == "tasks" and options.execute:
        command.append("--execute")
    return command


def calibrate(model: str, out: Path, quick: bool, console: Console) -> None:
    """Make the calibrated checkpoint `out` unless it is there.

    Raises:
        subprocess.CalledProcessError: it cannot be made.
    """
    if (out / "flexquant.json").is_file():
        return
    size = ("--sequences", "16", "--length", "128") if quick else ()
    console.rule(f"{CALIBRATE}: {'a small text' if quick else 'about 15 minutes'}")
    tool = str(Path(sys.executable).with_name("flexquant"))
    subprocess.run([tool, "quantize", model, str(out), "--resume", *size], check=True, cwd=ROOT)


def run_stages(options: argparse.Namespace, model: str, calibrated: Path, console: Console) -> bool:
    """Run what is not done; whether all of it is now."""
    stages = [
        stage
        for stage in STAGES
        if (not options.quick or stage.quick_minutes is not None)
        and (not options.stages or stage.name in options.stages)
    ]
    run, sources, complete = Run(options.out), fingerprint(), True
    environ = os.environ if sys.stdout.isatty() else {"COLUMNS": WIDE, **os.environ}

    def minutes(some: Sequence[Stage]) -> float:
        return sum((s.quick_minutes if options.quick else s.minutes) or 0 for s in some)

    for number, stage in enumerate(stages, 1):
        command = command_of(stage, options, model, calibrated)
        written = [shown(Path(word)) if Path(word).is_absolute() else word for word in command]
        heading = f"[{number}/{len(stages)}] {stage.name}"
        if not options.again and run.is_done(stage, written, sources):
            console.print(f"{heading}: done before, {shown(stage.file(options.out))}")
            continue
        left = minutes(stages[number - 1 :])
        console.rule(f"{heading}, about {minutes([stage]):g} min; {left:g} min to go")
        began = time.monotonic()
        status = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environ, check=False
        ).returncode
        seconds = time.monotonic() - began
        if status == 0 and stage.file(options.out).is_file():
            run.add(stage, written, sources, seconds)
            console.print(f"{heading}: {seconds:.0f} s")
        else:
            complete = False
            console.print(f"{heading}: failed with status {status}", style="red")
    return complete


def main() -> None:
    """Calibrate, measure, report."""
    options = read_options()
    console = Console()
    try:
        model = options.model or str(get_model())
    except ModelError as error:
        raise SystemExit(str(error)) from None
    options.out.mkdir(parents=True, exist_ok=True)
    calibrated = options.calibrated
    if calibrated is None:
        full = Path(model).with_name(f"{Path(model).name}-flexquant")
        small = Path(model).with_name(f"{full.name}-quick")
        calibrated = small if options.quick and not full.exists() else full
    began = time.monotonic()
    try:
        calibrate(model, calibrated, options.quick, console)
        complete = run_stages(options, model, calibrated, console)
        for module in ("benchmarks.papers", "benchmarks.report"):
            command = [sys.executable, "-m", module, "--results", str(options.out)]
            if module == "benchmarks.papers":
                command += ["--calibrated", str(calibrated), "--model", model]
                command += ["--quick"] if options.quick else []
            complete &= subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{Path(error.cmd[0]).name} failed; see above") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on from here") from None
    console.print(f"{(time.monotonic() - began) / 60:.0f} min; {shown(options.out)}/report.html")
    raise SystemExit(0 if complete else 1)


if __name__ == "__main__":
    main()
