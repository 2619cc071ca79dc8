# SPDX-License-Identifier: Apache-2.0
import numpy as np
import torch

from vllm_flexquant.planner.sequences import SequenceEntropy, SlotBook


def test_slots_are_given_kept_and_taken_back():
    book = SlotBook(3)
    assert book.admit(["a", "b"]) == ["a", "b"]
    slot = book["b"]
    assert book.admit(["b", "c"]) == ["c"]
    assert len({book[r] for r in "abc"}) == 3
    assert book.retain({"b", "c"}) == ["a"]
    assert "a" not in book
    assert book["b"] == slot
    assert book.admit(["d"]) == ["d"]
    assert len(book) == 3


def test_preempted_requests_give_way_when_slots_run_out():
    book = SlotBook(2)
    book.admit(["a", "b"])
    assert book.admit(["c"]) == ["c"]  # a and b wait, preempted
    assert list(book) == ["b", "c"]
    assert book.admit(["d", "a"]) == ["d", "a"]
    assert sorted(book) == ["a", "d"]
    assert {book["a"], book["d"]} == {0, 1}


def update(state, values, slots, decay=0.5, drafted=False):
    state.update(np.array(values, dtype=np.float32), np.array(slots), decay, drafted)


def test_average_starts_with_the_first_entropy_and_decays():
    state = SequenceEntropy(4, torch.device("cpu"))
    update(state, [2.0], [1])
    assert state.average[1] == 2.0
    assert state.seen.tolist() == [False, True, False, False, False]
    update(state, [1.0, 3.0], [1, 2])
    assert state.average[1] == 1.5
    assert state.average[2] == 3.0


def test_a_new_sequence_in_an_old_slot_starts_anew():
    state = SequenceEntropy(2, torch.device("cpu"))
    update(state, [2.0], [0])
    state.forget([0])
    assert not state.seen[0]
    update(state, [0.5], [0])
    assert state.average[0] == 0.5


def test_discarded_rows_touch_no_sequence():
    state = SequenceEntropy(2, torch.device("cpu"))
    update(state, [7.0, 1.0], [state.discard, 0])
    assert state.average[:2].tolist() == [1.0, 0.0]


def test_drafted_rows_count_their_largest():
    state = SequenceEntropy(2, torch.device("cpu"))
    update(state, [4.0, 1.0, 2.0], [0, 0, 1], drafted=True)
    assert state.average[:2].tolist() == [4.0, 2.0]


def test_nan_is_seen_and_then_recovered_from():
    state = SequenceEntropy(1, torch.device("cpu"))
    update(state, [1.0], [0])
    update(state, [float("nan")], [0])
    assert torch.isnan(state.average[0])
    update(state, [1.0], [0])
    assert state.average[0] == 1.0
