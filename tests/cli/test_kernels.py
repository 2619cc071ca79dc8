# SPDX-License-Identifier: Apache-2.0
"""`flexquant kernels`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexquant_kernels import ops
from flexquant_kernels.cpu import native
from vllm_flexquant.cli.kernels import report

COMMAND = "from vllm_flexquant.cli import main; main()"


def _table(lines: list[str], head: str) -> dict[str, list[str]]:
    """Rows of the table that begins with `head`: first cell to the others."""
    start = next(i for i, line in enumerate(lines) if line.startswith(head))
    end = lines.index("", start) if "" in lines[start:] else len(lines)
    rows = [line.split("  ") for line in lines[start + 1 : end]]
    return {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}


def test_with_the_native_kernels():
    status = ops.load_native()
    if not status.loaded:
        pytest.skip(f"native kernels not available: {status.reason}")
    lines = list(report(build=False))
    assert lines[0] == f"native CPU kernels: {status.reason}"
    assert f"library:            {status.path}" in lines
    assert next(line for line in lines if line.startswith("made by:")).split(maxsplit=2)[2]
    if not torch.cuda.is_available():
        triton = next(line for line in lines if line.startswith("Triton kernels:"))
        assert "none here: torch " in triton
    states = _table(lines, "instruction set")
    assert states[status.isa] == ["selected"]
    for isa in native.ISAS:
        if isa not in ops.supported_isas():
            assert states[isa][0].startswith("not supported: ")
        elif isa != status.isa:
            assert states[isa] == ["supported"]
    kernels = _table(lines, "layout")
    for layout in ("4|2|2", "2|2|4", "2|1|1|2|2"):
        assert kernels[layout] == [f"cpu_{status.isa}"] * 3
    assert kernels["any other"] == ["reference"] * 3
    assert any(line.startswith("reference: layout (4, 4) has no native kernel") for line in lines)
    paths = _table(lines, "rows at once")
    assert paths == {rows: [what] for rows, what in ops.row_paths(status.isa)}


def test_without_compiler_and_cache(tmp_path: Path):
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "VLLM_FLEXQUANT_CACHE": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "CXX": "",
        "PATH": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "kernels"],
        env=variables, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert "no C++ compiler" in lines[0]
    assert "compiler here:      none" in lines
    assert not [row for row in _table(lines, "instruction set").values() if row == ["selected"]]
    kernels = _table(lines, "layout")
    assert all(row == ["reference"] * 3 for row in kernels.values())
