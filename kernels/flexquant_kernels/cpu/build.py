# SPDX-License-Identifier: Apache-2.0
"""Builds the native CPU kernels once, caches them and loads them into torch.

The library lies in ``VLLM_FLEXQUANT_CACHE`` (else ``$XDG_CACHE_HOME/vllm_flexquant/native``, else
``~/.cache/vllm_flexquant/native``) under a hash of all that its code must fit: sources, flags,
torch, Python, C library. Which compiler made it is not part of that, so that a machine without one
can use it; a record beside it (``.json``) says which it was, and holds the digest that guards
against truncation: a damaged file is rebuilt, never mapped.

OpenMP: sources are compiled with ``-fopenmp`` but linked without it, naming torch's own libgomp
instead of the compiler's, so that the process keeps one OpenMP runtime and one thread pool.
"""

import hashlib
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from . import native

CACHE_VARIABLE = "VLLM_FLEXQUANT_CACHE"
FLAGS_VARIABLE = "FLEXQUANT_CXXFLAGS"
"""More compiler and linker flags, for those who work on the kernels; part of the hash."""

_NOT_ON = {"x86_64": ("neon",), "aarch64": ("avx", "amx")}
"""What the name of a source that is not for this kind of processor has after its last ``_``."""
_LOCK_TIMEOUT_S = 600
_COMPILE_TIMEOUT_S = 600


class NativeUnavailableError(RuntimeError):
    """The native kernels cannot be used; the message is a clause with the reason and the remedy."""


def _check_platform() -> None:
    known = native.isas_of_machine()
    if sys.platform != "linux" or not known:
        raise NativeUnavailableError(
            f"{sys.platform} on {native.machine()} is not supported by the native CPU kernels"
        )
    # What Linux does not list, the library finds out when it is loaded.
    reasons = {isa: native.why_not(isa) for isa in known}
    if all(reasons.values()):
        least = known[-1]
        raise NativeUnavailableError(
            f"{reasons[least]}, which the least demanding of the native kernels, {least}, needs"
        )


def find_compiler() -> list[str] | None:
    """Command of the C++ compiler: ``CXX`` alone if set, else g++, c++ or clang++ on PATH."""
    named = os.environ.get("CXX")
    if named:
        command = shlex.split(named)
        return command if command and shutil.which(command[0]) else None
    found = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    return [found] if found else None


def _require_compiler() -> list[str]:
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
    return compiler


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
        lines = done.stderr.strip().splitlines()
        tail = " | ".join([x for x in lines if "error" in x][:6] or lines[:6])
        raise NativeUnavailableError(f"{command[0]} failed with status {done.returncode}: {tail}")
    return done.stdout


def _torch_paths() -> tuple[list[str], Path]:
    root = Path(torch.__file__).parent
    include = root / "include"
    return [str(include), str(include / "torch" / "csrc" / "api" / "include")], root / "lib"


def _openmp_runtime(lib: Path) -> str:
    """Linker input: the libgomp that torch brought, else the system's, as torch uses."""
    for folder in (lib, lib.parent.parent / "torch.libs"):
        found = sorted(folder.glob("libgomp*.so*"))
        if found:
            return str(found[0])
    return "-lgomp"


def _extra_flags() -> list[str]:
    return shlex.split(os.environ.get(FLAGS_VARIABLE, ""))


def _compile_flags() -> list[str]:
    # No contraction: results must not depend on which multiply-adds a compiler fuses.
    return [
        "-std=c++20", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno",
        "-fvisibility=hidden",
        "-w",  # GCC 12 warns tens of thousands of times of its own intrinsics
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *_extra_flags(),
    ]  # fmt: skip


def _link_flags(lib: Path) -> list[str]:
    return [
        "-shared",
        f"-L{lib}",
        "-Wl,--no-as-needed",
        "-lc10",
        "-ltorch_cpu",
        _openmp_runtime(lib),
        *_extra_flags(),
    ]


def _source_dir() -> Path:
    return Path(__file__).parent


def source_files() -> list[Path]:
    """C++ sources of this kind of processor; the name of a file says where it does not belong."""
    foreign = _NOT_ON.get(native.machine(), ())
    found = sorted(_source_dir().glob("*.cpp"))
    return [f for f in found if not any(f"_{word}" in f.stem for word in foreign)]


def _libc_version() -> str:
    name = "CS_GNU_LIBC_VERSION"
    return (os.confstr(name) or "") if name in os.confstr_names else ""


