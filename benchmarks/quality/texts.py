# SPDX-License-Identifier: Apache-2.0
"""`--text NAME=FILE`, for benchmarks that compare kinds of text."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import hash_file


def add_text_option(parser: ArgumentParser) -> None:
    """Declare `--text`, which may be given several times."""
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")


def text_files(given: Sequence[str]) -> dict[str, Path]:
    """Files by name.

    Raises:
        SystemExit: one is given in another form.
    """
    if wrong := [text for text in given if "=" not in text]:
        raise SystemExit(f"--text is {wrong[0]}; give it as NAME=FILE")
    return {name: Path(file) for name, _, file in (text.partition("=") for text in given)}


def text_facts(files: Mapping[str, Path]) -> dict[str, Any]:
    """Name and hash of each, for the provenance."""
    return {n: {"name": f.name, "sha256": hash_file(f)} for n, f in files.items()}
