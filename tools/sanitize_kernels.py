#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Run the kernel tests with the native library under AddressSanitizer and UBSan.

usage: sanitize_kernels.py [PYTEST ARGUMENT ...]

Needs GCC with its sanitizer libraries, and runs in the environment that the tests run in. First a
small library with three mistakes shows, loaded into Python in the same way, that each of them is
found; then the kernels are built with the same flags, and their tests run. The first finding ends
the process. Masked and tile instructions, which the compiler does not instrument, are covered by
the guard pages of tests/kernels/test_emulated.py.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "sanitize"
FLAGS = (
    "-O1", "-g1",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
    # What the kernels inline by the thousand, without which they compile in a quarter of the time:
    # null pointers fault anyway, and no reference outlives its block.
    "-fno-sanitize=null,object-size", "-fno-sanitize-address-use-after-scope",
    "--param=asan-instrumentation-with-call-threshold=0",
)  # fmt: skip
TESTS = (
    "tests/kernels/test_linear.py",
    "tests/kernels/test_entropy.py",
    "tests/kernels/test_decide.py",
)
NOT_RUN = "compiled"  # torch.compile runs the C++ compiler, which gains nothing from a sanitizer
EXIT_CODE = 86
"""Of a process that a sanitizer ends."""

MISTAKES = """
#include <climits>
#include <cstdlib>
#include <cstring>
typedef int Vector __attribute__((vector_size(16), aligned(1)));
static int overrun(int past) {
  int* data = static_cast<int*>(std::aligned_alloc(64, 64));
  std::memset(data, 1, 64);
  const int sum = (*reinterpret_cast<const Vector*>(data + 12 + past))[3];
  std::free(data);
  return sum;
}
extern "C" __attribute__((visibility("default"))) int mistake(int which, int by) {
  if (which == 0) return overrun(by);             // by 1: reads past the end
  if (which == 1) return INT_MAX - 1 + by;        // by 2: overflows
  if (which == 2) return 1 << (30 + by);          // by 2: shifts too far
  return -1;
}
"""
CALL = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).mistake(int(sys.argv[2]), int(sys.argv[3]))"
FINDINGS = (
    (0, 1, "heap-buffer-overflow"),
    (1, 2, "signed integer overflow"),
    (2, 2, "shift exponent 32 is too large"),
)
BUILD = "from flexquant_kernels.cpu import build; print(build.ensure_built())"
LOAD = """
import flexquant_kernels as fk
status = fk.load_native(build=False)
print(status.reason, *fk.supported_isas(), sep="\\n")
raise SystemExit(not status.loaded)
"""


def fail(message: str) -> None:
    """End with the message on standard error."""
    sys.stdout.flush()
    raise SystemExit(f"sanitize: {message}")


def find_runtimes(compiler: list[str]) -> list[str]:
    """Libraries to load before all others: of the sanitizers, and C++ for its exceptions."""
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        command = [*compiler, f"-print-file-name={name}"]
        path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(path):
            fail(f"{compiler[0]} has no {name}: install GCC with its sanitizer libraries")
        found.append(os.path.realpath(path))
    return found


def run(title: str, command: list[str], environ: dict[str, str]) -> None:
    """Run a step with its output on the terminal; ends the program when it fails."""
    print(f"+ {title}", flush=True)
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environ, check=False)
    if done.returncode:
        found = "a sanitizer found something" if done.returncode == EXIT_CODE else "it failed"
        fail(f"{title}: {found} (status {done.returncode})")
    print(f"  took {time.monotonic() - start:.0f} s", flush=True)


def check_that_mistakes_are_found(compiler: list[str], environ: dict[str, str]) -> None:
    """Each mistake must be found, and the same code without it must not be blamed."""
    print("+ mistakes made on purpose", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "mistakes.cpp", Path(folder) / "mistakes.so"
        source.write_text(MISTAKES)
        build = [*compiler, *FLAGS, "-w", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(build, check=True)
        for which, by, words in FINDINGS:
            for amount, found in ((0, False), (by, True)):
                command = [sys.executable, "-c", CALL, str(library), str(which), str(amount)]
                done = subprocess.run(
                    command, env=environ, capture_output=True, text=True, check=False
                )
                right = (done.returncode, words in done.stderr) == (EXIT_CODE * found, found)
                if not right:
                    fail(
                        f"{words}: expected {'a' if found else 'no'} finding, got status "
                        f"{done.returncode}:\n{done.stderr[-2000:]}"
                    )
            print(f"  found: {words}", flush=True)


def main() -> None:
    """Check the sanitizers, build, run the tests."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(compiler[0]) is None:
        fail(f"{compiler[0]} was not found: install GCC or set CXX")
    CACHE.mkdir(parents=True, exist_ok=True)
    plain = os.environ | {
        "CXX": shlex.join(compiler),
        "FLEXQUANT_CXXFLAGS": shlex.join(FLAGS),
        "VLLM_FLEXQUANT_CACHE": str(CACHE),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    # Not for the compiler: it would run many times slower.
    checked = plain | {
        "LD_PRELOAD": " ".join(find_runtimes(compiler)),
        # Python and torch keep what they allocate; leaks of the kernels are not looked for.
        "ASAN_OPTIONS": f"detect_leaks=0:exitcode={EXIT_CODE}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={EXIT_CODE}",
    }
    check_that_mistakes_are_found(compiler, checked)
    run("build the kernels", [sys.executable, "-c", BUILD], plain)
    run("load them", [sys.executable, "-c", LOAD], checked)
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-o", f"cache_dir={CACHE}/pytest"]
    select = ["-k", f"not {NOT_RUN}", "-m", "not slow"]
    run("kernel tests", [*pytest, *select, *TESTS, *sys.argv[1:]], checked)
    print("sanitize: no findings")


if __name__ == "__main__":
    main()
