# SPDX-License-Identifier: Apache-2.0
"""Options of benchmarks that compare a calibrated checkpoint on kinds of text."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import hash_file, provenance


def add_options(parser: ArgumentParser) -> None:
    """Declare `--model`, `--checkpoint`, and `--text`, which may be given several times."""
    parser.add_argument("--model", type=Path, required=True, help="unquantized checkpoint folder")
    parser.add_argument("--checkpoint", type=Path, required=True, help="calibrated checkpoint")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")


def text_files(given: Sequence[str]) -> dict[str, Path]:
    """Files by name.

    Raises:
        SystemExit: one is given in another form.
    """
    if wrong := [text for text in given if "=" not in text]:
        raise SystemExit(f"--text is {wrong[0]}; give it as NAME=FILE")
    return {name: Path(file) for name, _, file in (text.partition("=") for text in given)}


def facts_of(model: Path, files: Mapping[str, Path]) -> dict[str, Any]:
    """Provenance, with name and hash of each text."""
    texts = {n: {"name": f.name, "sha256": hash_file(f)} for n, f in files.items()}
    return provenance(model) | {"texts": texts}
