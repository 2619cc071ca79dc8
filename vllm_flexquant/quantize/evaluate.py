# SPDX-License-Identifier: Apache-2.0
"""KL of the model's output when its layers run at given widths: many such choices in one sweep.

Blocks are visited once. Choices that agree on all layers so far share their hidden states, so a
choice that differs from the reference in one layer costs only the blocks from that layer on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from vllm_flexquant.format.layout import PlaneLayout
from vllm_flexquant.quantize.blocks import BlockModel, Unit
from vllm_flexquant.quantize.gptq import dequantize_codes
from vllm_flexquant.quantize.rtn import QuantizedWeight

Widths = Mapping[str, int]
"""Width of units by name; a unit that is absent keeps the weights of the checkpoint."""

Advance = Callable[[int], None]
"""Called with the number of blocks done."""

OUTPUT = "lm_head"

_BATCH_TOKENS = 2048
_LOGIT_TOKENS = 512


@dataclass
class NestedWeights:
    """Codes and scales of layers, by name of the layer; those of a block are read as it is used.

    read: called with a block's number, or -1 for the output layer; returns codes, scales and group
    size of each of its layers.
    """

    layout: PlaneLayout
    read: Callable[[int], Mapping[str, tuple[QuantizedWeight, int]]]


@dataclass
class _Shared:
    """Hidden states of choices that have been the same so far."""

    hidden: list[torch.Tensor]
    members: list[int] = field(default_factory=list)


def divergence(
    model: BlockModel,
    weights: NestedWeights,
    units: Sequence[Sequence[Unit]],
    tokens: torch.Tensor,
    choices: Sequence[Widths],
    advance: Advance | None = None,
) -> torch.Tensor:
    """KL(reference || choice) in nats of every token, fp32 [choices, sequences * length].

    Args:
        units: of each block.
        tokens: int64 [sequences, length].
        choices: widths of units; `{}` is the reference itself.
    """
    batches = list(tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1])))
    everything = [{}, *choices]
    with torch.inference_mode():
        start = [model.embed(batch) for batch in batches]
        groups = [_Shared(start, list(range(len(everything))))]
        for index in range(len(model)):
            groups = _through_block(
                model, index, weights, units[index], batches, everything, groups
            )
            if advance:
                advance(index + 1)
        return _compare(model, weights, batches, everything, groups)


def _through_block(
    model: BlockModel,
    index: int,
    weights: NestedWeights,
    units: Sequence[Unit],
    batches: Sequence[torch.Tensor],
    choices: Sequence[Widths],
    groups: Sequence[_Shared],
) -> list[_Shared]:
    after = []
    with model.loaded(index):
        layers = dict(model.linears(index))
        swap = Swap(layers, weights, index, units)
        for group in groups:
            split: dict[tuple[int | None, ...], list[int]] = {}
            for member in group.members:
                key = tuple(choices[member].get(unit.name) for unit in units)
                split.setdefault(key, []).append(member)
            for key, members in split.items():
                swap.use(key)
                hidden = []
                for batch, given in zip(batches, group.hidden, strict=True):
                    model.match(batch)
                    hidden.append(model.run(index, given))
                after.append(_Shared(hidden, members))
    return after


class Swap:
    """Puts weights of some width into the layers of a block, and the checkpoint's back."""

    def __init__(
        self,
        layers: Mapping[str, torch.nn.Linear],
        weights: NestedWeights,
        index: int,
        units: Sequence[Unit],
    ) -> None:
        self.layers, self.units, self.layout = layers, units, weights.layout
        self.original = {n: layer._parameters["weight"] for n, layer in layers.items()}
        self.read, self.index = weights.read, index
        self.stored: Mapping[str, tuple[QuantizedWeight, int]] | None = None
        self.made: dict[tuple[str, int], torch.nn.Parameter] = {}

    def use(self, widths: Sequence[int | None]) -> None:
        for unit, width in zip(self.units, widths, strict=True):
            for name in unit.members:
                parameter = self.original[name] if width is None else self._at(name, width)
                self.layers[name]._parameters["weight"] = parameter

    def _at(self, name: str, width: int) -> torch.nn.Parameter:
        if (name, width) not in self.made:
            if self.stored is None:
                self.stored = self.read(self.index)
            quantized, group_size = self.stored[name]
            weight = dequantize_codes(quantized, self.layout, group_size, width)
            device = self.original[name].device
            self.made[name, width] = torch.nn.Parameter(weight.to(device), requires_grad=False)
        return self.made[name, width]


def _compare(
    model: BlockModel,
    weights: NestedWeights,
    batches: Sequence[torch.Tensor],
    choices: Sequence[Widths],
    groups: Sequence[_Shared],
) -> torch.Tensor:
    result: list[list[torch.Tensor]] = [[] for _ in choices]
    found = next((i, g) for i, g in enumerate(groups) if 0 in g.members)[1]
    outputs: dict[int | None, torch.Tensor | None] = {None: None}
    for width in {choice.get(OUTPUT) for choice in choices} - {None}:
        assert width is not None
        quantized, group_size = weights.read(-1)[OUTPUT]
        outputs[width] = dequantize_codes(quantized, weights.layout, group_size, width)
    for b, batch in enumerate(batches):
        for rows in torch.arange(len(batch)).split(max(1, _LOGIT_TOKENS // batch.shape[1])):
            truth = _log_softmax(model, batch[rows], found.hidden[b][rows], None)
            probability = truth.exp()
            for group in groups:
                done: dict[int | None, torch.Tensor] = {}
                for member in group.members:
                    width = choices[member].get(OUTPUT)
                    if width not in done:
                        served = _log_softmax(
                            model, batch[rows], group.hidden[b][rows], outputs[width]
                        )
                        kl = (probability * (truth - served)).sum(-1)
                        done[width] = kl.flatten().cpu()
                    result[member].append(done[width])
    return torch.stack([torch.cat(parts) for parts in result[1:]])


def _log_softmax(
    model: BlockModel,
    tokens: torch.Tensor,
    hidden: torch.Tensor,
    output_weight: torch.Tensor | None,
) -> torch.Tensor:
    return torch.log_softmax(model.logits(tokens, hidden, output_weight), dim=-1)


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean and standard error of tokens [..., tokens], taken for independent."""
    return float(values.mean()), float(values.std() / max(values.numel(), 1) ** 0.5)


def uniform(units: Iterator[Unit] | Sequence[Unit], width: int) -> dict[str, int]:
    """All units at one width."""
    return {unit.name: width for unit in units}
