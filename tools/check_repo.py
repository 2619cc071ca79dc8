#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Check the rules of this repository that no other tool checks; one line for each breach.

usage: check_repo.py [FOLDER]
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_LINES = 600
PACKAGES = ("vllm_flexquant", "kernels")
SOURCES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh"}
SPDX = "SPDX-License-Identifier: Apache-2.0"
# Joined here, so that this file does not name them.
HOSTS = (
    ("pypi", "org"),
    ("pythonhosted", "org"),
    ("download", "pytorch", "org"),
    ("registry", "npmjs", "org"),
    ("deb", "debian", "org"),
)
ALLOWED = ("tools/setup_env.py", ".".join(("download", "pytorch", "org")))  # torch for CPUs
HOST = re.compile(r"\b(?:" + "|".join(r"\.".join(host) for host in HOSTS) + r")\b")
MACHINE_PATH = re.compile(r"(?<![\w.~$})>/-])/(?:(?:root|work|opt)\b|(?:home|Users)/\w)")


def listed_files(root: Path) -> list[Path]:
    """Files of the working tree that git tracks or would add."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    paths = sorted({root / name for name in listing.split("\0") if name})
    return [path for path in paths if path.is_file()]


def breaches(root: Path) -> Iterator[str]:
    """Yield `path[:line]: what is wrong` for each breach under `root`."""
    if (root / "kernels" / "__init__.py").exists():
        yield (
            "kernels/__init__.py: must not exist; an importable top-level `kernels` "
            "breaks transformers"
        )
    for path in listed_files(root):
        name = path.relative_to(root).as_posix()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        if path.suffix in SOURCES:
            if not any(SPDX in line for line in lines[:2]):
                yield f"{name}: the first or second line must say `{SPDX}`"
            if path.relative_to(root).parts[0] in PACKAGES and len(lines) > MAX_LINES:
                yield f"{name}: {len(lines)} lines; split what is over {MAX_LINES}"
        for number, line in enumerate(lines, 1):
            if (host := HOST.search(line)) and (name, host.group()) != ALLOWED:
                yield f"{name}:{number}: names the registry host {host.group()}"
            if found := MACHINE_PATH.search(line):
                yield f"{name}:{number}: names a path of one machine, {found.group()}"


def main() -> int:
    """Print the breaches; 1 if there are any."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    found = list(breaches(root))
    for breach in found:
        print(breach)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
