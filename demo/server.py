# SPDX-License-Identifier: Apache-2.0
"""A `vllm serve` of one's own: started, waited for, and gone afterwards whatever happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
START_SECONDS = 600
STOP_SECONDS = 20
TAIL_LINES = 25


class ServerError(RuntimeError):
    """The server cannot be started or died; the message says why."""


def find_vllm() -> Path:
    """The `vllm` command of this environment.

    Raises:
        ServerError: there is none, or it would die for lack of its metadata.
    """
    script = Path(sys.executable).with_name("vllm")
    try:
        version("vllm")  # the command asks for this first
    except PackageNotFoundError:
        script = Path()
    if not script.is_file():
        raise ServerError(f"no working `vllm` command beside {sys.executable}; run `make setup`")
    return script


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class VllmServer:
    """Context manager around `vllm serve`; inside it the server answers at `url`.

    The server leads a process group, which is stopped as a whole when the context ends.
    """

    def __init__(
        self, model: str, arguments: Sequence[str], environ: Mapping[str, str], log: Path
    ) -> None:
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.log = log
        self.command = [str(find_vllm()), "serve", model, "--host", HOST]
        self.command += ["--port", str(self.port), *arguments]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environ = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_NO_USAGE_STATS": "1",
            **environ,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._launched = 0.0
        self.start_seconds = 0.0

    def __enter__(self) -> VllmServer:
        if self._process is None:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self, waiting: Callable[[float], None] = lambda seconds: None) -> None:
        """Start the server and wait until it answers; `waiting` is called about once a second.

        Raises:
            ServerError: it died, or does not answer in time.
        """
        self.launch()
        self.wait(waiting)

    def launch(self) -> None:
        """Start the server and return at once."""
        if self._process is not None:
            raise ServerError("the server was started already")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._launched = time.monotonic()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, waiting: Callable[[float], None] = lambda seconds: None) -> None:
        """Wait until the server that was launched answers; `waiting` gets the seconds since then.

        Raises:
            ServerError: it died, or does not answer in time.
        """
        try:
            while not self._healthy():
                self.check()
                if time.monotonic() - self._launched > START_SECONDS:
                    raise ServerError(f"no answer after {START_SECONDS} s\n{self.tail()}")
                waiting(time.monotonic() - self._launched)
                time.sleep(1)
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - self._launched

    def _healthy(self) -> bool:
        try:
            with urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def check(self) -> None:
        """Raise ServerError if the server is no longer running."""
        if self._process is None or self._process.poll() is None:
            return
        raise ServerError(
            f"the server ended with status {self._process.returncode}:\n  "
            f"{' '.join(self.command)}\n{self.tail()}"
        )

    def pause(self) -> None:
        """Stop all its processes where they are, so that they take no time from others."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def tail(self) -> str:
        """The last lines of the server's log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        shown = "\n".join(f"  | {line}" for line in lines[-TAIL_LINES:])
        return f"{shown}\n  The whole log: {self.log}"

    def stop(self) -> None:
        """End the process group, kindly first. Idempotent."""
        if self._process is None:
            return
        self.resume()  # a stopped process hears no SIGTERM
        process, self._process = self._process, None
        for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 5)):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break  # no process of the group is left
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and _group_lives(process):
                time.sleep(0.1)
        process.wait()


def _group_lives(leader: subprocess.Popen[bytes]) -> bool:
    leader.poll()  # reaps it, so that it no longer counts
    try:
        os.killpg(leader.pid, 0)
    except ProcessLookupError:
        return False
    return True
