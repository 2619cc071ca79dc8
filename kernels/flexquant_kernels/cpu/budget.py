# SPDX-License-Identifier: Apache-2.0
"""Host side of ``budget.cpp``: the steps of policy ``budget`` in one call each.

The functions run for microseconds, so they are called through ctypes, with the interpreter's lock
held, and read tensors at addresses that are noted once.
"""

import ctypes
from typing import Any

import torch

from . import native

CLASSES = 64
AGGREGATES = ("mean", "quantile", "max")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_FIELDS: dict[str, torch.dtype | str] = {
    "levels": "count",
    "kl": torch.float64,
    "cost": torch.float64,
    "early_kl": torch.float64,
    "late_kl": torch.float64,
    "late_cost": torch.float64,
    "width_kl": torch.float64,
    "entropy_bins": "count",
    "average_bins": "count",
    "by_entropy": torch.float64,
    "by_average": torch.float64,
    "bin_nats": "number",
    "horizon": "number",
    "least_move": "number",
    "quantile": "number",
    "dwell": "count",
    "aggregate": "count",
    "by_average_before": "count",
    "weight": torch.float32,
    "hidden": "count",
    "probe_layer": "count",
    "bias": "number",
    "average": torch.float32,
    "seen": torch.bool,
    "ledger": torch.float64,
    "decisions": torch.int32,
    "row_class": torch.int64,
    "scores": torch.float64,
    "price": torch.float64,
    "bounds": torch.int64,
    "ceiling": torch.int32,
    "layers": "count",
    "rungs": torch.int32,
    "allowed": torch.int32,
    "written": torch.int32,
}
"""Of ``BudgetState`` in ``budget.h``, in its order; a dtype is that of the tensor pointed to."""

_MAY_LACK = ("weight", "allowed")
_C_TYPES: dict[object, Any] = {"count": ctypes.c_int64, "number": ctypes.c_double}


class State(ctypes.Structure):
    """``BudgetState`` of ``budget.h``."""

    _fields_ = [(name, _C_TYPES.get(kind, ctypes.c_void_p)) for name, kind in _FIELDS.items()]


class Sequences(ctypes.Structure):
    """The sequences of a step; keeps the tensor that it points into."""

    _fields_ = [("_address", ctypes.c_void_p), ("_count", ctypes.c_int64)]

    def __init__(self, facts: torch.Tensor) -> None:
        """``facts``: int64 [4, n], slots, rows of the forward pass, classes, places in the batch.

        Raises:
            ValueError: another dtype, shape or device, or not contiguous.
        """
        if facts.dim() != 2 or len(facts) != 4:
            raise ValueError(f"facts are {tuple(facts.shape)}: give [4, n]")
        super().__init__(_address("facts", facts, torch.int64), facts.shape[1])
        self._facts = facts