def library_name() -> str:
    """File name of the library: a hash of everything that its code must fit.

    No paths, so that a cache may be built in one place and used in another.
    """
    digest = hashlib.sha256()
    for path in (*source_files(), *sorted(_source_dir().glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    facts = [
        *_compile_flags(),
        Path(_openmp_runtime(_torch_paths()[1])).name,
        torch.__version__,
        str(torch.version.git_version),
        sys.implementation.cache_tag or "",
        native.machine(),
        _libc_version(),
    ]
    digest.update("\0".join(facts).encode())
    return f"flexquant_cpu_{digest.hexdigest()[:20]}.so"


def cache_dir() -> Path:
    """Folder of built libraries, from the environment; not created here."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "vllm_flexquant" / "native"


def _temporary_dir() -> Path:
    """Where libraries go when the cache folder is not writable, the same for all processes."""
    return Path(tempfile.gettempdir()) / f"vllm_flexquant_{os.getuid()}"


def _is_private(folder: Path) -> bool:
    """True for a folder that only this user can have put files into."""
    try:
        facts = folder.lstat()
    except OSError:
        return False
    ours = facts.st_uid == os.getuid() and not facts.st_mode & 0o022
    return stat.S_ISDIR(facts.st_mode) and ours


def _writable_dir(folder: Path) -> Path:
    """``folder`` if files can be made there, else a private temporary folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        shared = _temporary_dir()
        try:
            with suppress(FileExistsError):
                shared.mkdir(mode=0o700)
            return shared if _is_private(shared) else Path(tempfile.mkdtemp(prefix=shared.name))
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


def _record_path(library: Path) -> Path:
    return library.with_suffix(".json")


def read_record(library: Path) -> dict[str, str]:
    """What was written after the build: ``sha256`` of the library, ``compiler``, ``command``."""
    try:
        record = json.loads(_record_path(library).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(library: Path) -> bool:
    """True when the library is there and matches the digest written after its build."""
    try:
        return read_record(library).get("sha256") == _sha256(library)
    except OSError:
        return False


def parallelism() -> int:
    """Compilers to run at a time: the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _compile(compiler: list[str], library: Path) -> None:
    include, lib = _torch_paths()
    flags = [*_compile_flags(), *(f"-isystem{path}" for path in include)]
    sources = source_files()
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build_") as work:
        objects = [Path(work) / f"{source.stem}.o" for source in sources]
        commands = [
            [*compiler, *flags, "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(parallelism()) as pool:
            list(pool.map(_run, commands))
        built = Path(work) / "built.so"
        _run([*compiler, *map(str, objects), *_link_flags(lib), "-o", str(built)])
        record = {
            "sha256": _sha256(built),
            "compiler": _run([*compiler, "--version"]).partition("\n")[0],
            "command": shlex.join([*compiler, *_compile_flags()]),
        }
        written = Path(work) / "record"
        written.write_text(json.dumps(record, indent=2) + "\n")
        # A library without its record counts as damaged: a crash between the two is safe.
        os.replace(built, library)
        os.replace(written, _record_path(library))


def ensure_built(build: bool = True, reject: Path | None = None) -> Path:
    """Path of an intact library, compiled now when there is none.

    Args:
        reject: a library that is intact and still of no use; it is built anew.
    """
    _check_platform()
    try:
        return _find_or_build(build, reject)
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise NativeUnavailableError(
            f"the native kernels could not be built ({error}): "
            f"set {CACHE_VARIABLE} to a writable local folder"
        ) from error


def _find_or_build(build: bool, reject: Path | None) -> Path:
    name = library_name()
    folders = [cache_dir()]
    if _is_private(_temporary_dir()):
        folders.append(_temporary_dir())
    for folder in folders:
        if folder / name != reject and is_intact(folder / name):
            return folder / name
    if not build:
        raise NativeUnavailableError(
            f"the native kernels are not built in {folders[0]}: call load_native(build=True)"
        )
    compiler = _require_compiler()
    library = _writable_dir(folders[0]) / name
    with _locked(library):
        # Another process may have built it while this one waited.
        if library == reject or not is_intact(library):
            _compile(compiler, library)
    return library


def _load_into_torch(path: Path) -> None:
    """Register the kernels with torch.

    Raises:
        OSError, RuntimeError, AttributeError: the file is no library of these kernels.
    """
    torch.ops.load_library(str(path))
    native.attach(path)


def load(build: bool = True) -> tuple[Path, str]:
    """Load the library into torch and select the instruction set; (path, instruction set).

    Raises:
        NativeUnavailableError: no library, or one that this machine cannot use.
        ValueError: ``VLLM_FLEXQUANT_ISA`` names no instruction set.
    """
    native.wanted_isa()
    path = ensure_built(build=build)
    try:
        _load_into_torch(path)
    except (OSError, RuntimeError, AttributeError) as error:
        failure = f"{path} does not load ({error})"
        if not build:
            raise NativeUnavailableError(failure) from error
        try:
            path = ensure_built(reject=path)
        except NativeUnavailableError as reason:
            raise NativeUnavailableError(
                f"{failure} and cannot be rebuilt, because {reason}"
            ) from error
        try:
            _load_into_torch(path)
        except (OSError, RuntimeError, AttributeError) as again:
            raise NativeUnavailableError(
                f"{path} was rebuilt and still does not load ({again})"
            ) from again
    if not native.supported_isas():
        raise NativeUnavailableError(
            "this CPU or operating system offers none of the instruction sets "
            f"{', '.join(native.isas_of_machine())}"
        )
    return path, native.select_isa(native.choose_isa())
