# SPDX-License-Identifier: Apache-2.0
"""The one buffer that a decision reads and writes, and its layout for every language.

``FIELDS`` is the only place where the layout stands. NumPy and torch see views of the buffer
(``State``), C++ the header that ``python -m flexquant_kernels.state`` writes (``cpu/state.h``,
which a test compares and whose offsets the compiler asserts). A field with a size in its shape lies
behind the struct, at the offset that the struct has under ``<name>_at``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

ACCOUNTS = 128
"""Lines of the ledger: the operator's classes, then the grid of budgets that requests may ask
for."""

SIZES = ("levels", "layers", "slots", "rows", "entropy_bins", "average_bins", "hidden")
"""What shapes depend on. slots: of sequences, and one more for rows that count for none. rows: of a
forward pass at most. hidden: inputs of the probe, 0 where there is none."""

WIDTHS = 9
"""0 to 8 bits."""

AGGREGATES = ("mean", "quantile", "max")

_F8, _F4, _I8, _I4, _B1 = torch.float64, torch.float32, torch.int64, torch.int32, torch.bool
_C_NAMES = {_F8: "double", _F4: "float", _I8: "int64_t", _I4: "int32_t", _B1: "bool"}
_ALIGNMENT = 64


class Field(NamedTuple):
    """One array of the state. A name of ``SIZES`` in ``shape`` stands for that size."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    text: str


FIELDS = (
    # what the operator set; data, so that a captured graph goes by new values
    Field("horizon", _F8, (1,), "tokens whose budget fills a bucket"),
    Field("least_move", _F8, (1,), "levels that a change must exceed, a fp32 value"),
    Field("quantile", _F8, (1,), "which one, under that aggregate"),
    Field("entropy_low", _F8, (1,), "nats, policy entropy: the cheapest level up to here"),
    Field("entropy_high", _F8, (1,), "nats, policy entropy: the best level from here"),
    Field("falling", _F8, (1,), "tokens, policy progressive: over which the level falls"),
    Field("full", _I8, (1,), "tokens, policy progressive: at the best level"),
    Field("lowest", _I8, (1,), "level, policy progressive: where it ends"),
    Field("pinned", _I8, (1,), "level of policies static and manual"),
    Field("dwell", _I8, (1,), "steps between two changes at least"),
    Field("aggregate", _I8, (1,), "index into AGGREGATES"),
    Field("by_average", _I8, (1,), "1: averages of entropy say what a token needs before the step"),
    # facts of the step
    Field("bounds", _I8, (2,), "lowest and highest width in bits"),
    Field("ceiling", _I8, (1,), "best level that may be decided"),
    Field("probes", _I8, (1,), "1: the probe decides the layers after it"),
    Field("probe_layer", _I8, (1,), "index of the first layer that the probe decides"),
    # what was decided
    Field("price", _F8, (1,), "of a nat, in the cost of the best level; -1 without any row"),
    Field("decisions", _I4, (3, 2), "level and held of: first layers, later layers, last probe"),
    # the ledger, by account
    Field("asked", _F8, (ACCOUNTS,), "nats per token, 0 where none is asked"),
    Field("base_price", _F8, (ACCOUNTS,), "at which the average text costs what is asked"),
    Field("balance", _F8, (ACCOUNTS,), "nats left over, owed if below 0"),
    Field("spent", _F8, (ACCOUNTS,), "nats booked since the start"),
    Field("tokens", _F8, (ACCOUNTS,), "tokens booked since the start"),
    Field("needed", _F8, (ACCOUNTS,), "fading sum of what was needed, seen after the step"),
    Field("foreseen", _F8, (ACCOUNTS,), "fading sum of what was needed, seen before it"),
    # the sequences, by slot
    Field("average", _F4, ("slots",), "nats, moving average of the entropies"),
    Field("seen", _B1, ("slots",), "whether there is one"),
    Field("unknown", _I8, (1,), "rows so far whose logits were no distribution"),
    # the rows of the forward pass
    Field("row_account", _I8, ("rows",), "account, -1 for rows that count for none"),
    Field("scores", _F8, ("rows",), "what the row needs, over the average token"),
    # what calibration found
    Field("kl", _F8, ("levels",), "nats per token, cheapest level first"),
    Field("cost", _F8, ("levels",), "over that of the best level"),
    Field("early_kl", _F8, ("levels",), "the part of layers before the probe"),
    Field("late_kl", _F8, ("levels",), "the rest"),
    Field("early_cost", _F8, ("levels",), "the part of layers before the probe"),
    Field("late_cost", _F8, ("levels",), "the rest"),
    Field("width_kl", _F8, (WIDTHS,), "nats per token with all layers at so many bits"),
    Field("bin_nats", _F8, (1,), "width of a bin of entropy"),
    Field("need_by_entropy", _F8, ("entropy_bins",), "need of tokens whose own entropy is there"),
    Field("need_by_average", _F8, ("average_bins",), "need of tokens whose average is there"),
    Field("weight", _F4, ("hidden",), "of the probe: score = exp(x . weight + bias)"),
    Field("bias", _F8, (1,), "of the probe"),
    # the ladder
    Field("rungs", _I4, ("levels", "layers"), "width of each layer at each level, bits"),
    Field("allowed", _I4, ("layers", WIDTHS), "width a layer runs at when so many bits are wanted"),
)

