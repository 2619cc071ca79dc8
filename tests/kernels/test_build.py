# SPDX-License-Identifier: Apache-2.0
"""Building, caching and loading the native library; the registration of the operators."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import flexquant_kernels as fk
from flexquant_kernels import ops
from flexquant_kernels.cpu import build
from flexquant_kernels.cpu import native as native_isas

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


def _start(
    build: bool = True, prefix: Sequence[str] = (), **environment: str
) -> subprocess.Popen[str]:
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": environment.get("VLLM_FLEXQUANT_CACHE", tempfile.gettempdir()),
        **environment,
    }
    executable = shutil.which(prefix[0]) if prefix else None  # PATH may be empty in there
    command = [*prefix, sys.executable, "-c", REPORT.format(build=build)]
    return subprocess.Popen(
        command,
        executable=executable,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
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
    (tmp_path / "cache").mkdir()
    report = _finish(_start(VLLM_FLEXQUANT_CACHE=str(tmp_path / "cache"), CXX=str(compiler)))
    assert report["loaded"] == "False False"
    assert "failed with status 3: no such header" in report["warnings"]
    assert not list((tmp_path / "cache").glob("*.so"))


NO_COMPILER = {"CXX": "", "PATH": ""}


def _copy_library(native: str, folder: Path) -> Path:
    path = Path(native)
    for file in (path, path.with_suffix(".json")):
        shutil.copy(file, folder)
    return folder / path.name


def _vouch_for(library: Path) -> None:
    """Make the record say that the library is as it was built."""
    record = build.read_record(library) | {"sha256": build._sha256(library)}
    library.with_suffix(".json").write_text(json.dumps(record))
    assert build.is_intact(library)


@pytest.fixture
def copying_compiler(native: str, tmp_path: Path) -> Path:
    """A compiler whose every output is the library, so that builds take no time; it keeps a log."""
    compiler = tmp_path / "cxx"
    compiler.write_text(
        "#!/bin/sh\n"
        f'echo "$*" >> {tmp_path}/calls\n'
        '[ "$1" = --version ] && echo "copier 1.0" && exit\n'
        "for out; do :; done\n"  # the last argument, after -o
        f'cp {native} "$out"\n'
    )
    compiler.chmod(0o755)
    return compiler


def test_two_processes_repair_a_damaged_cache_with_one_build(
    native: str, copying_compiler: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    damaged = _copy_library(native, cache)
    with damaged.open("r+b") as file:
        file.truncate(damaged.stat().st_size // 2)  # mapping this would end in SIGBUS
    assert not build.is_intact(damaged)
    variables = {"VLLM_FLEXQUANT_CACHE": str(cache), "CXX": str(copying_compiler)}
    reports = [_finish(p) for p in [_start(**variables) for _ in range(2)]]
    assert [r["loaded"] for r in reports] == ["True True"] * 2
    assert [r["path"] for r in reports] == [str(damaged)] * 2
    assert len({r["inode"] for r in reports}) == 1
    assert build.is_intact(damaged)
    assert build.read_record(damaged)["compiler"] == "copier 1.0"
    assert all(r["choice"].startswith("cpu_") and not r["warnings"] for r in reports)
    assert not list(cache.glob("build_*"))
    calls = (tmp_path / "calls").read_text().splitlines()
    sources = [Path(call.split()[-3]).name for call in calls if " -c " in call]
    assert sorted(sources) == sorted(path.name for path in build.source_files())
    assert len(calls) == len(sources) + 2  # and the link, and --version


def test_cache_is_found_without_building(native: str, tmp_path: Path) -> None:
    report = _finish(_start(build=False, VLLM_FLEXQUANT_CACHE=str(Path(native).parent)))
    assert report["loaded"] == "True True"
    assert report["path"] == native


def test_cached_library_needs_no_compiler(native: str, tmp_path: Path) -> None:
    library = _copy_library(native, tmp_path)
    report = _finish(_start(VLLM_FLEXQUANT_CACHE=str(tmp_path), **NO_COMPILER))
    assert (report["loaded"], report["path"]) == ("True True", str(library))
    assert not report["warnings"]
    assert sorted(tmp_path.iterdir()) == sorted([library, library.with_suffix(".json")])


def test_library_in_a_read_only_folder_is_used(native: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    library = _copy_library(native, folder)
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555)
    # root may write anywhere unless this is taken from it
    bound = ("setpriv", "--bounding-set=-dac_override") if os.geteuid() == 0 else ()
    if bound and shutil.which(bound[0]) is None:
        pytest.skip("root without setpriv (util-linux) cannot be kept from writing")
    assert subprocess.run([*bound, "touch", str(folder / "new")], check=False).returncode
    report = _finish(_start(prefix=bound, VLLM_FLEXQUANT_CACHE=str(folder), **NO_COMPILER))
    assert (report["loaded"], report["path"]) == ("True True", str(library))
    assert not report["warnings"]


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _of_another_machine(content: bytes) -> bytes:
    return (
        content[:18] + (0xB7 if content[18] != 0xB7 else 0x3E).to_bytes(2, "little") + content[20:]
    )


@pytest.mark.parametrize("spoil", [_cut, _of_another_machine])
def test_library_of_no_use_without_a_compiler_says_so(native: str, tmp_path: Path, spoil) -> None:
    library = _copy_library(native, tmp_path)
    library.write_bytes(spoil(library.read_bytes()))
    if spoil is not _cut:  # a digest that matches does not make a library
        _vouch_for(library)
    report = _finish(_start(VLLM_FLEXQUANT_CACHE=str(tmp_path), **NO_COMPILER))
    assert (report["loaded"], report["choice"]) == ("False False", "reference")
    assert "no C++ compiler (g++, c++, clang++) was found: install one" in report["warnings"]
    if spoil is not _cut:
        assert f"{library} does not load (" in report["warnings"]
        assert "and cannot be rebuilt, because" in report["warnings"]


def test_foreign_library_is_rebuilt(native: str, copying_compiler: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    library = _copy_library(native, cache)
    library.write_bytes(_of_another_machine(library.read_bytes()))
    _vouch_for(library)
    report = _finish(_start(VLLM_FLEXQUANT_CACHE=str(cache), CXX=str(copying_compiler)))
    assert (report["loaded"], report["path"]) == ("True True", str(library))
    assert not report["warnings"]
    assert library.read_bytes() == Path(native).read_bytes()


@pytest.mark.usefixtures("native")
def test_library_that_does_not_load_is_rebuilt_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rejected: list[Path | None] = []
    wrong = tmp_path / "wrong.so"
    wrong.write_bytes(b"not a library")

    def ensure_built(build: bool = True, reject: Path | None = None) -> Path:
        rejected.append(reject)
        return wrong

    monkeypatch.setattr(build, "ensure_built", ensure_built)
    with pytest.raises(build.NativeUnavailableError, match="was rebuilt and still does not load"):
        build.load()
    assert rejected == [None, wrong]


def test_name_of_the_library_follows_what_its_code_must_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources = tmp_path / "cpu"
    shutil.copytree(build._source_dir(), sources)
    monkeypatch.setattr(build, "_source_dir", lambda: sources)
    names = [build.library_name()]
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    assert build.library_name() == names[0]
    for file in ("kernels.h", "isa.cpp"):
        (sources / file).write_text((sources / file).read_text() + "\n")
        names.append(build.library_name())
    (sources / "more.h").write_text("")
    names.append(build.library_name())
    monkeypatch.setenv("FLEXQUANT_CXXFLAGS", "-O1")
    names.append(build.library_name())
    monkeypatch.setattr(torch, "__version__", "9.9")
    names.append(build.library_name())
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    names.append(build.library_name())
    assert len(set(names)) == len(names) == 7


def test_each_kind_of_processor_has_its_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        found[machine] = {path.name for path in build.source_files()}
    assert {"binding.cpp", "isa.cpp"} <= found["x86_64"] & found["aarch64"]
    assert not [name for name in found["x86_64"] if "neon" in name]
    assert not [name for name in found["aarch64"] if "avx" in name or "amx" in name]
    every = {path.name for path in build._source_dir().glob("*.cpp")}
    assert found["x86_64"] | found["aarch64"] == every


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
    assert folder == tmp_path / f"vllm_flexquant_{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert build._writable_dir(blocked / "cache") == folder
    monkeypatch.setattr("tempfile.tempdir", str(blocked))
    with pytest.raises(build.NativeUnavailableError, match="set VLLM_FLEXQUANT_CACHE"):
        build._writable_dir(blocked / "cache")


def test_temporary_folder_that_others_may_write_to_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shared = build._temporary_dir()
    shared.mkdir()
    shared.chmod(0o777)
    assert not build._is_private(shared)
    assert build._writable_dir(tmp_path / "file" / "cache") != shared
    shared.rmdir()
    shared.symlink_to(tmp_path, target_is_directory=True)
    assert not build._is_private(shared)


def test_library_in_the_temporary_folder_is_found(
    native: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("VLLM_FLEXQUANT_CACHE", str(tmp_path / "empty"))
    with pytest.raises(build.NativeUnavailableError, match=r"are not built in .*empty"):
        build.ensure_built(build=False)
    build._temporary_dir().mkdir(mode=0o700)
    library = _copy_library(native, build._temporary_dir())
    assert build.ensure_built(build=False) == library


def test_unsupported_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(build.NativeUnavailableError, match="riscv64 is not supported"):
        build.ensure_built()


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "message"),
    [
        ("x86_64", "flags\t\t: fpu avx f16c\n", "lacks avx2, fma, which .* avx2, needs"),
        ("aarch64", "Features\t: fp asimd\n", "lacks asimddp, which .* neon_dotprod, needs"),
    ],
)
def test_processor_without_any_instruction_set(
    monkeypatch: pytest.MonkeyPatch, machine: str, cpuinfo: str, message: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(native_isas, "_cpu_flags", lambda: native_isas.parse_flags(cpuinfo))
    with pytest.raises(build.NativeUnavailableError, match=message):
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


def test_dispatch_gives_reasons(isa: str) -> None:
    fits = ("cpu", torch.bfloat16, 576, 1536, 64, (4, 2, 2))
    choice = fk.dispatch(*fits)
    assert (choice.name, choice.tile) == (f"cpu_{isa}", 16)
    assert isa in choice.reason
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
