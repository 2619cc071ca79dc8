# SPDX-License-Identifier: Apache-2.0
"""Builds the native CPU kernels once, caches them and loads them into torch.

The library lies in ``VLLM_FLEXQUANT_CACHE`` (else ``$XDG_CACHE_HOME/vllm_flexquant/native``, else
``~/.cache/vllm_flexquant/native``) under a hash of sources, flags, compiler, torch and Python. A
digest file beside it guards against truncation: a damaged file is rebuilt, never mapped.

OpenMP: sources are compiled with ``-fopenmp`` but linked without it, naming torch's own libgomp
instead of the compiler's, so that the process keeps one OpenMP runtime and one thread pool.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

SOURCES = ("binding.cpp", "linear.cpp", "entropy.cpp")
HEADERS = ("kernels.h", "simd.h")
CACHE_VARIABLE = "VLLM_FLEXQUANT_CACHE"
ISA = "avx512_vnni"
_CPU_FLAGS = ("avx512f", "avx512bw", "avx512vl", "avx512_vnni")
_LOCK_TIMEOUT_S = 600
_COMPILE_TIMEOUT_S = 600


class NativeUnavailableError(RuntimeError):
    """The native kernels cannot be used; the message is a clause with the reason and the remedy."""


def _check_platform() -> None:
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ("x86_64", "AMD64"):
        raise NativeUnavailableError(
            f"{sys.platform} on {machine} is not supported by the native CPU kernels"
        )
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return  # the library tests the CPU itself when it is loaded
    flags = next(
        (set(line.split()) for line in cpuinfo.splitlines() if line.startswith("flags")), None
    )
    missing = [f for f in _CPU_FLAGS if flags is not None and f not in flags]
    if missing:
        raise NativeUnavailableError(
            f"this CPU lacks {', '.join(missing)}, which the native kernels need"
        )


def find_compiler() -> list[str] | None:
    """Command of the C++ compiler: ``CXX`` alone if set, else g++, c++ or clang++ on PATH."""
    named = os.environ.get("CXX")
    if named:
        command = shlex.split(named)
        return command if command and shutil.which(command[0]) else None
    found = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    return [found] if found else None


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(
            f"the compiler {command[0]} could not be run ({error})"
        ) from error
    if done.returncode:
        tail = " | ".join(done.stderr.strip().splitlines()[:6])
        raise NativeUnavailableError(f"{command[0]} failed with status {done.returncode}: {tail}")
    return done.stdout


def _torch_paths() -> tuple[list[str], Path]:
    root = Path(torch.__file__).parent
    include = root / "include"
    return [str(include), str(include / "torch" / "csrc" / "api" / "include")], root / "lib"


def _openmp_runtime(lib: Path) -> list[str]:
    """Linker input: the libgomp that torch brought, else the system's, as torch uses."""
    for folder in (lib, lib.parent.parent / "torch.libs"):
        found = sorted(folder.glob("libgomp*.so*"))
        if found:
            return [str(found[0])]
    return ["-lgomp"]


def _flags() -> tuple[list[str], list[str]]:
    include, lib = _torch_paths()
    # No contraction: results must not depend on which multiply-adds a compiler fuses.
    compile_flags = [
        "-std=c++20", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno",
        "-fvisibility=hidden", "-Wall",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-isystem{path}" for path in include),
    ]  # fmt: skip
    link_flags = [
        "-shared",
        f"-L{lib}",
        "-Wl,--no-as-needed",
        "-lc10",
        "-ltorch_cpu",
        *_openmp_runtime(lib),
    ]
    return compile_flags, link_flags


def _source_dir() -> Path:
    return Path(__file__).parent


def library_name(compiler: list[str]) -> str:
    """File name of the library: a hash of everything that its code depends on."""
    digest = hashlib.sha256()
    for name in (*SOURCES, *HEADERS):
        digest.update(name.encode() + b"\0" + (_source_dir() / name).read_bytes() + b"\0")
    compile_flags, link_flags = _flags()
    facts = [*compiler, _run([*compiler, "--version"]), *compile_flags, *link_flags]
    facts += [torch.__version__, sys.implementation.cache_tag or "", platform.machine()]
    digest.update("\0".join(facts).encode())
    return f"flexquant_cpu_{digest.hexdigest()[:20]}.so"


