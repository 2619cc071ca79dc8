#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Check what the Triton kernels compile to under each Triton that users have.

usage: check_triton.py [ARGUMENT OF benchmarks.kernels.aot ...]

Standard library only. Installs each version beside the environment, in .cache/triton-VERSION, and
keeps it; then compiles the rows of `--quick` for all targets and fails where one is worse than in
benchmarks/results/triton-aot.json. Needs the network the first time, and no GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.6.0", "3.7.1")
"""The oldest that is supported, and that of vLLM 0.32. The tests compile with the environment's."""

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


class CheckError(Exception):
    """A version cannot be had; the message is for the user."""


def installed(version: str, cache: Path) -> Path:
    """The folder that a version was installed into; installs it when it is not there.

    Raises:
        CheckError: pip could not install it.
    """
    folder = cache / f"triton-{version}"
    if (folder / "triton" / "__init__.py").is_file():
        return folder
    print(f"+ install triton {version} into {folder}", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = cache / f"triton-{version}.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    options = ("--quiet", "--disable-pip-version-check", "--no-input", "--no-deps")
    where = ("--only-binary", ":all:", "--target", str(unfinished))
    command = [sys.executable, "-m", "pip", "install", *options, *where, f"triton=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join(f"    {line}" for line in done.stderr.splitlines()[-10:])
        raise CheckError(
            f"pip could not install triton {version} for this Python and machine:\n{tail}\n"
            "  It is fetched once: run again where pip reaches a package index"
        )
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return folder


def compile_rows(version: str, folder: Path, arguments: list[str]) -> tuple[int, str]:
    """(status, output) of `benchmarks.kernels.aot --check` under a version."""
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = (str(folder), str(ROOT), str(ROOT / "kernels"))
    command = [sys.executable, "-m", "benchmarks.kernels.aot", "--check", "--quick"]
    done = subprocess.run(
        [*command, "--triton", version, *arguments],
        cwd=ROOT,
        env=environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def check(folders: dict[str, Path], processes: int, arguments: list[str]) -> bool:
    """Compile under every version, so many processes at a time; whether all is well."""
    shares = max(1, processes // len(folders))
    jobs = [
        (version, folder, ["--targets", *TARGETS[i::shares], *arguments])
        for i in range(min(shares, len(TARGETS)))
        for version, folder in folders.items()
    ]
    well = True
    with ThreadPoolExecutor(processes) as pool:
        for (version, _, _), (status, output) in zip(
            jobs, pool.map(lambda job: compile_rows(*job), jobs), strict=True
        ):
            print(f"triton {version}\n{output}", end="", flush=True)
            well &= status == 0
    return well


def main() -> int:
    """Install and check; 1 when a version cannot be had, or a kernel is worse under one."""
    began = time.monotonic()
    try:
        folders = {version: installed(version, ROOT / ".cache") for version in VERSIONS}
    except CheckError as error:
        print(f"check_triton: {error}", file=sys.stderr)
        return 1
    well = check(folders, len(os.sched_getaffinity(0)), sys.argv[1:])
    seconds = time.monotonic() - began
    words = "no worse than in the table" if well else "worse than in the table, or not compiled"
    print(f"check_triton: {words}, under {' and '.join(VERSIONS)} ({seconds:.0f} s)")
    return 0 if well else 1


if __name__ == "__main__":
    raise SystemExit(main())
