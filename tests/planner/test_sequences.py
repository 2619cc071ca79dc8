# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from vllm_flexquant.planner.figures import without_calibration
from vllm_flexquant.planner.sequences import SequenceEntropy
from vllm_flexquant.planner.state import empty_state

pytestmark = pytest.mark.usefixtures("machinery")


def sequences(slots):
    table = torch.zeros(0, dtype=torch.int32)
    state = empty_state(table, without_calibration([1.0]), slots, rows=slots)
    return SequenceEntropy(state), state


def update(made, values, slots, decay=0.5, drafted=False):
    made.update(np.array(values, dtype=np.float32), np.array(slots), decay, drafted)


def test_average_starts_with_the_first_entropy_and_decays():
    made, state = sequences(4)
    update(made, [2.0], [1])
    assert state.average[1] == 2.0
    assert state.seen.tolist() == [False, True, False, False, False]
    update(made, [1.0, 3.0], [1, 2])
    assert state.average[1] == 1.5
    assert state.average[2] == 3.0


def test_a_new_sequence_in_an_old_slot_starts_anew():
    made, state = sequences(2)
    update(made, [2.0], [0])
    made.forget([0])
    assert not state.seen[0]
    update(made, [0.5], [0])
    assert state.average[0] == 0.5


def test_discarded_rows_touch_no_sequence():
    made, state = sequences(2)
    update(made, [7.0, 1.0], [made.discard, 0])
    assert state.average[:2].tolist() == [1.0, 0.0]


def test_drafted_rows_count_their_largest():
    made, state = sequences(2)
    update(made, [4.0, 1.0, 2.0], [0, 0, 1], drafted=True)
    assert state.average[:2].tolist() == [4.0, 2.0]


def test_nan_is_seen_and_then_recovered_from():
    made, state = sequences(1)
    update(made, [1.0], [0])
    update(made, [float("nan")], [0])
    assert np.isnan(state.average[0])
    update(made, [1.0], [0])
    assert state.average[0] == 1.0
