# SPDX-License-Identifier: Apache-2.0
"""Who else used the CPU while something was measured (Linux)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.serving.process import TICKS_PER_SECOND, EngineProcess

_IDLE, _IOWAIT, _STEAL = 3, 4, 7


def machine_seconds() -> tuple[float, float]:
    """CPU seconds that all processes of the machine used, and that its host took away."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    ticks = [int(field) / TICKS_PER_SECOND for field in fields]
    return sum(ticks) - ticks[_IDLE] - ticks[_IOWAIT] - ticks[_STEAL], ticks[_STEAL]


class Watch:
    """Adds up, over what is measured, the time of engines that should idle, and of all others."""

    def __init__(self, engines: Mapping[str, EngineProcess]) -> None:
        self._engines = engines
        self._wall = self._others = self._stolen = 0.0
        self._idle = dict.fromkeys(engines, 0.0)
        self._waited = dict.fromkeys(engines, 0.0)

    @contextmanager
    def measuring(self, name: str) -> Iterator[EngineProcess]:
        """While the engine `name` is measured."""
        before = {n: e.cpu_seconds() for n, e in self._engines.items()}
        used, stolen = machine_seconds()
        began = time.monotonic()
        yield self._engines[name]
        wall = time.monotonic() - began
        used_after, stolen_after = machine_seconds()
        spent = {n: e.cpu_seconds() - before[n] for n, e in self._engines.items()}
        self._wall += wall
        self._stolen += stolen_after - stolen
        self._others += max(used_after - used - sum(spent.values()), 0.0)
        for idle in spent.keys() - {name}:
            self._idle[idle] += spent[idle]
            self._waited[idle] += wall

    def summary(self) -> dict[str, Any]:
        """Shares of a core for each idle engine; of all cores for other processes and the host."""
        cores = (os.cpu_count() or 1) * (self._wall or 1.0)
        return {
            "idle_engines": {
                name: seconds / self._waited[name] if self._waited[name] else 0.0
                for name, seconds in self._idle.items()
            },
            "other_processes": self._others / cores,
            "stolen_by_host": self._stolen / cores,
        }
