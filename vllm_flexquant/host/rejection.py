# SPDX-License-Identifier: Apache-2.0
"""vLLM's rejection sampler on CPUs, mended."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_flexquant.host import contract


def mend() -> None:
    """Give drafted rows the sampling parameters of their requests. Idempotent.

    Raises:
        ContractError: vLLM has no such function.
    """
    from vllm.v1.sample import rejection_sampler

    contract.wrap(
        rejection_sampler,
        "expand_batch_to_tokens",
        _expanding,
        why="give drafted rows the parameters of their requests",
        parameters=("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"),
    )


def _expanding(_: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return expanded


def expanded(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """[num_tokens] of x [requests], each as often as it has drafts; as vLLM's.

    Args:
        cu_num_tokens: [requests], drafts up to and with each request.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    values = x if replace_from == replace_to else x.masked_fill(x == replace_from, replace_to)
    return values.repeat_interleave(counts, output_size=num_tokens)
