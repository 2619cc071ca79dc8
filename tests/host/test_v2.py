# SPDX-License-Identifier: Apache-2.0
"""The V2 runner's hooks on hand-made batches: its engine needs Triton (see README)."""

import dataclasses
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
from vllm.v1.worker.gpu.states import RequestState

from vllm_flexquant.host import v2
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.requests.grant import Kept, Terms


def test_vllm_has_what_the_hooks_read():
    assert set(v2.BATCH) <= {field.name for field in dataclasses.fields(InputBatch)}
    for method, parameters in (
        (ModelState.prepare_inputs, ["self", "input_batch"]),
        (GPUModelRunner.add_requests, ["self", "scheduler_output"]),
        (RequestState.remove_request, ["self", "req_id"]),
        (Sampler.__call__, ["self", "logits", "input_batch"]),
        (RejectionSampler.__call__, ["self", "logits", "input_batch"]),
    ):
        assert list(inspect.signature(method).parameters)[: len(parameters)] == parameters


class Planner:
    """Notes what it is told."""

    def __init__(self):
        self.terms = Terms.of(FlexQuantOptions(), (4, 6, 8), Kept(None, "none"))
        self.grants, self.batches, self.rows = {}, [], []

    def started(self, slot, grant):
        self.grants[slot] = grant

    def ended(self, slot):
        del self.grants[slot]

    def step(self, batch):
        self.batches.append(batch)

    def logits(self, logits, slots=None, drafted=False):
        self.rows.append((logits.clone(), slots.tolist(), drafted))


class States:
    """A runner's table of requests."""

    def __init__(self):
        self.req_id_to_index = {}
        self.prompt_len = SimpleNamespace(np=np.zeros(4, dtype=np.int32))

    def remove_request(self, req_id):
        return self.req_id_to_index.pop(req_id, None)


class CallableSampler:
    """Changes logits in place."""

    def __call__(self, logits, input_batch, *more):
        logits.zero_()
        return (input_batch, *more)


class Runner:
    """A runner of a pipeline's last stage, or of another one."""

    def __init__(self, last=True):
        self.req_states = States()
        self.model_state = SimpleNamespace(prepare_inputs=lambda input_batch, states=None: {"x": 1})
        self.sampler = CallableSampler() if last else None
        self.rejection_sampler = CallableSampler() if last else None

    def add_requests(self, scheduler_output):
        for slot, request in scheduler_output.scheduled_new_reqs:
            self.req_states.remove_request(request.req_id)
            self.req_states.req_id_to_index[request.req_id] = slot
        scheduler_output.scheduled_new_reqs = [r for _, r in scheduler_output.scheduled_new_reqs]


def arrive(runner, *requests):
    found = []
    for name, slot, args, prompt in requests:
        runner.req_states.prompt_len.np[slot] = prompt
        params = SamplingParams(extra_args=args)
        found.append((slot, SimpleNamespace(req_id=name, sampling_params=params)))
    runner.add_requests(SimpleNamespace(scheduled_new_reqs=found))


def batch(slots, computed, scheduled, prefill, drafts=None):
    computed, prefill = np.array(computed), np.array(prefill)
    rows = np.ones(len(slots), dtype=int) if drafts is None else np.array(drafts) + 1
    return SimpleNamespace(
        req_ids=[f"r{s}" for s in slots],
        num_reqs=len(slots),
        idx_mapping_np=np.array(slots),
        expanded_idx_mapping=torch.tensor(np.repeat(slots, rows), dtype=torch.int32),
        num_draft_tokens=int(sum(drafts or [0])),
        num_draft_tokens_per_req=None if drafts is None else np.array(drafts),
        num_scheduled_tokens=np.array(scheduled),
        prefill_len_np=prefill,
        num_computed_prefill_tokens_np=np.minimum(computed, prefill),
        num_computed_tokens_np=computed,
        query_start_loc_np=np.cumsum([0, *scheduled]),
        is_prefilling_np=computed < prefill,
    )


@pytest.fixture
def planner():
    return Planner()


@pytest.fixture
def runner(planner):
    made = Runner()
    v2.install(made, planner)
    v2.install(made, planner)  # changes nothing
    arrive(made, ("r2", 2, {"flexquant_min_bits": 5}, 8), ("r0", 0, None, 4))
    return made


def test_requests_and_batches_reach_the_planner(runner, planner):
    assert {slot: grant.floor for slot, grant in planner.grants.items()} == {2: 6, 0: 0}
    step = batch([2, 0], computed=[0, 6], scheduled=[3, 1], prefill=[8, 4])
    assert runner.model_state.prepare_inputs(step, None) == {"x": 1}
    (told,) = planner.batches
    assert told.request_ids == ["r2", "r0"]
    assert (told.slots, told.prompt, told.discarded) == ([2, 0], [True, False], [True, False])
    assert (told.rows, told.positions) == ([2, 3], [-8, 2])
    logits = torch.ones(2, 50)
    assert runner.sampler(logits, step) == (step,)
    seen, slots, drafted = planner.rows[0]
    assert seen.sum() == 100  # before the sampler changes them
    assert (slots, drafted) == ([2, 0], False)
    runner.req_states.remove_request("r2")
    assert list(planner.grants) == [0]
    runner.req_states.remove_request("r2")


def test_rows_of_drafts_are_told_by_slot(runner, planner):
    step = batch([2, 0], computed=[9, 6], scheduled=[3, 1], prefill=[8, 4], drafts=[2, 0])
    runner.model_state.prepare_inputs(step)
    assert planner.batches[0].rows == [0, 3]  # of the last token that is no draft
    assert runner.rejection_sampler(torch.ones(4, 50), step, "draft logits") == (
        step,
        "draft logits",
    )
    assert planner.rows[0][1:] == ([2, 2, 2, 0], True)


def test_an_answer_goes_on_where_it_was_after_a_preemption(runner, planner):
    runner.req_states.remove_request("r0")
    arrive(runner, ("r0", 1, None, 4))
    step = batch([1], computed=[9], scheduled=[1], prefill=[9])
    step.req_ids = ["r0"]
    runner.model_state.prepare_inputs(step)
    assert planner.batches[0].positions == [5]
    assert sorted(planner.grants) == [1, 2]


def test_stages_without_a_sampler_learn_of_requests_too(planner):
    first = Runner(last=False)
    v2.install(first, planner)
    arrive(first, ("r1", 1, {"flexquant_class": "exact"}, 4))
    assert planner.grants[1].floor == 8


def test_warm_up_batches_are_not_steps(runner, planner):
    step = batch([0], [0], [1], [1])
    step.req_ids = ["req_0_made_up"]
    runner.model_state.prepare_inputs(step)
    runner.sampler(torch.ones(1, 50), step)
    assert planner.batches == planner.rows == []


def test_a_bad_promise_that_no_one_checked_runs_at_all_bits(runner, planner):
    arrive(runner, ("r3", 3, {"flexquant_class": "golden"}, 4))
    assert planner.grants[3].floor == 8
