# SPDX-License-Identifier: Apache-2.0
"""Host side of ``decide.cpp``: the moments of a step under policy ``budget``, one call each.

The functions run for microseconds, so they are called through ctypes with the interpreter's lock
held, at addresses that are noted once.
"""

from __future__ import annotations

import ctypes

import torch

from ..state import Facts, State, struct_offsets
from . import native

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Entropies(ctypes.Structure):
    """fp32 nats by place in the batch; keeps the tensor that it points into."""

    _fields_ = [("_address", ctypes.c_void_p), ("_count", ctypes.c_int64)]

    def __init__(self, entropy: torch.Tensor) -> None:
        super().__init__(_address("entropy", entropy, torch.float32), entropy.numel())
        self._entropy = entropy
        self.address = ctypes.addressof(self)


class NativeSteps:
    """Decides in place on a state. Sequences whose slot, row, account or place in the batch is not
    there count for none."""

    def __init__(self, state: State) -> None:
        """The state stays where it is.

        Raises:
            ValueError: it is on another device than a CPU, or has no level.
            RuntimeError: the native kernels are not loaded, or know another layout.
        """
        library = _library()
        if state.buffer.device.type != "cpu" or state.sizes["levels"] < 1:
            raise ValueError(
                f"the state is on {state.buffer.device} and has {state.sizes['levels']} levels: "
                "give one on cpu with one or more"
            )
        self._state, self._at, self._hidden = state, state.address, state.sizes["hidden"]
        self._begin, self._probe = library.flexquant_begin, library.flexquant_probe
        self._decide, self._write = library.flexquant_decide, library.flexquant_write
        self._book = library.flexquant_book

    def begin(self, facts: Facts, before: Facts) -> None:
        """The level that the step of ``facts`` begins at, after the step of ``before``; writes the
        widths of all layers."""
        self._begin(self._at, facts.address, before.address)

    def probe(self, facts: Facts, x: torch.Tensor) -> None:
        """Score the rows of x, [rows, hidden] of any float dtype, and decide later layers.

        Raises:
            ValueError: x has another shape than the probe takes.
        """
        if x.dtype not in _DTYPES:
            x = x.float()
        rows, hidden = x.shape
        if hidden != self._hidden:
            raise ValueError(f"x is [{rows}, {hidden}]: the probe takes [rows, {self._hidden}]")
        stride, step = x.stride()
        if step != 1:
            x, stride = x.contiguous(), hidden
        self._probe(self._at, facts.address, x.data_ptr(), _DTYPES[x.dtype], rows, stride)

    def decide(self, facts: Facts, scores: torch.Tensor) -> None:
        """Decide later layers by scores of the rows, fp32.

        Raises:
            ValueError: another dtype or device, or not contiguous.
        """
        at = _address("scores", scores, torch.float32)
        self._decide(self._at, facts.address, at, scores.numel())

    def write(self, first_layer: int) -> None:
        """Write what was decided for later layers to layers from ``first_layer`` on."""
        self._write(self._at, first_layer)

    def entropy_at(self, entropy: torch.Tensor) -> Entropies:
        """What ``book`` takes, of fp32 nats by place in the batch.

        Raises:
            ValueError: another dtype or device, or not contiguous.
        """
        return Entropies(entropy)

    def book(self, facts: Facts, entropy: Entropies) -> None:
        """Take in the entropies of the batch's logits."""
        self._book(self._at, facts.address, entropy.address)


class LogitsReader:
    """Entropies of logits, and their averages by slot, in one call.

    nats: fp32 [rows].
    """

    def __init__(self, state: State, rows: int) -> None:
        """Of up to ``rows`` rows. The state stays where it is.

        Raises:
            ValueError: it is on another device than a CPU.
            RuntimeError: the native kernels are not loaded, or know another layout.
        """
        self._read = _library().flexquant_read_logits
        if state.buffer.device.type != "cpu":
            raise ValueError(f"the state is on {state.buffer.device}: give one on cpu")
        self.nats = torch.zeros(rows, dtype=torch.float32)
        self._state, self._at, self._nats_at = state, state.address, self.nats.data_ptr()

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
            self._at, logits.data_ptr(), code, rows, vocabulary, decay, slots, self._nats_at
        )
        return done


def _library() -> ctypes.PyDLL:
    library = native.short_calls()
    if library.flexquant_state_bytes() != struct_offsets()[1]:
        raise RuntimeError("state.py and cpu/state.h do not agree: write state.h anew")
    return library


def _address(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> int:
    if tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}: "
            f"give {dtype} on cpu, contiguous"
        )
    return tensor.data_ptr()
