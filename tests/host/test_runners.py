# SPDX-License-Identifier: Apache-2.0
"""The V2 runner's hook on hand-made batches: no V2 engine runs without a GPU (see README)."""

import dataclasses
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext

from vllm_flexquant.format import PlaneLayout
from vllm_flexquant.host import runners as hooks
from vllm_flexquant.host.sampling import EntropyProcessor
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner.planner import Controller
from vllm_flexquant.planner.table import LayerRecord, WeightError

FIELDS = (
    "req_ids",
    "num_reqs",
    "idx_mapping_np",
    "query_start_loc_np",
    "num_computed_tokens_np",
    "num_scheduled_tokens",
    "prefill_len_np",
    "num_computed_prefill_tokens_np",
    "is_prefilling_np",
)


@pytest.fixture
def controller():
    made = Controller(FlexQuantOptions(trace_steps=10))
    made.allocate(torch.device("cpu"), slots=4)
    index, _ = made.table.reserve()
    error = WeightError(1024, 1.0, {4: 2.0, 6: 1.0, 8: 0.0})
    made.table.describe(
        index, LayerRecord("a", 16, 64, 64, PlaneLayout(), (4, 6, 8), "reference", "test", error)
    )
    made.start()
    return made


def test_vllm_has_what_the_hook_reads():
    assert set(FIELDS) <= {field.name for field in dataclasses.fields(InputBatch)}
    assert list(inspect.signature(ModelState.prepare_inputs).parameters)[1] == "input_batch"
    context = {field.name for field in dataclasses.fields(LogitsContext)}
    assert {"idx_mapping", "expanded_idx_mapping"} <= context


def batch(slots, computed, scheduled, prefill):
    computed, prefill = np.array(computed), np.array(prefill)
    return SimpleNamespace(
        req_ids=[f"r{s}" for s in slots],
        num_reqs=len(slots),
        idx_mapping_np=np.array(slots),
        num_scheduled_tokens=np.array(scheduled),
        prefill_len_np=prefill,
        num_computed_prefill_tokens_np=computed,
        num_computed_tokens_np=computed,
        query_start_loc_np=np.cumsum([0, *scheduled]),
        is_prefilling_np=computed < prefill,
    )


def test_v2_batches_reach_the_controller(controller):
    asked = []
    runner = SimpleNamespace(
        model_state=SimpleNamespace(prepare_inputs=lambda b, s: asked.append(b) or {"x": 1}),
        req_states=SimpleNamespace(req_id_to_index={"r2": 2, "r0": 0}),
    )
    processor = EntropyProcessor(
        SimpleNamespace(quant_config=SimpleNamespace(controller=controller)), None
    )
    hooks.install(runner, controller)
    floor = SamplingParams(extra_args={"flexquant_min_bits": 6})
    assert processor.add_request(2, floor)
    assert processor.add_request(0, SamplingParams())
    processor.apply_staged_writes()

    step = batch([2, 0], computed=[0, 4], scheduled=[3, 1], prefill=[8, 4])
    assert runner.model_state.prepare_inputs(step, None) == {"x": 1}
    assert asked == [step]
    record = controller.trace()[-1]
    assert record["request_ids"] == ["r2", "r0"]
    assert record["prompt"] == [True, False]
    assert controller.status()["request_floor_bits"] == 6

    logits = torch.randn(2, 50)
    context = SimpleNamespace(
        idx_mapping=torch.tensor([2, 0]), expanded_idx_mapping=torch.tensor([2, 0])
    )
    assert processor.apply(logits, context) is logits
    assert controller.sequences.seen[:4].tolist() == [True, False, False, False]  # 2 is a chunk

    drafted = SimpleNamespace(
        idx_mapping=torch.tensor([2, 0]),
        expanded_idx_mapping=torch.tensor([2, 2, 0], dtype=torch.int32),
    )
    processor.apply(torch.randn(3, 50), drafted)
    assert controller.sequences.seen[2]


def test_a_bad_promise_that_no_one_checked_runs_at_all_bits(controller):
    def floor(params):
        hooks.admit(controller, 0, params)
        return controller.held[0].floor

    assert floor(SamplingParams(extra_args={"flexquant_min_bits": 6})) == 6
    assert floor(SamplingParams(extra_args={"flexquant_min_bits": 60})) == 8
    assert floor(SamplingParams(extra_args={"flexquant_class": "golden"})) == 8
    assert floor(SamplingParams(extra_args={"flexquant_class": "exact"})) == 8
    assert floor(SamplingParams(extra_args={"flexquant_class": "fast"})) == 2
    assert floor(None) == 2


def test_v2_warm_up_batches_are_not_steps(controller):
    runner = SimpleNamespace(
        model_state=SimpleNamespace(prepare_inputs=lambda b: {}),
        req_states=SimpleNamespace(req_id_to_index={}),
    )
    hooks.install(runner, controller)
    runner.model_state.prepare_inputs(batch([0], [0], [1], [1]))
    assert controller.steps == 0