class NativeBudget:
    """Decides in place on tensors that stay where they are."""

    def __init__(self, **values: torch.Tensor | float | None) -> None:
        """Give every field of ``BudgetState``; ``weight`` and ``allowed`` may be None.

        Raises:
            ValueError: a tensor has another dtype or device, or is not contiguous.
            RuntimeError: the native kernels are not loaded.
        """
        self._library = native.short_calls()
        if self._library.flexquant_budget_state_bytes() != ctypes.sizeof(State):
            raise RuntimeError("budget.py and budget.h do not agree on BudgetState")
        if values.keys() != _FIELDS.keys():
            raise ValueError(f"give exactly these: {', '.join(_FIELDS)}")
        self._tensors = {n: v for n, v in values.items() if isinstance(v, torch.Tensor)}
        self._state = State()
        for name, value in values.items():
            kind = _FIELDS[name]
            if isinstance(kind, torch.dtype) and not (value is None and name in _MAY_LACK):
                setattr(self._state, name, _address(name, value, kind))
            else:
                setattr(self._state, name, value)
        self._check_sizes()
        self._pointer = ctypes.byref(self._state)

    def _check_sizes(self) -> None:
        s, tensors = self._state, self._tensors
        per_level = dict.fromkeys(("kl", "cost", "early_kl", "late_kl", "late_cost"), s.levels)
        expected = per_level | {
            "width_kl": 9,
            "by_entropy": s.entropy_bins,
            "by_average": s.average_bins,
            "weight": s.hidden,
            "ledger": 7 * CLASSES,
            "decisions": 6,
            "bounds": 2,
            "rungs": s.levels * s.layers,
            "allowed": s.layers * 9,
            "written": s.layers,
        }
        for name, count in expected.items():
            if name in tensors and tensors[name].numel() != count:
                raise ValueError(f"{name} has {tensors[name].numel()} elements, not {count}")

    def set_policy(self, **values: float) -> None:
        """Other values of ``horizon``, ``least_move``, ``quantile``, ``dwell``, ``aggregate``,
        ``by_average_before``."""
        for name, value in values.items():
            setattr(self._state, name, value)

    def begin(self, now: Sequences, before: Sequences) -> None:
        """The level that the step of ``now`` begins at, after the step of ``before``."""
        self._library.flexquant_budget_begin(self._pointer, ctypes.byref(now), ctypes.byref(before))

    def probe(self, now: Sequences, x: torch.Tensor) -> None:
        """Score the rows of x, [rows, hidden] of any float dtype, and decide later layers."""
        if x.dtype not in _DTYPES:
            x = x.float()
        if x.stride(1) != 1:
            x = x.contiguous()
        self._library.flexquant_budget_probe(
            self._pointer, ctypes.byref(now), x.data_ptr(), _DTYPES[x.dtype], x.stride(0)
        )

    def decide(self, now: Sequences, scores: torch.Tensor) -> None:
        """Decide later layers by scores of the rows, fp32."""
        self._library.flexquant_budget_decide(
            self._pointer, ctypes.byref(now), _address("scores", scores, torch.float32)
        )

    def entropy_at(self, entropy: torch.Tensor) -> int:
        """The address that ``book`` takes, of fp32 nats by place in the batch.

        Raises:
            ValueError: another dtype or device, or not contiguous.
        """
        return _address("entropy", entropy, torch.float32)

    def book(self, now: Sequences, entropy: int) -> None:
        """Take in the entropies of the batch's logits."""
        self._library.flexquant_budget_book(self._pointer, ctypes.byref(now), entropy)


class LogitsReader:
    """Entropies of logits, and their averages by slot, in one call."""

    def __init__(
        self, rows: int, average: torch.Tensor, seen: torch.Tensor, unknown: torch.Tensor
    ) -> None:
        """Of up to ``rows`` rows, into fp32 and bool [slots], which stay where they are.

        ``unknown``, int64 [1], counts rows whose entropy is no number.

        Raises:
            ValueError: a tensor has another dtype or device, or is not contiguous.
            RuntimeError: the native kernels are not loaded.
        """
        self._read = native.short_calls().flexquant_read_logits
        self.nats = torch.zeros(rows, dtype=torch.float32)
        self._kept = average, seen, unknown
        self._addresses = (
            self.nats.data_ptr(),
            _address("average", average, torch.float32),
            _address("seen", seen, torch.bool),
            _address("unknown", unknown, torch.int64),
        )

    def __call__(self, logits: torch.Tensor, slots: int, decay: float) -> bool:
        """Read logits [rows, vocabulary] into the first elements of ``nats``.

        Args:
            slots: address of int64 [rows].
            decay: weight of the past.

        Returns:
            False where it does not: too many rows, another dtype, not contiguous, no memory.
        """
        code = _DTYPES.get(logits.dtype)
        rows, vocabulary = logits.shape
        if code is None or rows > len(self.nats) or not logits.is_contiguous():
            return False
        done: bool = self._read(
            logits.data_ptr(), code, rows, vocabulary, decay, slots, *self._addresses
        )
        return done


def _address(name: str, tensor: object, dtype: torch.dtype) -> int:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} is {tensor!r}: give a tensor")
    if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}: "
            f"give {dtype} on cpu, contiguous"
        )
    return tensor.data_ptr()
