# SPDX-License-Identifier: Apache-2.0
"""Building, caching and loading the native library; the registration of the operators."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flexquant_kernels as fk
from flexquant_kernels import ops
from flexquant_kernels.cpu import build

REPORT = """
import logging, os, sys
logging.basicConfig(format="%(name)s %(levelname)s %(message)s", stream=sys.stdout)
import flexquant_kernels as fk, torch
status = fk.load_native(build={build})
again = fk.load_native()
print("loaded", status.loaded, again.loaded)
print("inode", os.stat(status.path).st_ino if status.path else 0)
print("path", status.path)
print("choice", fk.dispatch("cpu", torch.float32, 64, 64, 32, (4, 2, 2)).name)
print("entropy", float(torch.ops.flexquant.entropy(torch.zeros(1, 8))))
"""

OPENMP_RUNTIMES = """
import pathlib
import flexquant_kernels as fk, torch
assert fk.load_native(build=False).loaded
torch.ops.flexquant.entropy(torch.randn(8, 50000))
print(pathlib.Path("/proc/self/maps").read_text())
"""

REGISTER_AGAIN = """
import gc, importlib, sys, torch, flexquant_kernels as fk
importlib.reload(fk.ops)
for name in [m for m in sys.modules if m.startswith("flexquant")]:
    del sys.modules[name]
