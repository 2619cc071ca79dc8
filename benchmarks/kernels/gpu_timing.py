# SPDX-License-Identifier: Apache-2.0
"""Times on a GPU: replays of a CUDA graph whose calls take turns on copies, so that L2 is cold.

Needs torch alone. Untested on GPUs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

Call = Callable[[], object]

REPLAYS = 20
LEAST_CALLS = 8
"""In a graph, so that the time of starting it does not count."""

MOST_COPIES = 64
L2_BYTES = 64 << 20
"""Where torch does not say how large the cache is."""

COLD = 3
"""The copies of a call take so many times the size of L2 together."""


class NoGpuError(RuntimeError):
    """There is no GPU to measure on; the message is for the user."""


def find_gpu(what: str) -> torch.device:
    """The current GPU.

    Raises:
        NoGpuError: torch can use none.
    """
    if not torch.cuda.is_available():
        raise NoGpuError(
            f"{what} needs a GPU, and torch {torch.__version__} can use none here: run it on the "
            "GPU that it is for, with a CUDA or ROCm build of torch"
        )
    return torch.device("cuda", torch.cuda.current_device())


def copies_for_cold_cache(bytes_read: int, device: torch.device) -> int:
    """Copies of what a call reads that L2 cannot hold together; 1 without a GPU."""
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    cache = int(getattr(properties, "L2_cache_size", 0)) or L2_BYTES
    return min(MOST_COPIES, math.ceil(COLD * cache / max(bytes_read, 1)) + 1)


def seconds(calls: Sequence[Call], device: torch.device, rounds: int = 5) -> float:
    """Median seconds of a call, over rounds; `calls` take turns.

    On a GPU, of replays of one graph of all of them; without one, of the calls as they are, which
    in the interpreter says nothing of speed.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls)
    many = list(calls) * math.ceil(LEAST_CALLS / len(calls))
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in many:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in many:
            call()
    graph.replay()
    found = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        found.append(start.elapsed_time(end) / 1e3 / REPLAYS / len(many))
    return median(found)


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes/s, read and written, of torch's copy of a large tensor."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds([lambda: target.copy_(source)], device)
