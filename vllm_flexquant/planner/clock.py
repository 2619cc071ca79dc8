# SPDX-License-Identifier: Apache-2.0
"""The host's clock: how long steps take, for `load` and the cost table."""

from __future__ import annotations

import time
from collections.abc import Sequence

from vllm_flexquant.policy.load import LoadControl

_CLOCKED = 8
"""Of so many steps, one is timed where nothing asks for all of them."""


class Clock:
    """Books the steps of one worker.

    every: all steps are timed, as they are under a target. elsewhere: another books them, by
    `book`. seconds: from the step before to this one, as far as it was timed.
    """

    def __init__(self, load: LoadControl) -> None:
        self.load = load
        self.every = self.elsewhere = False
        self.seconds = 0.0
        self._began = time.perf_counter()
        self._steps = 0
        self._delayed: frozenset[int] = frozenset()
        """Slots that decoded in the step before, if it held prompt tokens too."""

    def tick(self, slots: Sequence[int], rows: int, cost: float | None) -> None:
        """A step begins: book the time since the one before.

        Args:
            slots: of its requests.
            rows: sequences that decoded in both steps; cost: of the step before, over one at the
                best level, None if it is not known or was of other sequences.
        """
        delayed, self._delayed = self._delayed, frozenset()
        self._steps += 1
        turn = self._steps % _CLOCKED
        every = self.every or self.load.target is not None
        if self.elsewhere or not (every or turn <= 1):
            return
        now = time.perf_counter()
        self.seconds, self._began = now - self._began, now
        if not delayed.isdisjoint(slots):
            self.load.book_prompt(self.seconds)  # else the engine may have rested between
        if cost is not None and (every or turn == 1):
            self.load.book(rows, cost, self.seconds)

    def delays(self, slots: Sequence[int]) -> None:
        """The step that begins makes these wait for prompts beside them."""
        self._delayed = frozenset(slots)

    def book(self, rows: int, cost: float | None, seconds: float) -> None:
        """A step took so many seconds per token of a sequence, measured elsewhere."""
        self.seconds = seconds
        if cost is not None:
            self.load.book(rows, cost, seconds)
