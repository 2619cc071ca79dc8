# SPDX-License-Identifier: Apache-2.0
"""Where the controller meets vLLM's model runners: right before each forward pass.

Both runners have one method that is called with the batch ready and just before the model runs,
in every execution mode; it is wrapped on the runner's instance.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_flexquant.planner.planner import Controller
from vllm_flexquant.planner.sequences import SlotBook
from vllm_flexquant.planner.step import Batch

logger = init_logger(f"vllm.{__name__}")


def install(runner: Any, controller: Controller) -> None:
    """Wrap `runner` (V1 `GPUModelRunner` or V2 `v1.worker.gpu` one) around `controller`."""
    if hasattr(runner, "model_state"):
        _install_v2(runner, controller)
    else:
        _install_v1(runner, controller)


def _install_v1(runner: Any, controller: Controller) -> None:
    """Wrap `_model_forward`, which vLLM documents as the place to override.

    Slots are our own: V1 refills its batch rows as it likes. Dummy and profiling runs do not come
    through here, so they run at whatever the table holds.
    """
    book = controller.requests = SlotBook(runner.max_num_reqs)
    speculates = runner.vllm_config.speculative_config is not None
    model_forward, sample = runner._model_forward, runner._sample

    def announce() -> None:
        rows = runner.input_batch
        count = rows.num_reqs
        ids = rows.req_ids[:count]
        if ids != book.batch:
            book.retain(runner.requests)
            new = book.admit(ids)
            for request_id in new:
                admit(controller, book[request_id], runner.requests[request_id].sampling_params)
            controller.sequences.forget([book[r] for r in new])
        computed, prompt = rows.num_computed_tokens_cpu[:count], rows.num_prompt_tokens[:count]
        ends = runner.query_start_loc.np[1 : count + 1]
        discarded = runner.discard_request_mask.np[:count]
        filling = (computed < prompt) | discarded
        starts = runner.query_start_loc.np[:count]
        last = ends - 1
        if count and ends[-1] != count:
            new_rows = ends - starts
            if speculates:
                drafted = np.array([len(tokens) for tokens in rows.spec_token_ids[:count]])
                new_rows, last = new_rows - drafted, last - drafted
            # a preempted sequence that is back computes its own answer again, as a prompt
            filling |= new_rows > 1
        controller.before_forward(
            Batch(
                request_ids=ids,
                slots=book.batch_slots,
                prompt=filling.tolist(),
                discarded=discarded.tolist(),
                rows=last.tolist(),
                positions=(computed - prompt).tolist(),
            )
        )

    @wraps(sample)
    def watched_sample(logits: Any, spec_decode_metadata: Any) -> Any:
        if spec_decode_metadata is None or not any(spec_decode_metadata.num_draft_tokens):
            controller.after_logits(logits)  # which sampling changes in place
            # vLLM 0.32 takes steps without drafts through the rejection sampler too, which takes
            # longer and fails on a CPU where requests have top_k: it looks for the largest of none
            return sample(logits, None)
        output = sample(logits, spec_decode_metadata)
        controller.after_logits(logits[_last_kept(output.sampled_token_ids, spec_decode_metadata)])
        return output

    if controller.speculation is not None:
        # vLLM takes no logits processor of ours beside speculation
        runner._sample = watched_sample

    @wraps(model_forward)
    def announced_forward(*args: Any, **kwargs: Any) -> Any:
        announce()
        return model_forward(*args, **kwargs)

    runner._model_forward = announced_forward
    # vLLM takes any custom logits processor to need output token ids, which under async scheduling
    # costs a wait per step (vllm-project/vllm#52461); ours does not, and it goes first in the list
    if len(runner.vllm_config.model_config.logits_processors or ()) == 1:
        runner.input_batch.logitsprocs_need_output_token_ids = False


def _last_kept(sampled: torch.Tensor, drafts: Any) -> torch.Tensor:
    """int64 [requests], the row of the logits that gave each request its last token.

    Args:
        sampled: [requests, drafts + 1], -1 from the first draft that was rejected on.
        drafts: vLLM's metadata of the drafts verified.
    """
    ends = drafts.cu_num_sampled_tokens.long()
    counts = torch.tensor(drafts.num_draft_tokens, device=ends.device) + 1
    kept = (sampled != -1).sum(1).clamp(min=1)
    return ends - counts + kept - 1


def admit(controller: Controller, slot: int, params: Any) -> None:
    """Take in a request that is already running: it must not fail now.

    Requests are checked at admission by the logits processor, which vLLM does not load in every
    configuration (speculative decoding on V1).
    """
    try:
        controller.admit(slot, params.extra_args if params else None)
    except ValueError as error:
        logger.warning_once("flexquant: %s; the request runs at all bits", error)


def _install_v2(runner: Any, controller: Controller) -> None:
    """Wrap `model_state.prepare_inputs`, called before every forward in all graph modes.

    Slots are the runner's own, which the logits processor is told of; promises arrive there too.
    """
    state = runner.model_state
    prepare_inputs = state.prepare_inputs

    def announce(batch: Any) -> None:
        slots = batch.idx_mapping_np[: batch.num_reqs].tolist()
        known = runner.req_states.req_id_to_index
        if any(known.get(r) != s for r, s in zip(batch.req_ids, slots, strict=False)):
            return  # warm-up and capture use requests that the runner does not hold
        prefilled = batch.num_computed_prefill_tokens_np + batch.num_scheduled_tokens
        computed = batch.num_computed_tokens_np
        controller.before_forward(
            Batch(
                request_ids=list(batch.req_ids),
                slots=slots,
                prompt=batch.is_prefilling_np[: batch.num_reqs].tolist(),
                discarded=(prefilled < batch.prefill_len_np)[: batch.num_reqs].tolist(),
                rows=(batch.query_start_loc_np[1 : batch.num_reqs + 1] - 1).tolist(),
                positions=(computed - batch.prefill_len_np)[: batch.num_reqs].tolist(),
            )
        )

    @wraps(prepare_inputs)
    def announced_inputs(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        announce(input_batch)
        return prepare_inputs(input_batch, *args, **kwargs)

    state.prepare_inputs = announced_inputs
