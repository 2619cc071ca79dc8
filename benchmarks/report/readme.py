# SPDX-License-Identifier: Apache-2.0
"""Blocks of the README that are made of results.

    <!-- generated: NAME from FILE -->
    ...
    <!-- /generated -->

NAME is one of `BLOCKS`, FILE a JSON file of results, from the root of the repository. What stands
between the lines is written anew by `python -m benchmarks.report --readme`; with `--check` a block
that differs is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import blocks

BLOCK = re.compile(
    r"(<!-- generated: (?P<name>\S+) from (?P<file>\S+) -->\n)(?P<body>.*?)(<!-- /generated -->)",
    re.DOTALL,
)
BLOCKS: Mapping[str, Callable[[Mapping[str, Any], str], str]] = {
    "demo": blocks.demo,
    "headline": blocks.headline,
    "static-wins": blocks.static_wins,
    "load": blocks.load,
    "tasks": blocks.tasks,
    "papers": blocks.papers,
}
"""By name: from the content of the file and its path, the Markdown."""


def fill(text: str, root: Path) -> str:
    """`text` with every block made anew.

    Raises:
        ValueError: a block has an unknown name, or its file is not there.
    """

    def made(found: re.Match[str]) -> str:
        name, file = found["name"], found["file"]
        if name not in BLOCKS:
            raise ValueError(f"README block {name!r} is none of {', '.join(BLOCKS)}")
        if not (root / file).is_file():
            raise ValueError(f"README block {name!r} is made of {file}, which is not there")
        content = json.loads((root / file).read_text(encoding="utf-8"))
        return f"{found[1]}{BLOCKS[name](content, file).strip()}\n{found[5]}"

    return BLOCK.sub(made, text)
