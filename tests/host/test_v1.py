# SPDX-License-Identifier: Apache-2.0
"""How requests of the V1 runner take and leave slots; the hooks themselves need an engine
(tests/e2e)."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_flexquant.host import v1
from vllm_flexquant.host.contract import ContractError
from vllm_flexquant.requests.grant import Grant

ONE, OTHER = Grant(0, 8, True), Grant(1, 2, False)


class Told(list):
    """What the planner was told, in order."""

    def started(self, slot, grant):
        self.append(("started", slot, grant))

    def ended(self, slot):
        self.append(("ended", slot))

    def take(self):
        found = list(self)
        self.clear()
        return found


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def book(told):
    return v1.SlotBook(2, told.started, told.ended)


def test_a_request_has_a_slot_from_its_first_step_to_its_end(book, told):
    book.enter("a", ONE)
    book.enter("b", OTHER)
    assert told.take() == []
    assert book.seat(["b"]) == [0]
    assert book.seat(["a", "b"]) == [1, 0]
    assert told.take() == [("started", 0, OTHER), ("started", 1, ONE)]
    assert book.seat(["a", "b"]) == [1, 0]
    assert book.seat(["b", "a"]) == [0, 1]
    assert told.take() == []
    book.leave("a")
    assert told.take() == [("ended", 1)]
    book.leave("a")
    book.leave("b")
    assert told.take() == [("ended", 0)]
    assert len(book) == 0


def test_an_id_that_is_used_again_at_once_is_another_request(book, told):
    book.enter("a", ONE)
    book.seat(["a"])
    told.take()
    book.leave("a")
    book.enter("a", OTHER)
    book.seat(["a"])
    assert told.take() == [("ended", 0), ("started", 0, OTHER)]


def test_the_next_part_of_a_streaming_request_may_ask_for_something_else(book, told):
    book.enter("a", OTHER)
    book.seat(["a"])
    told.take()
    book.enter("a", ONE)
    book.seat(["a"])
    assert told.take() == [("ended", 0), ("started", 0, ONE)]


def test_those_that_have_waited_longest_lose_their_slots(book, told):
    for name in "abc":
        book.enter(name, OTHER)
    book.seat(["a", "b"])
    book.seat(["a"])
    told.take()
    book.seat(["a", "c"])  # b waits, although a came first
    assert told.take() == [("ended", 1), ("started", 1, OTHER)]
    book.seat(["c"])
    book.seat(["c", "b"])
    assert told.take() == [("ended", 0), ("started", 0, OTHER)]


def test_the_row_that_gave_the_last_token():
    sampled = torch.tensor([[5, 6, -1], [7, -1, -1], [1, 2, 3]])
    drafts = SimpleNamespace(
        cu_num_sampled_tokens=torch.tensor([3, 4, 7]), num_draft_tokens=[2, 0, 2]
    )
    assert v1._last_kept(sampled, drafts).tolist() == [1, 3, 6]


def test_vllm_has_what_is_wrapped():
    for name, parameter in (
        ("_update_states", "scheduler_output"),
        ("_sample", "spec_decode_metadata"),
        ("_model_forward", "input_ids"),
    ):
        assert parameter in inspect.signature(getattr(GPUModelRunner, name)).parameters


def test_a_runner_that_is_not_as_expected_is_refused_at_once():
    with pytest.raises(ContractError, match=r"has no SimpleNamespace\.max_num_reqs, which"):
        v1.install(SimpleNamespace(), SimpleNamespace(), drafts_itself=False)
