# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compiled for GPUs that are not here, against the table in the repository."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.kernels import aot, machine_code
from benchmarks.provenance import ROOT
from tools import check_triton

TABLE = ROOT / aot.RESULTS
VERSION = "3.7.1"
"""Triton whose rows must all be there: that of vLLM 0.32."""


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return json.loads(TABLE.read_text())["results"]


@pytest.fixture
def compile_names(monkeypatch, tmp_path) -> Callable[..., int]:
    """`aot.main` on a table of its own, of kernels with these names under this Triton."""
    for variable in ("TRITON_CACHE_DIR", "TRITON_INTERPRET"):
        monkeypatch.setenv(variable, "0")  # which `main` changes

    def compiled(version: str, names: str, *arguments: str) -> int:
        def examine(name: str, target: str) -> dict:
            return _row(variant=name, target=target, triton=version)

        monkeypatch.setattr(aot, "examine", examine)
        monkeypatch.setattr(aot, "triton_version", lambda: version)
        monkeypatch.setattr(aot, "cases", lambda target, quick: names)
        out = str(tmp_path / "table.json")
        return aot.main(["--out", out, "--targets", "sm_90", *arguments])

    return compiled


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_compile_and_are_no_worse_than_in_the_table(target) -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels.aot", "--check", "--quick", "--targets", target],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_is_whole_and_without_fault(rows, gpu) -> None:
    from benchmarks.kernels.aot_cases import cases

    known = {(row["triton"], row["target"], row["variant"]) for row in rows}
    assert len(known) == len(rows)
    for target in aot.TARGETS:
        for case in cases(target, quick=False):
            assert (VERSION, target, case.name) in known
    for version in check_triton.VERSIONS:
        for target in aot.TARGETS:
            assert {(version, target, case.name) for case in cases(target, quick=True)} <= known
    for row in rows:
        assert list(aot.faults(row, row)) == [], row


def test_a_check_under_a_named_triton_needs_it_and_its_rows(compile_names, capsys) -> None:
    assert compile_names("1", "a") == 0
    assert compile_names("1", "a", "--check", "--triton", "1") == 0
    assert compile_names("1", "ab", "--check", "--triton", "1") == 1
    assert "not in the table" in capsys.readouterr().out
    assert compile_names("2", "a", "--check", "--triton", "1") == 1
    assert capsys.readouterr().out == "triton 2 would be imported, not 1\n"


def _version(folder: Path, version: str) -> Path:
    """A folder with a Triton that the check takes for installed."""
    package = folder / f"triton-{version}" / "triton"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    return package.parent


def test_versions_of_triton_are_kept_and_installed_anew_where_they_are_not(
    tmp_path, monkeypatch, capsys
) -> None:
    folder = _version(tmp_path, "1.0")
    assert check_triton.installed("1.0", tmp_path) == folder
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(check_triton.CheckError, match=r"(?s)triton 0\.0.*No matching.*run again"):
        check_triton.installed("0.0", tmp_path)
    assert not (tmp_path / "triton-0.0").exists()
    monkeypatch.setattr(check_triton, "ROOT", tmp_path / "empty")
    assert check_triton.main() == 1
    assert "check_triton: pip could not install triton 3.6.0" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, 2, 3, 64])
def test_every_target_is_compiled_once_under_every_version(monkeypatch, capsys, processes) -> None:
    done, worse = [], []

    def compiled(version: str, folder: Path, arguments: list[str]) -> tuple[int, str]:
        assert folder == Path(version)
        assert arguments[0] == "--targets"
        done.extend((version, target) for target in arguments[1:])
        return int((version, arguments[1]) in worse), "rows\n"

    monkeypatch.setattr(check_triton, "compile_rows", compiled)
    folders = {version: Path(version) for version in ("a", "b")}
    assert check_triton.check(folders, processes, [])
    assert sorted(done) == [(v, target) for v in "ab" for target in sorted(aot.TARGETS)]
    worse.append(("b", "sm_80"))
    assert not check_triton.check(folders, processes, [])
    assert "triton b\nrows\n" in capsys.readouterr().out


