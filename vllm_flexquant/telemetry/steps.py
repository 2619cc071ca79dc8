# SPDX-License-Identifier: Apache-2.0
"""One record per step: what it was decided by, what was decided, what ran.

From it are made the view's list of steps and the trace, a file of bounded size that `replay.py`
takes each decision again from, by the same functions. The file is NumPy's `.npz`, without pickle:
`header` (JSON), and arrays of all steps one after another.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flexquant_kernels.state import ACCOUNTS
from vllm_flexquant.format.layout import PARENT_BITS
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner.planner import Planner
from vllm_flexquant.planner.state import CARRIED, carried
from vllm_flexquant.planner.watcher import Watcher
from vllm_flexquant.policy.arrays import Array, host
from vllm_flexquant.policy.protocol import FIRST, LATER
from vllm_flexquant.values import shown

FORMAT = 2
SNAPSHOT_STEPS = 256
"""Steps between two records of the state, one of which a trace begins with."""

_BROKEN = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError),
    *(OSError, EOFError, zipfile.BadZipFile, zlib.error),
)
"""What reading a file of another kind, or a damaged one, raises."""

_NONE = np.zeros(0, np.float32)
_ROWS = {
    "average": np.float32,
    "known": np.bool_,
    "accounts": np.int64,
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

    average (fp32 nats), known (bool), accounts, position (int64): [n], as `StepFacts` and `State`
    have them. scores: fp32 [n], the probe's, where it was asked (probed). entropy: fp32 [n] nats,
    of the step's own logits, where they went into the accounts (booked). low, high: bounds in bits.
    ceiling: of the level. seconds: since the step before began. first, level: what was decided for
    the layers before and after the probe.

    Of all requests of the batch, and not in the file: number, request_ids, prompt, before and nats
    (average and entropy by place, NaN where there is none), widths that ran.
    """

    average: np.ndarray
    known: np.ndarray
    accounts: np.ndarray
    position: np.ndarray
    low: int
    high: int
    ceiling: int
    seconds: float
    first: int = 0
    level: int = 0
    scores: np.ndarray = field(default_factory=lambda: _NONE)
    entropy: np.ndarray = field(default_factory=lambda: _NONE)
    probed: bool = False
    booked: bool = False
    number: int = 0
    request_ids: tuple[str, ...] = ()
    prompt: tuple[bool, ...] = ()
    before: np.ndarray = field(default_factory=lambda: _NONE)
    nats: np.ndarray | None = None
    widths: np.ndarray = field(default_factory=lambda: _NONE)

    def view(self) -> dict[str, Any]:
        """As plain values, for users; entropies in nats, None where there are none."""
        return {
            "step": self.number,
            "request_ids": list(self.request_ids),
            "prompt": list(self.prompt),
            "first_level": self.first,
            "level": self.level,
            "bounds": [self.low, self.high],
            "widths": self.widths.tolist(),
            "average": _plain(self.before),
            "entropy": None if self.nats is None else _plain(self.nats),
            "scores": _plain(self.scores) if self.probed else None,
        }


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]