del fk
gc.collect()
import flexquant_kernels
gc.collect()
print(float(torch.ops.flexquant.entropy(torch.zeros(1, 1))))
"""


def _start(build: bool = True, **environment: str) -> subprocess.Popen[str]:
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = [sys.executable, "-c", REPORT.format(build=build)]
    return subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _finish(process: subprocess.Popen[str]) -> dict[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    lines = out.splitlines()
    report = dict(line.split(" ", 1) for line in lines if not line.startswith("vllm_flexquant"))
    report["warnings"] = "\n".join(line for line in lines if line.startswith("vllm_flexquant"))
    return report


def test_import_neither_builds_nor_loads() -> None:
    code = (
        "import sys, flexquant_kernels as fk; s = fk.native_status(); "
        "assert not s.loaded and s.path is None; "
        "assert not {'filelock', 'vllm', 'triton'} & (set(sys.modules) - before)"
    )
    code = "import sys, torch; before = set(sys.modules); " + code
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], env=variables, check=True, timeout=60)


@pytest.mark.parametrize(
    "environment", [{"CXX": "/nonexistent/g++"}, {"CXX": "", "PATH": ""}], ids=["CXX", "PATH"]
)
def test_missing_compiler_warns_once_and_serves_the_reference(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    report = _finish(_start(VLLM_FLEXQUANT_CACHE=str(tmp_path), **environment))
    assert report["loaded"] == "False False"
    assert report["choice"] == "reference"
    assert float(report["entropy"]) == pytest.approx(2.0794415)
    assert report["warnings"].count("vllm_flexquant.kernels WARNING") == 1
    assert "10-50x slower" in report["warnings"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("native")
def test_failing_compiler_reports_its_message(tmp_path: Path) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit 0\necho "no such header" >&2\nexit 3\n'
    )
    compiler.chmod(0o755)
    report = _finish(_start(VLLM_FLEXQUANT_CACHE=str(tmp_path / "cache"), CXX=str(compiler)))
    assert report["loaded"] == "False False"
    assert "failed with status 3: no such header" in report["warnings"]
    assert not list((tmp_path / "cache").glob("*.so"))


@pytest.mark.slow
def test_two_processes_repair_a_damaged_cache_with_one_build(native: str, tmp_path: Path) -> None:
    path = Path(native)
    for file in (path, path.with_suffix(".sha256")):
        shutil.copy(file, tmp_path)
    damaged = tmp_path / path.name
    damaged.write_bytes(
        path.read_bytes()[: path.stat().st_size // 2]
    )  # mapping this would end in SIGBUS
    assert not build.is_intact(damaged)
    reports = [_finish(p) for p in [_start(VLLM_FLEXQUANT_CACHE=str(tmp_path)) for _ in range(2)]]
    assert [r["loaded"] for r in reports] == ["True True"] * 2
    assert [r["path"] for r in reports] == [str(damaged)] * 2
    assert len({r["inode"] for r in reports}) == 1
    assert build.is_intact(damaged)
    assert all(r["choice"] == "cpu_avx512_vnni" and not r["warnings"] for r in reports)
    assert not list(tmp_path.glob("build_*"))


def test_cache_is_found_without_building(native: str, tmp_path: Path) -> None:
    report = _finish(_start(build=False, VLLM_FLEXQUANT_CACHE=str(Path(native).parent)))
    assert report["loaded"] == "True True"
    assert report["path"] == native


@pytest.mark.usefixtures("native")
def test_library_that_does_not_load_is_rebuilt_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A digest that matches does not make a library: the content is wrong from the start."""
    forced: list[bool] = []
    wrong = tmp_path / "wrong.so"
    wrong.write_bytes(b"not a library")

    def ensure_built(build: bool = True, force: bool = False) -> Path:
        forced.append(force)
        return wrong

    monkeypatch.setattr(build, "ensure_built", ensure_built)
    with pytest.raises(build.NativeUnavailableError, match="was rebuilt and still does not load"):
        build.load()
    assert forced == [False, True]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_FLEXQUANT_CACHE", str(tmp_path / "a"))
    assert build.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("VLLM_FLEXQUANT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert build.cache_dir() == tmp_path / "b" / "vllm_flexquant" / "native"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_dir() == Path.home() / ".cache" / "vllm_flexquant" / "native"


def test_unwritable_cache_falls_back_to_a_private_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")  # a folder cannot be made below a file, not even by root
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = build._writable_dir(blocked / "cache")
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr("tempfile.tempdir", str(blocked))
    with pytest.raises(build.NativeUnavailableError, match="set VLLM_FLEXQUANT_CACHE"):
        build._writable_dir(blocked / "cache")


def test_unsupported_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(build.NativeUnavailableError, match="aarch64 is not supported"):
        build.ensure_built()


def test_missing_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (sys.platform == "linux" and os.uname().machine == "x86_64"):
        pytest.skip("reads the flags of an x86-64 Linux processor")
    monkeypatch.setattr(Path, "read_text", lambda _: "flags\t\t: fpu avx2 avx512f\n")
    with pytest.raises(build.NativeUnavailableError, match="lacks avx512bw, avx512vl, avx512_vnni"):
        build.ensure_built()


def run_python(code: str) -> str:
    """What `code` prints in a process of its own, which must succeed."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_one_openmp_runtime(native: str) -> None:
    """In a process of its own: other tests load libraries that bring a runtime of theirs."""
    printed = run_python(OPENMP_RUNTIMES)
    runtimes = set(re.findall(r"\S*/lib(?:g|i)?omp[\w.-]*\.so\S*", printed))
    assert len(runtimes) == 1, runtimes


def test_registering_again_changes_nothing() -> None:
    before = torch.ops.flexquant.linear.default
    ops._register()
    printed = run_python(REGISTER_AGAIN)
    assert printed.strip() == "0.0"
    assert torch.ops.flexquant.linear.default is before


def test_dispatch_gives_reasons(native: str) -> None:
    fits = ("cpu", torch.bfloat16, 576, 1536, 64, (4, 2, 2))
    choice = fk.dispatch(*fits)
    assert (choice.name, choice.tile) == ("cpu_avx512_vnni", 16)
    assert "avx512_vnni" in choice.reason
    for position, value, word in (
        (0, "cuda", "cuda"),
        (1, torch.float64, "float64"),
        (2, 600, "600"),
        (4, 128, "128"),
        (5, (4, 4), "(4, 4)"),
    ):
        other = list(fits)
        other[position] = value
        choice = fk.dispatch(*other)
        assert (choice.name, choice.tile) == ("reference", 0)
        assert word in choice.reason
