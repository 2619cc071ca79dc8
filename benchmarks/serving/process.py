# SPDX-License-Identifier: Apache-2.0
"""The other end of `benchmarks.serving.engine`: starts it, asks it, ends it.

Between commands an engine is stopped (SIGSTOP). vLLM's idle threads would else take some 2 % of a
core from each engine that is measured beside it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.provenance import ROOT
from benchmarks.serving.engine import EngineSpec

ENGINE = (sys.executable, "-m", "benchmarks.serving.engine")
STOP_SECONDS = 20
TAIL_LINES = 25
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class EngineError(RuntimeError):
    """An engine died; the message holds the end of its log."""


class EngineProcess:
    """Context manager around one engine process. `facts` is what it said of itself."""

    def __init__(self, spec: EngineSpec, log: Path) -> None:
        self.spec = spec
        self.log = log
        self.facts: dict[str, Any] = {}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [*(spec.command or ENGINE), spec.to_json()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                cwd=ROOT,
                start_new_session=True,  # an interrupt at the terminal is ours to handle
            )

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop(patient=error is None)

    def wait(self) -> None:
        """Wait until the engine is up."""
        self.facts = self._answer()
        self._signal(signal.SIGSTOP)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one command."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; reading says so, with its log
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.kill(self._process.pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            tail = "\n".join(f"  | {line}" for line in lines[-TAIL_LINES:])
            raise EngineError(f"engine {self.spec.name} ended with status {status}\n{tail}")
        return dict(json.loads(line))

    def cpu_seconds(self) -> float:
        """CPU time that all threads of the process have used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND

    def stop(self, patient: bool = True) -> None:
        """End the process; `patient` lets it finish by itself first."""
        assert self._process.stdin is not None
        if self._process.poll() is None:
            self._signal(signal.SIGCONT)
            try:
                self._process.stdin.close()
                self._process.wait(STOP_SECONDS if patient else 0.1)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


@contextmanager
def running(
    specs: Sequence[EngineSpec], logs: Path, unavailable: dict[str, str] | None = None
) -> Iterator[dict[str, EngineProcess]]:
    """All engines, up at the same time, by name; started one after another.

    Threads that wait for each other in a start spin: two starts at once take longer than both.

    Args:
        unavailable: gets the reason of each engine that does not start.

    Raises:
        EngineError: one does not start, and `unavailable` is None.
    """
    with ExitStack() as stack:
        engines = {}
        for spec in specs:
            engine = stack.enter_context(EngineProcess(spec, logs / f"{spec.name}.log"))
            try:
                engine.wait()
            except EngineError as error:
                if unavailable is None:
                    raise
                unavailable[spec.name] = reason(str(error))
                continue
            engines[spec.name] = engine
        yield engines


def reason(message: str) -> str:
    """Of an engine's death, the last line of its log that names an error."""
    lines = [line.strip(" |") for line in message.splitlines()]
    errors = [line for line in lines if re.match(r"\w*(Error|Exception|Exit)\b", line)]
    return (errors or lines)[-1][:300]