def cache_dir() -> Path:
    """Folder of built libraries, from the environment; not created here."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "vllm_flexquant" / "native"


def _writable_dir(folder: Path) -> Path:
    """``folder`` if files can be made there, else a new private temporary folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        try:
            return Path(tempfile.mkdtemp(prefix="vllm_flexquant_"))
        except OSError:
            raise NativeUnavailableError(
                f"neither the cache folder {folder} ({error.strerror}) nor a temporary folder is "
                f"writable: set {CACHE_VARIABLE} to a writable folder"
            ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of one library between processes."""
    from filelock import FileLock, Timeout  # a dependency of torch; kept off the import path

    try:
        with FileLock(str(path) + ".lock", timeout=_LOCK_TIMEOUT_S):
            yield
    except Timeout as error:
        raise NativeUnavailableError(
            f"another process has held {path}.lock for {_LOCK_TIMEOUT_S} s: "
            "end it or remove the file"
        ) from error


def _digest_path(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(library: Path) -> bool:
    """True when the library is there and matches the digest written after its build."""
    try:
        return _digest_path(library).read_text().strip() == _sha256(library)
    except OSError:
        return False


def _compile(compiler: list[str], library: Path) -> None:
    compile_flags, link_flags = _flags()
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build_") as work:
        objects = [Path(work) / f"{Path(name).stem}.o" for name in SOURCES]
        commands = [
            [*compiler, *compile_flags, "-c", str(_source_dir() / name), "-o", str(target)]
            for name, target in zip(SOURCES, objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=min(len(commands), os.cpu_count() or 1)) as pool:
            list(pool.map(_run, commands))
        built = Path(work) / "built.so"
        _run([*compiler, *map(str, objects), *link_flags, "-o", str(built)])
        digest = Path(work) / "digest"
        digest.write_text(_sha256(built))
        # A library without its digest counts as damaged: a crash between the two is safe.
        os.replace(built, library)
        os.replace(digest, _digest_path(library))


def ensure_built(build: bool = True, force: bool = False) -> Path:
    """Path of an intact library, compiled now when the cache has none (or ``force``)."""
    _check_platform()
    compiler = find_compiler()
    if compiler is None:
        named = os.environ.get("CXX")
        what = (
            f"the compiler CXX={named} was not found"
            if named
            else "no C++ compiler (g++, c++, clang++) was found"
        )
        raise NativeUnavailableError(
            f"{what}: install one (Debian, Ubuntu: apt install g++) or set CXX"
        )
    try:
        return _find_or_build(compiler, build, force)
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise NativeUnavailableError(
            f"the native kernels could not be built ({error}): "
            f"set {CACHE_VARIABLE} to a writable local folder"
        ) from error


def _find_or_build(compiler: list[str], build: bool, force: bool) -> Path:
    name = library_name(compiler)
    cached = cache_dir() / name
    if not force and is_intact(cached):
        return cached
    if not build:
        raise NativeUnavailableError(
            f"the native kernels are not built in {cached.parent}: call load_native(build=True)"
        )
    library = _writable_dir(cached.parent) / name
    with _locked(library):
        if force or not is_intact(
            library
        ):  # another process may have built it while this one waited
            _compile(compiler, library)
    return library


def load(build: bool = True) -> tuple[Path, str]:
    """Load the library into torch; (path, instruction set), or NativeUnavailableError."""
    path = ensure_built(build=build)
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        if not build:
            raise NativeUnavailableError(f"{path} does not load ({error})") from error
        path = ensure_built(force=True)
        try:
            torch.ops.load_library(str(path))
        except (OSError, RuntimeError) as again:
            raise NativeUnavailableError(
                f"{path} was rebuilt and still does not load ({again})"
            ) from again
    supported = ctypes.CDLL(str(path)).flexquant_isa_supported
    supported.restype = ctypes.c_int
    if not supported():
        raise NativeUnavailableError("this CPU or operating system does not offer AVX512-VNNI")
    return path, ISA
