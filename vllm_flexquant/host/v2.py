# SPDX-License-Identifier: Apache-2.0
"""vLLM's V2 model runner: what it does with requests and batches, told to the planner.

Slots are the runner's own. Wrapped: `add_requests` (grants arrive on every pipeline stage, also on
those without a sampler), `req_states.remove_request`, `model_state.prepare_inputs` (called right
before every forward pass, in all graph modes) and the call of both samplers (the model's own
logits, grammar masks applied, before any logits processor).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_flexquant.host import contract
from vllm_flexquant.host.grants import grant_of
from vllm_flexquant.planner.step import Batch

if TYPE_CHECKING:
    from vllm_flexquant.planner.planner import Planner

READ = (
    "sampler",
    "rejection_sampler",
    "req_states.req_id_to_index",
    "req_states.prompt_len.np",
)
"""What is read of a runner, beside what is wrapped."""

BATCH = (
    "req_ids",
    "num_reqs",
    "idx_mapping_np",
    "expanded_idx_mapping",
    "query_start_loc_np",
    "num_computed_tokens_np",
    "num_computed_prefill_tokens_np",
    "num_scheduled_tokens",
    "num_draft_tokens",
    "num_draft_tokens_per_req",
    "prefill_len_np",
    "is_prefilling_np",
)
"""What is read of an `InputBatch`."""


def install(runner: Any, planner: Planner) -> None:
    """Tell `planner` what `runner`, a loaded `GPUModelRunner` of `v1.worker.gpu`, does.

    Raises:
        ContractError: the runner is not as we know it.
    """
    contract.require(runner, READ, "tell the planner of batches")
    states = runner.req_states
    announced: list[str] = []
    """Requests of the batch that the planner knows of."""

    def admitting(add_requests: Callable[..., Any]) -> Callable[..., Any]:
        def admitted_requests(scheduler_output: Any) -> Any:
            result = add_requests(scheduler_output)
            for request in scheduler_output.scheduled_new_reqs:
                slot = states.req_id_to_index[request.req_id]
                planner.started(slot, grant_of(planner.terms, request.sampling_params))
            return result

        return admitted_requests

    def removing(remove_request: Callable[..., Any]) -> Callable[..., Any]:
        def removed_request(req_id: str) -> Any:
            slot = remove_request(req_id)
            if slot is not None:
                planner.ended(slot)
            return slot

        return removed_request

    def announcing(prepare_inputs: Callable[..., Any]) -> Callable[..., Any]:
        def announced_inputs(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            announced[:] = []
            if _is_held(input_batch, states):
                announced[:] = input_batch.req_ids
                planner.step(_batch_of(input_batch, states))
            return prepare_inputs(input_batch, *args, **kwargs)

        return announced_inputs

    def watching(sample: Callable[..., Any]) -> Callable[..., Any]:
        def watched_call(logits: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            if announced and list(input_batch.req_ids) == announced:
                rows = input_batch.expanded_idx_mapping.long()
                planner.logits(logits, rows, drafted=input_batch.num_draft_tokens > 0)
            return sample(logits, input_batch, *args, **kwargs)

        return watched_call

    contract.wrap(
        runner, "add_requests", admitting, why="learn of requests", parameters=("scheduler_output",)
    )
    contract.wrap(
        states, "remove_request", removing, why="learn of requests", parameters=("req_id",)
    )
    contract.wrap(
        runner.model_state,
        "prepare_inputs",
        announcing,
        why="tell the planner of batches",
        parameters=("input_batch",),
    )
    for sampler in (runner.sampler, runner.rejection_sampler):
        if sampler is not None:  # only the last stage of a pipeline has one
            contract.wrap_call(sampler, watching, why="see the model's own logits")


def _is_held(batch: Any, states: Any) -> bool:
    """Whether a batch is of requests that the runner holds; captured and dummy ones are not."""
    known, slots = states.req_id_to_index, batch.idx_mapping_np[: batch.num_reqs].tolist()
    return all(known.get(r) == s for r, s in zip(batch.req_ids, slots, strict=False))


def _batch_of(batch: Any, states: Any) -> Batch:
    count = batch.num_reqs
    slots = batch.idx_mapping_np[:count]
    prefilled = batch.num_computed_prefill_tokens_np + batch.num_scheduled_tokens
    last = batch.query_start_loc_np[1 : count + 1] - 1
    if batch.num_draft_tokens_per_req is not None:
        last = last - batch.num_draft_tokens_per_req[:count]
    # after a preemption, what the runner takes for prefill holds the answer so far
    positions = batch.num_computed_tokens_np[:count] - states.prompt_len.np[slots]
    return Batch(
        request_ids=list(batch.req_ids),
        slots=slots.tolist(),
        prompt=batch.is_prefilling_np[:count].tolist(),
        discarded=(prefilled < batch.prefill_len_np)[:count].tolist(),
        rows=last.tolist(),
        positions=positions.tolist(),
    )
