# SPDX-License-Identifier: Apache-2.0
"""vLLM's V1 model runner: what it does with requests and batches, told to the planner.

Wrapped on the runner's instance: `_update_states` (requests come and go), `_model_forward` (the
batch is ready, the model is about to run) and `_sample` (the model's own logits, grammar masks
applied, before any logits processor). Dummy and profiling runs go through none of them, so they run
at whatever the table holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_flexquant.host import contract
from vllm_flexquant.host.grants import grant_of
from vllm_flexquant.planner.step import Batch

if TYPE_CHECKING:
    from vllm_flexquant.planner.planner import Planner
    from vllm_flexquant.requests.grant import Grant

READ = (
    "max_num_reqs",
    "requests",
    "input_batch.num_reqs",
    "input_batch.req_ids",
    "input_batch.num_computed_tokens_cpu",
    "input_batch.num_prompt_tokens",
    "input_batch.spec_token_ids",
    "query_start_loc.np",
    "discard_request_mask.np",
)
"""What is read of a runner, beside what is wrapped."""


class SlotBook:
    """Gives each request of a runner a slot of the device buffers: V1 moves the rows of its own
    batch as it likes.

    started: called with slot and grant when a request takes a slot; ended: when it leaves it.
    """

    def __init__(
        self,
        capacity: int,
        started: Callable[[int, Grant], None],
        ended: Callable[[int], None],
    ) -> None:
        self._started, self._ended = started, ended
        self._free = list(range(capacity - 1, -1, -1))
        self._grants: dict[str, Grant] = {}
        """Of all requests that the runner holds, waiting ones too."""
        self._slots: dict[str, int] = {}
        """Those that ran last come last."""
        self._batch: Sequence[str] = ()
        self._batch_slots: list[int] = []

    def __len__(self) -> int:
        return len(self._grants)

    def enter(self, request_id: str, grant: Grant) -> None:
        """A request comes, or a next part of a streaming one, which starts anew."""
        self._vacate(request_id)
        self._grants[request_id] = grant

    def leave(self, request_id: str) -> None:
        """A request has ended; one that is unknown is passed over."""
        self._vacate(request_id)
        self._grants.pop(request_id, None)

    def seat(self, request_ids: Sequence[str]) -> list[int]:
        """The slots of a batch.

        A preempted request keeps its slot while there are enough. When there are not, those that
        have waited longest lose theirs, and start anew when they come back.

        Args:
            request_ids: that have entered, not more than the capacity.
        """
        if request_ids == self._batch:
            return self._batch_slots
        for request_id in request_ids:
            if (slot := self._slots.pop(request_id, None)) is not None:
                self._slots[request_id] = slot
        new = [r for r in request_ids if r not in self._slots]
        for _ in range(len(new) - len(self._free)):
            self._vacate(next(iter(self._slots)))
        for request_id in new:
            slot = self._slots[request_id] = self._free.pop()
            self._started(slot, self._grants[request_id])
        self._batch, self._batch_slots = list(request_ids), [self._slots[r] for r in request_ids]
        return self._batch_slots

    def _vacate(self, request_id: str) -> None:
        if (slot := self._slots.pop(request_id, None)) is not None:
            self._free.append(slot)
            self._batch = ()
            self._ended(slot)


def install(runner: Any, planner: Planner, drafts_itself: bool) -> None:
    """Tell `planner` what `runner`, a loaded `GPUModelRunner`, does.

    Args:
        drafts_itself: it has our drafter.

    Raises:
        ContractError: the runner is not as we know it.
    """
    why = "tell the planner of batches"
    contract.require(runner, READ, why)
    book = SlotBook(runner.max_num_reqs, planner.started, planner.ended)

    def following(update_states: Callable[..., Any]) -> Callable[..., Any]:
        def followed_update(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            result = update_states(scheduler_output, *args, **kwargs)
            for request_id in scheduler_output.finished_req_ids:
                book.leave(request_id)
            for request in scheduler_output.scheduled_new_reqs:
                book.enter(request.req_id, grant_of(planner.terms, request.sampling_params))
            return result

        return followed_update

    def announcing(model_forward: Callable[..., Any]) -> Callable[..., Any]:
        def announced_forward(*args: Any, **kwargs: Any) -> Any:
            planner.step(_batch_of(runner, book))
            return model_forward(*args, **kwargs)

        return announced_forward

    def watching(sample: Callable[..., Any]) -> Callable[..., Any]:
        def watched_sample(logits: Any, spec_decode_metadata: Any) -> Any:
            drafts = spec_decode_metadata
            if drafts is not None and any(drafts.num_draft_tokens):
                output = sample(logits, drafts)
                planner.logits(logits[_last_kept(output.sampled_token_ids, drafts)])
                return output
            if logits is not None:
                planner.logits(logits)  # which sampling changes in place
            # vLLM 0.32 takes steps without drafts through the rejection sampler too, which takes
            # longer and fails on a CPU where requests have top_k: it looks for the largest of none
            return sample(logits, None if drafts_itself else drafts)

        return watched_sample

    contract.wrap(
        runner,
        "_update_states",
        following,
        why="learn of requests",
        parameters=("scheduler_output",),
    )
    contract.wrap(runner, "_model_forward", announcing, why=why)
    contract.wrap(
        runner,
        "_sample",
        watching,
        why="see the model's own logits",
        parameters=("logits", "spec_decode_metadata"),
    )


def _batch_of(runner: Any, book: SlotBook) -> Batch:
    rows = runner.input_batch
    count = rows.num_reqs
    ids = rows.req_ids[:count]
    computed, prompt = rows.num_computed_tokens_cpu[:count], rows.num_prompt_tokens[:count]
    starts, ends = runner.query_start_loc.np[:count], runner.query_start_loc.np[1 : count + 1]
    discarded = runner.discard_request_mask.np[:count]
    filling = (computed < prompt) | discarded
    last = ends - 1
    if count and ends[-1] != count:
        new_rows = ends - starts
        drafted = np.array([len(tokens) for tokens in rows.spec_token_ids[:count]])
        new_rows, last = new_rows - drafted, last - drafted
        # a preempted sequence that is back computes its own answer again, as a prompt
        filling |= new_rows > 1
    return Batch(
        request_ids=ids,
        slots=book.seat(ids),
        prompt=filling.tolist(),
        discarded=discarded.tolist(),
        rows=last.tolist(),
        positions=(computed - prompt).tolist(),
    )


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
