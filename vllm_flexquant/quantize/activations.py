# SPDX-License-Identifier: Apache-2.0
"""What int8 activations cost beside the weights: the CPU kernels quantize what a layer is given."""

from __future__ import annotations

from typing import Any

import torch

from flexquant_kernels.reference import quantize_activations
from vllm_flexquant.format.checkpoint import OUTPUT_LAYER
from vllm_flexquant.format.layout import choose_group_size
from vllm_flexquant.quantize import evaluate
from vllm_flexquant.quantize.blocks import hooked


def int8_activations_kl(
    nested: evaluate.NestedModel, tokens: torch.Tensor, widths: evaluate.Widths, group_size: int
) -> tuple[float, float]:
    """KL to the reference that int8 activations add, nats per token, and its standard error.

    Args:
        tokens: int64 [sequences, length].
        widths: of all units, in both of what is compared.
        group_size: as the layers' groups of weights, which share a scale of activations.
    """
    model = nested.model
    batches = evaluate.cut(tokens)

    def rounded(_: str, layer: torch.nn.Linear) -> Any:
        size = choose_group_size(layer.in_features, group_size)
        return (lambda _, args: (_int8(args[0], size),)) if size else None

    added = []
    with torch.inference_mode():
        start = [model.embed(batch) for batch in batches]
        truth, plain, int8 = list(start), list(start), list(start)
        for index in range(len(model)):
            units = nested.units[index]
            with model.loaded(index):
                swap = evaluate.Swap(nested, index)
                for b, batch in enumerate(batches):
                    model.match(batch)
                    swap.use([None] * len(units))
                    truth[b] = model.run(index, truth[b])
                    swap.use([widths.get(unit.name) for unit in units])
                    plain[b] = model.run(index, plain[b])
                    with hooked(model.linears(index), rounded):
                        int8[b] = model.run(index, int8[b])
        output = model.model.get_output_embeddings()
        width = widths.get(OUTPUT_LAYER)
        weight = None
        if width is not None:
            stored = nested.read(evaluate.OUTPUT_INDEX)[OUTPUT_LAYER]
            weight = stored.dequantize(nested.layout, width)
        for b, batch in enumerate(batches):
            for row in range(len(batch)):
                one = slice(row, row + 1)
                wanted = torch.log_softmax(model.logits(batch[one], truth[b][one]), -1)
                before = torch.log_softmax(model.logits(batch[one], plain[b][one], weight), -1)
                with hooked([(OUTPUT_LAYER, output)] if weight is not None else [], rounded):
                    after = torch.log_softmax(model.logits(batch[one], int8[b][one], weight), -1)
                # KL(truth || after) - KL(truth || before)
                added.append((wanted.exp() * (before - after)).sum(-1).flatten().cpu())
    return evaluate.mean_and_error(torch.cat(added))


def _int8(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """What is left of `x` [..., K] after the kernel's rounding."""
    codes, scale = quantize_activations(x.reshape(-1, x.shape[-1]), group_size)
    return (codes.float() * scale.unsqueeze(-1)).view(x.shape).to(x.dtype)
