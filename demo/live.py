# SPDX-License-Identifier: Apache-2.0
"""The live view of a policy at work."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from math import fsum
from typing import Any

import httpx
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from demo.client import Client

POLL_SECONDS = 0.5
ANSWER_LINES = 6
COLOURS = {2: "red", 3: "red", 4: "dark_orange", 6: "green", 8: "blue"}


def strip(layers: list[dict[str, Any]]) -> Text:
    """One coloured digit per layer, in the order of the model: its width in bits."""
    text = Text()
    for layer in layers:
        text.append(str(layer["width"]), style=COLOURS.get(layer["width"], "magenta"))
    return text


def view(title: str, status: dict[str, Any], answer: str) -> RenderableType:
    """The panel: what `GET /v1/flexquant` says, and what there is of the streamed answer."""
    running = status["requests"]
    entropies = [r["entropy_nats"] for r in running if r["entropy_nats"] is not None]
    entropy = f"{fsum(entropies) / len(entropies):.2f} nats" if entropies else "-"
    facts = Table.grid(padding=(0, 2))
    facts.add_row(
        f"mean [bold]{status['mean_bits']:.2f}[/] bits",
        f"{status['bytes_read_per_step'] / 1e6:.0f} MB per step",
        f"entropy [bold]{entropy}[/]",
        f"{len(running)} requests running",
        f"step {status['steps']}",
    )
    top = max(status["levels"] - 1, 1)
    level = Table.grid(padding=(0, 1))
    level.add_row(
        f"level {status['level']:>3} of {status['levels'] - 1}",
        ProgressBar(total=top, completed=status["level"], width=50),
    )
    lines = answer.strip().splitlines()[-ANSWER_LINES:]
    parts: list[RenderableType] = [facts]
    if status["options"]["policy"] == "entropy":
        parts.append(level)
    parts += [Text("width of each layer:", style="dim"), strip(status["layers"])]
    parts += [Text("an answer:", style="dim"), Text("\n".join(lines), style="italic")]
    return Panel(Group(*parts), title=title, title_align="left")


class LiveView:
    """Polls the server and redraws until the context ends; prints nothing where no one watches."""

    def __init__(self, client: Client, title: str, console: Console) -> None:
        self.client, self.title = client, title
        self.answer = ""
        self.polls = 0
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._task: asyncio.Task[None] | None = None

    def show_answer(self, text: str) -> None:
        """Take in what there is of the streamed answer."""
        self.answer = text

    async def __aenter__(self) -> LiveView:
        self._live.start()
        self._task = asyncio.create_task(self._poll())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._live.stop()

    async def _poll(self) -> None:
        while True:
            try:
                status = await self.client.status()
            except httpx.HTTPError:
                return  # the requests report what is wrong
            self.polls += 1
            self._live.update(view(self.title, status, self.answer), refresh=True)
            await asyncio.sleep(POLL_SECONDS)