@dataclass
class Trace:
    """header: `options`, `mean_bits` and `cost` (of each level), `figures` (as
    `planner.figures.read_figures`, or None), `probe_layer` and `state` (before the first step)."""

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
        text = json.dumps({"format": FORMAT} | self.header).encode()
        content = io.BytesIO()
        arrays["header"] = np.frombuffer(text, np.uint8)
        np.savez_compressed(content, allow_pickle=False, **arrays)
        return content.getvalue()

    @classmethod
    def load(cls, content: bytes, name: str = "the trace") -> Trace:
        """From a file's content.

        Raises:
            ValueError: it is none, or of another format.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            header = json.loads(arrays.pop("header").tobytes())
            rows, form = arrays.pop("rows"), header.pop("format")
            if form == FORMAT:
                _check(header, rows, arrays)
        except _BROKEN as error:
            raise ValueError(
                f"{name} is no trace of flexquant ({error!r}); make one with `flexquant trace`"
            ) from None
        if form != FORMAT:
            raise ValueError(
                f"{name} has format {shown(form)} and this version reads {FORMAT}; "
                "make it again, or update vllm-flexquant"
            )
        ends = np.cumsum(rows)[:-1]
        of_rows = {key: np.split(arrays[key], ends) for key in _ROWS}
        steps = []
        for i in range(len(arrays["level"])):
            values: dict[str, Any] = {key: of_rows[key][i] for key in _ROWS}
            values |= {key: arrays[key][i].item() for key in _SCALARS}
            steps.append(Step(**values))
        return cls(header, steps)


def _check(header: Mapping[str, Any], rows: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
    """That the parts of a trace fit each other.

    Raises:
        ValueError, KeyError, TypeError: they do not.
    """
    if rows.ndim != 1 or rows.dtype.kind != "i" or (rows < 0).any():
        raise ValueError("rows are no counts")
    levels, count = len(header["mean_bits"]), int(rows.sum())
    limits = {
        "accounts": ACCOUNTS,
        "low": PARENT_BITS + 1,
        "high": PARENT_BITS + 1,
        "ceiling": levels,
        "first": levels,
        "level": levels,
    }
    for key, kind in (_ROWS | _SCALARS).items():
        found, wanted = arrays[key], count if key in _ROWS else len(rows)
        if found.shape != (wanted,) or found.dtype != kind:
            raise ValueError(
                f"{key} is {found.dtype} {found.shape}, not {kind.__name__} [{wanted}]"
            )
        if key in limits and not ((found >= 0) & (found < limits[key])).all():
            raise ValueError(f"{key} is out of range")
    for part, kept in (("options", dict), ("cost", list), ("figures", (dict, type(None)))):
        if not isinstance(header[part], kept):
            raise ValueError(f"{part} is {shown(header[part])}")
    if len(header["cost"]) != levels or not isinstance(header["probe_layer"], int | None):
        raise ValueError("the header does not fit")
    if rows.size and header["state"].keys() != set(CARRIED):
        raise ValueError("the state before the first step is missing")


class Recorder(Watcher):
    """Keeps the last steps of a planner, and from time to time the state, so that a replay can
    begin there. Syncs a GPU."""

    def __init__(self, planner: Planner, capacity: int) -> None:
        """`capacity`: steps, above 0."""
        self._planner = planner
        self._steps: deque[tuple[Step, Mapping[str, Any] | None]] = deque(maxlen=capacity)
        self._apart = max(min(SNAPSHOT_STEPS, capacity // 4), 1)
        self._until_snapshot = 0
        self._traced_from = self._shown_from = 0
        self._open: Step | None = None
        self._state = carried(planner.state)
        planner.watchers.add(self)
        planner.clock.every = True

    def changed(self, options: FlexQuantOptions) -> None:
        """What was recorded no longer leads to what will be: a trace begins anew."""
        if self._open is not None:
            self._steps.pop()  # what it ran at is not known any more
        self._traced_from = self._planner.steps
        self._until_snapshot, self._open = 0, None

    def deciding(self) -> None:
        if self._open is not None:
            self._finish(self._open)
        if self._until_snapshot == 0:
            self._state = carried(self._planner.state)

    def began(self) -> None:
        planner, state = self._planner, self._planner.state
        batch, facts = planner.batch, planner.facts
        assert batch is not None
        average, seen = host(state.average), host(state.seen)
        slots, _, accounts, _ = host(facts.sequences)
        low, high = host(state.bounds).tolist()
        places = [batch.positions[i] for i in facts.decoding]
        before = average[list(batch.slots)]
        before[~seen[list(batch.slots)]] = np.nan
        step = Step(
            average=average[slots],
            known=seen[slots],
            accounts=accounts,
            position=np.array(places, dtype=np.int64),
            low=low,
            high=high,
            ceiling=int(state.ceiling[0]),
            seconds=planner.clock.seconds,
            number=planner.steps - 1,
            request_ids=tuple(batch.request_ids),
            prompt=tuple(batch.prompt),
            before=before,
        )
        carries = self._until_snapshot == 0
        self._steps.append((step, self._state if carries else None))
        self._until_snapshot = (self._until_snapshot or self._apart) - 1
        self._open = step

    def ended(self, entropy: Array, booked: bool) -> None:
        step = self._open
        if step is None:
            return  # options were changed within the step
        step.nats, step.booked = host(entropy), booked
        if booked:
            step.entropy = step.nats[host(self._planner.facts.sequences[3])]
        self._finish(step)

    def _finish(self, step: Step) -> None:
        """Add what is known once the layers have run."""
        planner, state = self._planner, self._planner.state
        levels = host(state.decisions)[:, 0]
        step.first, step.level = int(levels[FIRST]), int(levels[LATER])
        step.widths = host(state.table).astype(np.int8)
        step.probed = planner.asks_probe
        if step.probed:
            rows = planner.facts.sequences[1]
            step.scores = host(state.scores[rows]).astype(np.float32)
        self._open = None

    def _complete(self, first: int) -> list[tuple[Step, Mapping[str, Any] | None]]:
        """From a number on, without the step that is under way."""
        done = (kept for kept in self._steps if kept[0] is not self._open)
        return [kept for kept in done if kept[0].number >= first]

    def views(self, clear: bool = False) -> list[dict[str, Any]]:
        """The steps that are kept, oldest first, as `Step.view`.

        Args:
            clear: do not show them again.
        """
        found = [step.view() for step, _ in self._complete(self._shown_from)]
        if clear:
            self._shown_from = self._planner.steps
        return found

    def trace(self) -> Trace:
        """From the oldest step whose state before it is known."""
        planner = self._planner
        listening = planner.model.listening
        header = {
            "options": planner.options.plain(),
            "mean_bits": list(planner.model.ladder.mean_bits),
            "cost": list(planner.model.ladder.cost),
            "figures": planner.model.figures,
            "probe_layer": None if listening is None else listening.layer,
        }
        steps = self._complete(self._traced_from)
        begin = next((i for i, (_, state) in enumerate(steps) if state is not None), len(steps))
        kept = steps[begin:]
        state = kept[0][1] if kept else None
        return Trace({**header, "state": state}, [step for step, _ in kept])
