# SPDX-License-Identifier: Apache-2.0
"""A plain read of memory, to know what share of its bandwidth a kernel reaches.

A small loop in C++, built on the spot: `torch.sum` of fp32 came to 70 to 90 % of it where it was
tried, and would have been a kind yardstick.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import median

import torch

from benchmarks.kernels.contenders import Call, Contender, UnavailableError
from flexquant_kernels.cpu.build import find_compiler

SOURCE = Path(__file__).with_name("plain_read.cpp")
STREAMS = (1, 2, 4, 8)
TRIAL_BYTES = 4 << 20
TRIAL_BUFFER = 1 << 30
TRIAL_ROUNDS = 25

Read = Callable[[int, int], int]
"""(address, bytes) -> a sum that means nothing."""


def _torch_openmp() -> list[str]:
    """Linker input: the OpenMP runtime that torch brought, so that both share one thread pool."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [str(found[0])] if found else ["-lgomp"]


def load_read() -> Callable[[int, int, int, int], int]:
    """Build and load: (address, bytes, threads, streams) -> sum.

    Raises:
        UnavailableError: no compiler, or it fails.
    """
    compiler = find_compiler()
    if compiler is None:
        raise UnavailableError("there is no C++ compiler to build the plain read with")
    with tempfile.TemporaryDirectory() as folder:
        unit, library = Path(folder) / "read.o", Path(folder) / "read.so"
        flags = ["-std=c++20", "-O3", "-march=native", "-fPIC", "-fopenmp"]
        for command in (
            [*compiler, *flags, "-c", str(SOURCE), "-o", str(unit)],
            [*compiler, "-shared", str(unit), *_torch_openmp(), "-o", str(library)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                tail = " | ".join(done.stderr.strip().splitlines()[:3])
                raise UnavailableError(f"the plain read does not build: {tail}")
        function = ctypes.CDLL(str(library)).plain_read
    function.restype = ctypes.c_uint64
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
    return function


def fastest_read(threads: int) -> tuple[Read, dict[int, float]]:
    """The read with the best number of streams per thread, and bytes/s by number of streams."""
    function = load_read()
    buffer = torch.ones(TRIAL_BUFFER // 8, dtype=torch.int64)
    offsets = cycle(range(0, TRIAL_BUFFER, TRIAL_BYTES))
    times: dict[int, list[float]] = {streams: [] for streams in STREAMS}
    for _ in range(TRIAL_ROUNDS):
        for streams in STREAMS:
            address = buffer.data_ptr() + next(offsets)
            start = time.perf_counter()
            function(address, TRIAL_BYTES, threads, streams)
            times[streams].append(time.perf_counter() - start)
    speeds = {streams: TRIAL_BYTES / median(found) for streams, found in times.items()}
    best = max(speeds, key=lambda streams: speeds[streams])
    return lambda address, count: function(address, count, threads, best), speeds


def read_name(width: int) -> str:
    """Name of the read of as many bytes as our planes and scales have at a width."""
    return f"plain read as at {width} bit"


def read_contender(read: Read, width: int, count: int) -> Contender:
    """A read of `count` bytes, which is what one width reads."""

    def make() -> Call:
        copy = torch.ones(count, dtype=torch.uint8)
        address = copy.data_ptr()

        def call(x: torch.Tensor, keep: object = copy) -> int:
            return read(address, count)

        return call

    return Contender(
        name=read_name(width),
        family="read",
        kernel="sum of 8-byte words",
        bits=width,
        bytes_read=count,
        bytes_kept=count,
        make=make,
        dequantized=None,
        bound=0.0,
    )