def _row(**changes) -> dict:
    loop = {"per_weight": 2.0, "loads": {"16": 4, "8": 0, "4": 2}}
    row = {
        "triton": VERSION, "target": "sm_90", "variant": "4|2|2 g64 bf16, 8 rows",
        "registers": 200, "stack": 0, "spills": 0, "shared": 20000, "instructions": 3000,
        "widths": {"4": loop, "8": loop | {"per_weight": 3.9}}, "wide_widths": [4, 8],
    }  # fmt: skip
    return row | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stack": 8}, "spills: 0 and 8 bytes of stack"),
        ({"spills": 3}, "spills: 3 and 0 bytes"),
        ({"shared": 232449}, "232449 bytes of shared memory where sm_90 has 232448"),
        ({"target": "sm_120", "shared": 101377}, "where sm_120 has 101376"),
        (
            {"widths": {"4": {"per_weight": 2.51, "loads": {"16": 4}}}},
            "4 bit: 2.51 instructions a weight, to reach 2.5",
        ),
        (
            {"widths": {"8": {"per_weight": 3.9, "loads": {"16": 0, "8": 8}}}},
            "8 bit: no loads of 16 bytes",
        ),
    ],
)
def test_faults_of_a_row_by_itself(changes, words) -> None:
    assert list(aot.faults(_row(), None)) == []
    (fault,) = aot.faults(_row(**changes), None)
    assert words in fault


def test_a_row_worse_than_in_the_table() -> None:
    slower = _row()["widths"]["4"] | {"per_weight": 2.03}
    (fault,) = aot.faults(_row(widths={"4": slower}), _row())
    assert fault == "4 bit: 2.03 instructions a weight, the table has 2.0"
    slower["per_weight"] = 2.01
    assert list(aot.faults(_row(widths={"4": slower}), _row())) == []
    small = _row(variant="probe, bf16", widths={}, instructions=600)
    (fault,) = aot.faults(small | {"instructions": 631}, small)
    assert fault == "631 instructions, the table has 600"
    assert list(aot.faults(small | {"instructions": 630}, small)) == []


def test_the_table_keeps_what_was_not_compiled_anew(compile_names, tmp_path, capsys) -> None:
    compiled = compile_names

    def table() -> list[str]:
        rows = json.loads((tmp_path / "table.json").read_text())["results"]
        return [f"{row['triton']} {row['variant']}" for row in rows]

    assert compiled("1", "ab") == compiled("2", "ab") == 0
    assert compiled("2", "ac", "--quick") == 0
    assert table() == ["1 a", "1 b", "2 a", "2 b", "2 c"]
    assert compiled("2", "a") == 0
    assert table() == ["1 a", "1 b", "2 a"]
    capsys.readouterr()
    assert compiled("2", "d", "--check") == 0
    assert "not in the table" in capsys.readouterr().out
    assert "2 d" not in table()


LISTING = """
\t.L_x_1:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0020*/                   LOP3.LUT R8, R4, 0xf, RZ, 0xc0, !PT ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
\t.L_x_2:
        /*0050*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0060*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0070*/               @P1 BRA `(.L_x_2) ;
\t.L_x_3:
        /*0080*/                   IADD3 R4, R4, 1, RZ ;
        /*0090*/               @P1 BRA `(.L_x_3) ;
"""


def test_loops_are_found_in_a_listing() -> None:
    first, second = machine_code.loops(LISTING)
    assert first == ["LDG.E", "HMMA.16816.F32.BF16", "BRA"]
    assert machine_code.loads(second) == {"16": 2, "8": 0, "4": 0}
    assert machine_code.loaded_bytes(second) == 32
    counted = machine_code.per_weight(second, weights=64, threads=32)
    assert counted["per_weight"] == 2.5
    assert counted["most"] == {"LDG": 1, "LDGSTS": 1, "LOP3": 1, "HMMA": 1, "BRA": 1}
