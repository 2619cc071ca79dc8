# SPDX-License-Identifier: Apache-2.0
"""The layout of the state: the header in C++, the places of fields, and the views of them."""

import ctypes
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexquant_kernels.state as layout
from flexquant_kernels.state import FIELDS, SIZES, Facts, State, places

CPU = torch.device("cpu")
SOME = {"levels": 5, "layers": 3, "slots": 4, "rows": 6, "entropy_bins": 3, "average_bins": 2}
SOME |= {"hidden": 7}


def make_state():
    return State(CPU, torch.zeros(SOME["layers"], dtype=torch.int32), **SOME)


def test_the_header_is_the_one_that_the_layout_makes():
    found = Path(layout.__file__).with_name("cpu") / "state.h"
    assert found.read_text() == layout.header_text()


@given(st.fixed_dictionaries(dict.fromkeys(SIZES, st.integers(0, 9))))
def test_places_are_aligned_and_apart(sizes):
    found, size = places(sizes)
    members, end = layout.struct_offsets()
    assert list(found) == [field.name for field in FIELDS]
    taken = [(at, at + 8) for name, at in members.items() if name not in found]
    for field in FIELDS:
        offset, shape, dtype = found[field.name]
        alignment = 8 if field.name in members else 64
        assert offset % alignment == 0
        assert (offset < end) == (field.name in members)
        taken.append((offset, offset + math.prod(shape) * dtype.itemsize))
    taken = sorted(span for span in taken if span[0] < span[1])
    assert all(before[1] <= after[0] for before, after in pairwise(taken))
    assert taken[-1][1] <= size


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_a_view_is_its_part_of_the_buffer_and_no_other(field):
    state = make_state()
    header = state.buffer.clone()
    array, tensor = getattr(state, field.name), state.tensor(field.name)
    sizes = [size if isinstance(size, int) else state.sizes[size] for size in field.shape]
    assert list(array.shape) == list(tensor.shape) == sizes
    assert tensor.dtype == field.dtype
    array[...] = 1
    assert tensor.eq(1).all()
    offset = tensor.data_ptr() - state.address
    assert offset == places(state.sizes)[0][field.name].offset
    changed = (state.buffer != header).nonzero().flatten()
    assert offset <= changed.min() <= changed.max() < offset + tensor.nbytes


def test_the_state_says_its_sizes_and_where_things_are():
    state = make_state()
    members, end = layout.struct_offsets()
    words = state.buffer[: end // 8 * 8].view(torch.int64)
    assert {name: words[members[name] // 8] for name in SIZES} == state.sizes
    assert words[members["table"] // 8] == state.tensor("table").data_ptr()
    for name, place in places(state.sizes)[0].items():
        if f"{name}_at" in members:
            assert words[members[f"{name}_at"] // 8] == place.offset
    state.table[:] = 6
    assert state.tensor("table").tolist() == [6] * state.sizes["layers"]


@pytest.mark.parametrize("table", [torch.zeros(4, dtype=torch.int32), torch.zeros(3)], ids=str)
def test_a_table_of_another_kind_is_refused(table):
    with pytest.raises(ValueError, match=r"give int32 \[3\] on cpu"):
        State(CPU, table, **SOME)


def test_facts_say_where_they_are():
    values = torch.arange(12).reshape(4, 3)
    facts = Facts(values)
    words = (ctypes.c_int64 * 2).from_address(facts.address)
    assert list(words) == [values.data_ptr(), 3]


def test_facts_of_another_kind_are_refused():
    for wrong in (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(4, 2), torch.zeros(4)):
        with pytest.raises(ValueError, match=r"facts are .*: give int64 \[4, n\] on cpu"):
            Facts(wrong)
    with pytest.raises(ValueError, match="contiguous"):
        Facts(torch.zeros(2, 4, dtype=torch.int64).T)
