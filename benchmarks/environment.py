# SPDX-License-Identifier: Apache-2.0
"""Environments of their own for tools that are compared with, built when they are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

LOG = "pip.log"


class ToolError(RuntimeError):
    """An environment cannot be had; the message says why and what to do."""


def built(venv: Path, stamp: str, installs: Sequence[Sequence[str]]) -> Path | None:
    """The Python of an environment that `build_environment` finished, None if there is none.

    Args:
        stamp: name of a file in it that says what it was built of.
        installs: arguments of each `pip install`.
    """
    python, file = venv / "bin" / "python", venv / stamp
    wanted = json.dumps([list(packages) for packages in installs])
    done = file.is_file() and file.read_text() == wanted and os.access(python, os.X_OK)
    return python if done else None


def build_environment(
    venv: Path, stamp: str, installs: Sequence[Sequence[str]], remedy: str
) -> Path:
    """The environment's Python; what is not there yet is installed.

    Args:
        remedy: what to do where pip fails.

    Raises:
        ToolError: an environment that is not ours, or pip failed.
    """
    if python := built(venv, stamp, installs):
        return python
    file = venv / stamp
    if venv.exists() and not file.is_file() and any(venv.iterdir()):
        raise ToolError(f"{venv} was not built by this script; remove it or name another")
    print(f"building {venv}")
    venv.mkdir(parents=True, exist_ok=True)
    file.write_text("")
    base = getattr(sys, "_base_executable", None) or sys.executable
    run_logged([base, "-m", "venv", str(venv)], venv / LOG, "make one with a Python that has venv")
    python = venv / "bin" / "python"
    for packages in installs:
        run_logged([str(python), "-m", "pip", "install", *packages], venv / LOG, remedy)
    file.write_text(json.dumps([list(packages) for packages in installs]))
    return python


def run_logged(command: list[str], log: Path, remedy: str) -> None:
    """Run a command of such an environment; what it prints goes to the file `log`.

    Raises:
        ToolError: it failed; the message has the end of the log and `remedy`.
    """
    with log.open("a", encoding="utf-8") as file:
        # it must find its own packages and no others
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        run = subprocess.run(command, stdout=file, stderr=file, env=environ, check=False)
    if run.returncode:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-10:])
        raise ToolError(
            f"{' '.join(command[:3])} ended with {run.returncode}: {remedy}. The log is {log}, "
            f"its end:\n{end}"
        )
