# SPDX-License-Identifier: Apache-2.0
"""A trace: what each step was decided by and what was decided, in a file of bounded size.

The file is NumPy's `.npz`, without pickle: `header` (JSON), and arrays of all steps one after
another. It holds enough for `replay.py` to take each decision again, by the same functions.
"""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FORMAT = 1
SNAPSHOT_STEPS = 256
"""Steps between two records of the state, one of which a trace begins with."""

_ROWS = {
    "average": np.float32,
    "known": np.bool_,
    "classes": np.int64,
    "position": np.int64,
    "scores": np.float32,
    "entropy": np.float32,
}
_SCALARS = {
    "low": np.int16,
    "high": np.int16,
    "ceiling": np.int32,
    "probed": np.bool_,
    "booked": np.bool_,
    "seconds": np.float32,
    "first": np.int32,
    "level": np.int32,
}


@dataclass
class Step:
    """One step, of the n sequences that decode in it.

    average (fp32 nats), known (bool), classes, position (int64): [n], as `StepSignals` and
    `BudgetPolicy` have them. scores: fp32 [n], the probe's, where it was asked (probed). entropy:
    fp32 [n] nats, of the step's own logits, where they were seen (booked). low, high: bounds in
    bits. ceiling: of the level. seconds: since the step before began. first, level: what was
    decided for the layers before and after the probe.
    """

    average: np.ndarray
    known: np.ndarray
    classes: np.ndarray
    position: np.ndarray
    low: int
    high: int
    ceiling: int
    seconds: float
    first: int = 0
    level: int = 0
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    entropy: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    probed: bool = False
    booked: bool = False
    asks: tuple[dict[int, float], list[int]] | None = None


@dataclass
class Trace:
    """header: `options`, `mean_bits` (of each level), `figures` (of policy budget, or None) and
    `state` (before the first step)."""

    header: dict[str, Any]
    steps: list[Step]

    def dump(self) -> bytes:
        """As a file's content."""
        rows = np.array([len(step.average) for step in self.steps], dtype=np.int32)
        arrays: dict[str, np.ndarray] = {"rows": rows}
        for name, kind in _ROWS.items():
            parts = []
            for step, count in zip(self.steps, rows, strict=True):
                values = getattr(step, name)
                parts.append(values if len(values) == count else np.zeros(count, kind))
            arrays[name] = np.concatenate([np.zeros(0, kind), *parts]).astype(kind)
        for name, kind in _SCALARS.items():
            arrays[name] = np.array([getattr(step, name) for step in self.steps], dtype=kind)
        asks = {i: step.asks for i, step in enumerate(self.steps) if step.asks is not None}
        text = json.dumps({"format": FORMAT} | self.header | {"asks": asks}).encode()
        content = io.BytesIO()
        arrays["header"] = np.frombuffer(text, np.uint8)
        np.savez_compressed(content, allow_pickle=False, **arrays)
        return content.getvalue()

    @classmethod
    def load(cls, content: bytes, name: str = "the trace") -> Trace:
        """From a file's content.

        Raises:
            ValueError: it is none, or of a newer format.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            header = json.loads(arrays.pop("header").tobytes())
            ends = np.cumsum(arrays.pop("rows"))[:-1]
        except (ValueError, KeyError, OSError, EOFError) as error:
            raise ValueError(
                f"{name} is no trace of flexquant ({error}); make one with `flexquant trace`"
            ) from None
        if header.get("format") != FORMAT:
            raise ValueError(
                f"{name} has format {header.get('format')} and this version reads {FORMAT}; "
                "make it again, or update vllm-flexquant"
            )
        of_rows = {key: np.split(arrays[key], ends) for key in _ROWS}
        count = len(arrays["level"])
        steps = []
        for i in range(count):
            values: dict[str, Any] = {key: of_rows[key][i] for key in _ROWS}
            values |= {key: arrays[key][i].item() for key in _SCALARS}
            steps.append(Step(**values))
        for index, (budgets, new) in header.pop("asks", {}).items():
            steps[int(index)].asks = {int(n): b for n, b in budgets.items()}, new
        return cls(header, steps)


class Recorder:
    """Keeps the last steps, and from time to time the state, so that a replay can begin there."""

    def __init__(self, capacity: int) -> None:
        self._steps: deque[tuple[Step, Mapping[str, Any] | None]] = deque(maxlen=capacity)
        self._apart = max(min(SNAPSHOT_STEPS, capacity // 4), 1)
        self._until_snapshot = 0
        self._asks: tuple[dict[int, float], list[int]] | None = None

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def wants_state(self) -> bool:
        """Whether the next `add` should be given the state."""
        return self._until_snapshot == 0

    def add(self, step: Step, state: Mapping[str, Any] | None) -> None:
        """Begin a step, which may be completed later."""
        step.asks, self._asks = self._asks, None
        self._steps.append((step, state))
        self._until_snapshot = (self._until_snapshot or self._apart) - 1

    def ask(self, budgets: Mapping[int, float], new: Sequence[int]) -> None:
        """Budgets change before the next step."""
        self._asks = dict(budgets), list(new)

    @property
    def last(self) -> Step:
        return self._steps[-1][0]

    def clear(self) -> None:
        """Begin anew: what was recorded no longer leads to what will be."""
        self._steps.clear()
        self._until_snapshot, self._asks = 0, None

    def trace(self, header: Mapping[str, Any]) -> Trace:
        """From the oldest step whose state before it is known."""
        begin = next((i for i, (_, state) in enumerate(self._steps) if state is not None), None)
        if begin is None:
            return Trace({**header, "state": None}, [])
        kept = list(self._steps)[begin:]
        return Trace({**header, "state": kept[0][1]}, [step for step, _ in kept])
