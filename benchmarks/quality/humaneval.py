# SPDX-License-Identifier: Apache-2.0
"""Runs what a model wrote for a HumanEval problem, together with the problem's test.

The program is what a language model made up. It runs in a process of its own with limits of time,
memory and file size, in an empty folder, without standard input. That keeps accidents small; it is
no sandbox against malice.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from typing import Any

SECONDS = 10
MEMORY_BYTES = 2 << 30
FILE_BYTES = 1 << 20
STOP = ["\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```"]
"""Where a function that was begun has ended."""


def program(problem: dict[str, Any], completion: str) -> str:
    """The function, and the test that fails by an exception."""
    return (
        f"{problem['prompt']}{completion}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"
    )


def passes(problem: dict[str, Any], completion: str) -> bool:
    """Whether the completed function passes the problem's test."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))

    with tempfile.TemporaryDirectory(prefix="flexquant-humaneval-") as folder:
        try:
            run = subprocess.run(
                [sys.executable, "-I", "-c", program(problem, completion)],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=2 * SECONDS,
                check=False,
                env={"PATH": ""},
                preexec_fn=limit,
            )
        except subprocess.TimeoutExpired:
            return False
    return run.returncode == 0
