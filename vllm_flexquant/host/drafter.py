# SPDX-License-Identifier: Apache-2.0
"""Self-speculation on vLLM's V1 model runner: the served model drafts, at a cheap level.

The draft is the target: the same module, the same planes, the same KV cache. A draft of the token
at position p writes keys and values of position p into the block that the scheduler has set aside
for it (its look-ahead); the step that verifies computes positions p and on at its own level and
writes over them before anything is taken as computed. So drafts need no weights, no cache and no
prompt pass of their own, and what they attend to is what the target wrote.

vLLM calls the proposer between sampling and the next step's scheduling, and takes lists of any
length for each request, so each stops where it likes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import _SAMPLING_EPS
from vllm.v1.spec_decode.draft_model import DraftModelProposer

if TYPE_CHECKING:
    from vllm_flexquant.speculation.control import SelfSpeculation


class SelfDrafter(DraftModelProposer):
    """Takes the place of vLLM's proposer for `"method": "draft_model"`."""

    def __init__(self, vllm_config: Any, device: torch.device, runner: Any) -> None:
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        self.speculation: SelfSpeculation | None = None
        self._start_host = torch.arange(self.max_batch_size + 1, dtype=torch.int32)

    # ---- what vLLM asks of a proposer with a model

    def load_model(self, target_model: torch.nn.Module) -> None:
        """The draft is the target."""
        self.model = target_model
        self._draft_attn_layer_names: set[str] = set()

    def initialize_attn_backend(self, *args: Any, **kwargs: Any) -> None:
        """The target's own attention groups serve."""

    def initialize_cudagraph_keys(self, *args: Any, **kwargs: Any) -> None:
        """Drafts replay the target's graphs or none."""

    def dummy_run(self, *args: Any, **kwargs: Any) -> None:
        """The target's warm-up is the draft's."""

    def prepare_inputs_padded(
        self,
        common_attn_metadata: CommonAttentionMetadata,
        spec_decode_metadata: Any,
        valid_sampled_tokens_count: torch.Tensor,
    ) -> tuple[CommonAttentionMetadata, None, torch.Tensor]:
        """Nothing to pad: a draft starts from one token for each request.

        Returns:
            the metadata as it was, nothing, and the drafts that were rejected, int32 [requests].
        """
        drafted = torch.tensor(spec_decode_metadata.num_draft_tokens, dtype=torch.int32)
        drafted = drafted.to(valid_sampled_tokens_count.device)
        rejected = torch.where(drafted > 0, drafted + 1 - valid_sampled_tokens_count, 0)
        return common_attn_metadata, None, rejected

    # ---- drafting

    def propose(
        self,
        num_speculative_tokens: int,
        next_token_ids: torch.Tensor,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        **_: Any,
    ) -> list[list[int]]:
        """Drafts of each request of the batch, none where it is not worth it.

        Args:
            num_speculative_tokens: drafts for each request at most.
            next_token_ids: int32 [requests], sampled just now.
        """
        speculation = self.speculation
        assert speculation is not None
        self._last_draft_probs = None
        count = self.runner.input_batch.num_reqs
        context = common_attn_metadata.seq_lens[:count].long()
        if num_rejected_tokens_gpu is not None:
            context -= num_rejected_tokens_gpu[:count]
        ids = self.runner.input_batch.req_ids[:count]
        drafted = [len(tokens) for tokens in self.runner.input_batch.spec_token_ids[:count]]
        kept = drafted
        if num_rejected_tokens_gpu is not None:
            rejected = num_rejected_tokens_gpu[:count].tolist()
            kept = [max(d - r, 0) for d, r in zip(drafted, rejected, strict=True)]
        rows = self._able(context.cpu().numpy(), num_speculative_tokens)
        asked = speculation.begin(ids, drafted, kept, rows, not sampling_metadata.all_greedy)
        length = min(asked, num_speculative_tokens)
        proposed: list[list[int]] = [[] for _ in range(count)]
        if length:
            with speculation.drafting():
                self._draft(rows, length, next_token_ids, context, sampling_metadata, proposed)
        speculation.end(ids)
        return proposed

    def _able(self, context: np.ndarray, most: int) -> list[int]:
        """Rows of the batch that may draft `most` tokens: their prompt is done, and there are
        blocks for the drafts."""
        runner = self.runner
        last = context + most
        able = ~runner.discard_request_mask.np[: len(last)] & (last < self.max_model_len)
        for table in runner.input_batch.block_table.block_tables:
            blocks = table.num_blocks_per_row[: len(last)]
            able &= last <= blocks * table.block_size
        return np.flatnonzero(able).tolist()

    def _draft(
        self,
        rows: list[int],
        length: int,
        next_token_ids: torch.Tensor,
        context: torch.Tensor,
        sampling: SamplingMetadata,
        proposed: list[list[int]],
    ) -> None:
        """Add drafts to `proposed`, until all have stopped."""
        speculation = self.speculation
        assert speculation is not None
        tokens, every = next_token_ids, len(proposed)
        probabilities: list[tuple[list[int], torch.Tensor]] = []
        for index in range(length):
            began = time.perf_counter()
            chosen = None if len(rows) == every else torch.tensor(rows, device=self.device)
            ids, positions = tokens.long(), context + index
            if chosen is not None:
                ids, positions = ids[chosen], positions[chosen]
            logits = self._forward(chosen, ids, positions, index)
            nats = speculation.entropies(logits)
            drawn, chances = self._draw(logits, sampling, rows)
            if chances is not None:
                probabilities.append((rows, chances))
            found = drawn.tolist()
            speculation.book_draft(time.perf_counter() - began)
            for row, token in zip(rows, found, strict=True):
                proposed[row].append(token)
            tokens = next_token_ids.new_zeros(every)
            tokens[rows] = drawn.to(tokens.dtype)
            rows, refused = speculation.stop(rows, nats, _greedy_rows(sampling, rows))
            for row in refused:
                proposed[row].pop()
            if not rows:
                break
        if probabilities:
            self._keep_probabilities(probabilities, every, length)

    def _draw(
        self, logits: torch.Tensor, sampling: SamplingMetadata, rows: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A token for each of `rows`, int64, and what it was drawn from, fp32 [rows, vocabulary].

        As vLLM's proposer draws, by temperature alone, which is lossless whatever else the request
        asks for. By one random number for each row instead of one for each entry of the vocabulary:
        on a CPU those take longer than the draft's output layer.
        """
        logits = logits.float()
        temperature = sampling.temperature
        if sampling.all_greedy or temperature is None or not self._enable_probabilistic_draft_probs:
            return logits.max(-1).indices, None
        temperature = temperature[rows].view(-1, 1)
        greedy = temperature < _SAMPLING_EPS
        probabilities = (logits / temperature.masked_fill(greedy, 1.0)).softmax(-1)
        reached = probabilities.cumsum(-1, dtype=torch.float64)
        drawn = torch.rand_like(reached[:, :1]) * reached[:, -1:]
        tokens = torch.searchsorted(reached, drawn, right=True).clamp(max=logits.shape[-1] - 1)
        return torch.where(greedy, logits.argmax(-1, keepdim=True), tokens).view(-1), probabilities

    def _keep_probabilities(
        self, found: Sequence[tuple[list[int], torch.Tensor]], count: int, length: int
    ) -> None:
        """What each draft was drawn from, for vLLM's rejection sampler: [requests, length, V]."""
        vocabulary = found[0][1].shape[-1]
        kept = found[0][1].new_zeros(count, length, vocabulary)
        for index, (rows, chances) in enumerate(found):
            kept[rows, index] = chances
        self._last_draft_probs = kept

    def _forward(
        self, chosen: torch.Tensor | None, ids: torch.Tensor, positions: torch.Tensor, index: int
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] of one token for each row.

        Args:
            chosen: int64, rows of the batch; all if None.
            ids, positions: int64 [rows].
        """
        runner, count = self.runner, len(ids)
        lengths = (positions + 1).int()
        longest = int(lengths.max())
        metadata: dict[str, Any] = {}
        slots: dict[str, torch.Tensor] = {}
        for groups, table in zip(
            runner.attn_groups, runner.input_batch.block_table.block_tables, strict=True
        ):
            blocks = table.block_table.gpu[: runner.input_batch.num_reqs]
            if chosen is not None:
                blocks = blocks[chosen]
            number = (positions // table.block_size).view(-1, 1)
            slot = blocks.gather(1, number).view(-1).long() * table.block_size
            slot += positions % table.block_size
            common = CommonAttentionMetadata(
                query_start_loc=self.arange[: count + 1],
                query_start_loc_cpu=self._start_host[: count + 1],
                seq_lens=lengths,
                num_reqs=count,
                num_actual_tokens=count,
                max_query_len=1,
                max_seq_len=longest,
                block_table_tensor=blocks,
                slot_mapping=slot,
                positions=positions,
                seq_lens_cpu_upper_bound=lengths.cpu(),
            )
            for group in groups:
                built = group.build_metadata_for_drafting(common, index)
                metadata |= dict.fromkeys(group.layer_names, built)
                slots |= dict.fromkeys(group.layer_names, slot)
        with set_forward_context(metadata, self.vllm_config, num_tokens=count, slot_mapping=slots):
            hidden = self.model(
                input_ids=ids, positions=positions, intermediate_tensors=None, inputs_embeds=None
            )
        return self.model.compute_logits(hidden)


def _greedy_rows(sampling: SamplingMetadata, rows: list[int]) -> list[bool]:
    if sampling.all_greedy or sampling.temperature is None:
        return [True] * len(rows)
    return (sampling.temperature[rows] < _SAMPLING_EPS).tolist()