_HEADER = (*SIZES, "table")
"""int64 each, before the fields. table: address of the precision table, int32 [layers]."""


class Place(NamedTuple):
    """Where a field is: bytes from the start, shape, dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def _is_fixed(field: Field) -> bool:
    return all(isinstance(size, int) for size in field.shape)


def struct_offsets() -> tuple[dict[str, int], int]:
    """Offsets of the struct's members in bytes, ``<name>_at`` among them, and its size."""
    offsets: dict[str, int] = {}
    at = 0
    for name in _HEADER:
        offsets[name], at = at, at + 8
    for field in FIELDS:
        if not _is_fixed(field):
            offsets[f"{field.name}_at"], at = at, at + 8
    for field in FIELDS:
        if _is_fixed(field):
            offsets[field.name] = at
            at += _ceil(_count(field.shape, {}) * field.dtype.itemsize, 8)
    return offsets, at


def places(sizes: Mapping[str, int]) -> tuple[dict[str, Place], int]:
    """Where each field of a state of these sizes is, and the bytes of all."""
    members, end = struct_offsets()
    found = {}
    for field in FIELDS:
        shape = tuple(size if isinstance(size, int) else sizes[size] for size in field.shape)
        if _is_fixed(field):
            found[field.name] = Place(members[field.name], shape, field.dtype)
            continue
        at = _ceil(end, _ALIGNMENT)
        found[field.name] = Place(at, shape, field.dtype)
        end = at + _count(field.shape, sizes) * field.dtype.itemsize
    return found, _ceil(end, _ALIGNMENT)


def _count(shape: tuple[int | str, ...], sizes: Mapping[str, int]) -> int:
    count = 1
    for size in shape:
        count *= size if isinstance(size, int) else sizes[size]
    return count


def _ceil(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def view(tensor: torch.Tensor) -> Any:
    """A tensor as policies see it, the same memory: NumPy's on a CPU."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


class State:
    """Zeros of the given sizes on a device, at an address that stays.

    Each field is an attribute: a NumPy view of the buffer on a CPU, a tensor elsewhere. ``table``
    is the precision table, int32 [layers], likewise.
    """

    def __init__(self, device: torch.device, table: torch.Tensor, **sizes: int) -> None:
        """Give every name of ``SIZES``.

        Raises:
            ValueError: the table has another length, dtype or device than the state.
        """
        if (table.dtype, tuple(table.shape)) != (_I4, (sizes["layers"],)) or table.device != device:
            raise ValueError(
                f"the table is {table.dtype} {tuple(table.shape)} on {table.device}: "
                f"give int32 [{sizes['layers']}] on {device}"
            )
        self.sizes = dict(sizes)
        self._places, size = places(sizes)
        members, _ = struct_offsets()
        self.buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        header = torch.zeros(_ceil(struct_offsets()[1], 8) // 8, dtype=_I8)
        for name in SIZES:
            header[members[name] // 8] = sizes[name]
        header[members["table"] // 8] = table.data_ptr()
        for name, place in self._places.items():
            if f"{name}_at" in members:
                header[members[f"{name}_at"] // 8] = place.offset
        self.buffer[: header.nbytes].copy_(header.view(torch.uint8))
        self.table_tensor = table
        for name in (*self._places, "table"):
            setattr(self, name, view(self.tensor(name)))

    def __getattr__(self, name: str) -> Any:  # for type checkers: fields are set above
        raise AttributeError(name)

    def tensor(self, name: str) -> torch.Tensor:
        """A field as a tensor, the same memory."""
        if name == "table":
            return self.table_tensor
        offset, shape, dtype = self._places[name]
        count = _count(shape, {})
        return self.buffer[offset : offset + count * dtype.itemsize].view(dtype).view(shape)

    @property
    def address(self) -> int:
        """What native functions are given."""
        return self.buffer.data_ptr()


def header_text() -> str:
    """``cpu/state.h``."""
    offsets, size = struct_offsets()
    lines = [
        "// SPDX-License-Identifier: Apache-2.0",
        "// Written by `python -m flexquant_kernels.state`; the layout stands in state.py.",
        "#pragma once",
        "",
        "#include <cstddef>",
        "#include <cstdint>",
        "",
        "namespace flexquant {",
        "",
        f"constexpr int64_t kAccounts = {ACCOUNTS};",
        f"enum class Aggregate : int64_t {{ {', '.join('k' + a.title() for a in AGGREGATES)} }};",
        "",
        "struct State {",
    ]
    lines += [f"  int64_t {name};" for name in _HEADER]
    behind = [field for field in FIELDS if not _is_fixed(field)]
    fixed = [field for field in FIELDS if _is_fixed(field)]
    lines += [f"  int64_t {field.name}_at;" for field in behind]
    for field in fixed:
        count = _count(field.shape, {})
        pad = (-count * field.dtype.itemsize) % 8 // field.dtype.itemsize
        assert pad == 0, f"{field.name} does not fill eight bytes"
        lines.append(f"  {_C_NAMES[field.dtype]} {field.name}[{count}];  // {field.text}")
    lines.append("")
    for field in behind:
        c_name = _C_NAMES[field.dtype]
        dims = "".join(f"[{size}]" for size in field.shape)
        lines += [
            f"  // {dims} {field.text}",
            f"  {c_name}* {field.name}() {{ return at<{c_name}>({field.name}_at); }}",
            f"  const {c_name}* {field.name}() const {{ return at<{c_name}>({field.name}_at); }}",
        ]
    lines += [
        "  int32_t* widths() const { return reinterpret_cast<int32_t*>(table); }",
        "",
        " private:",
        "  template <typename T>",
        "  T* at(int64_t offset) const {",
        "    auto* start = reinterpret_cast<char*>(const_cast<State*>(this));",
        "    return reinterpret_cast<T*>(start + offset);",
        "  }",
        "};",
        "",
        f"static_assert(sizeof(State) == {size});",
    ]
    lines += [f"static_assert(offsetof(State, {n}) == {at});" for n, at in offsets.items()]
    return "\n".join([*lines, "", "}  // namespace flexquant", ""])


class Facts(ctypes.Structure):
    """The sequences of a step, int64 [4, count]: slots, rows of the forward pass, accounts, places
    in the batch; keeps the tensor that it points into. address: what native functions are given."""

    _fields_ = [("_address", ctypes.c_void_p), ("_count", ctypes.c_int64)]

    def __init__(self, facts: torch.Tensor) -> None:
        """Raises ValueError: another dtype, shape or device, or not contiguous."""
        shape = tuple(facts.shape)
        good = facts.dim() == 2 and shape[0] == 4 and facts.dtype == _I8 and facts.is_contiguous()
        if not good or facts.device.type != "cpu":
            raise ValueError(
                f"facts are {facts.dtype} {shape} on {facts.device}: give int64 [4, n] on cpu, "
                "contiguous"
            )
        super().__init__(facts.data_ptr(), shape[1])
        self._facts = facts
        self.address = ctypes.addressof(self)


if __name__ == "__main__":
    (Path(__file__).parent / "cpu" / "state.h").write_text(header_text())
