# SPDX-License-Identifier: Apache-2.0
"""KL of the model's output when its layers run at given widths: many such choices in one sweep.

Blocks are visited once. Choices that agree on all layers so far share their hidden states, so a
choice that differs from the reference in one layer costs only the blocks from that layer on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from vllm_flexquant.format.checkpoint import OUTPUT_LAYER
from vllm_flexquant.format.layout import PlaneLayout
from vllm_flexquant.quantize.blocks import BlockModel, Unit

Widths = Mapping[str, int]
"""Width of units by name; a unit that is absent keeps the weights of the checkpoint."""

Advance = Callable[[int], None]
"""Called with the number of blocks done."""

Facts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""What is to be known of tokens, fp32 [facts, ...], by log-probabilities and probabilities of the
truth and log-probabilities of a choice, fp32 [..., vocabulary] each."""

OUTPUT_INDEX = -1
"""Stands for the output layer where blocks have numbers."""

_BATCH_TOKENS = 2048
_LOGIT_TOKENS = 512


class Weight(Protocol):
    """A weight that can be had at every width of a layout (`QuantizedWeight`)."""

    def dequantize(self, layout: PlaneLayout, width: int) -> torch.Tensor:
        """fp32 [N, K] at `width` bits."""


@dataclass(frozen=True)
class NestedModel:
    """A model whose units can run at any width of their codes.

    units: of each block. read: called with a block's number or `OUTPUT_INDEX`, when the block is
    used; returns the weights of its layers by name.
    """

    model: BlockModel
    units: Sequence[Sequence[Unit]]
    layout: PlaneLayout
    read: Callable[[int], Mapping[str, Weight]]


@dataclass
class _Shared:
    """Hidden states of choices that have been the same so far."""

    hidden: list[torch.Tensor]
    members: list[int] = field(default_factory=list)


def divergence(
    nested: NestedModel,
    tokens: torch.Tensor,
    choices: Sequence[Widths],
    advance: Advance | None = None,
    with_entropy: bool = False,
) -> torch.Tensor:
    """KL(reference || choice) in nats of every token, fp32 [choices, sequences * length].

    Args:
        tokens: int64 [sequences, length].
        choices: widths of units; `{}` is the reference itself.
        with_entropy: also the entropy of the choice, in nats: [2, choices, sequences * length].
    """
    facts = kl_and_entropy if with_entropy else kl_alone
    found = compare(nested, tokens, choices, facts, advance=advance)
    return found if with_entropy else found[0]


def kl_alone(truth: torch.Tensor, probability: torch.Tensor, served: torch.Tensor) -> torch.Tensor:
    """As `Facts`: KL(truth || choice) in nats."""
    return (probability * (truth - served)).sum(-1).unsqueeze(0)


def kl_and_entropy(
    truth: torch.Tensor, probability: torch.Tensor, served: torch.Tensor
) -> torch.Tensor:
    """As `Facts`: KL(truth || choice), and the entropy of the choice, in nats."""
    (kl,) = kl_alone(truth, probability, served)
    return torch.stack([kl, -(served.exp() * served).sum(-1)])


def compare(
    nested: NestedModel,
    tokens: torch.Tensor,
    choices: Sequence[Widths],
    facts: Facts,
    truth: Widths | None = None,
    advance: Advance | None = None,
) -> torch.Tensor:
    """Facts of every token of each choice, fp32 [facts, choices, sequences * length].

    Args:
        tokens: int64 [sequences, length].
        choices: widths of units.
        truth: the choice that they are compared with; the reference if None.
    """
    batches = cut(tokens)
    everything = [truth or {}, *choices]
    with torch.inference_mode():
        start = [nested.model.embed(batch) for batch in batches]
        groups = [_Shared(start, list(range(len(everything))))]
        for index in range(len(nested.model)):
            groups = _through_block(nested, index, batches, everything, groups)
            if advance:
                advance(index + 1)
        return _facts_of_tokens(nested, batches, everything, groups, facts)


def cut(tokens: torch.Tensor) -> list[torch.Tensor]:
    """Batches of `tokens` [sequences, length] whose KL does not depend on each other."""
    return list(tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1])))


def _through_block(
    nested: NestedModel,
    index: int,
    batches: Sequence[torch.Tensor],
    choices: Sequence[Widths],
    groups: Sequence[_Shared],
) -> list[_Shared]:
    after = []
    model, units = nested.model, nested.units[index]
    with model.loaded(index):
        swap = Swap(nested, index)
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
    """Puts weights of some width into the layers of block `index`, which must be loaded, and the
    checkpoint's back."""

    def __init__(self, nested: NestedModel, index: int) -> None:
        self.nested, self.index = nested, index
        self.layers = dict(nested.model.linears(index))
        self.original = {n: layer._parameters["weight"] for n, layer in self.layers.items()}
        self.stored: Mapping[str, Weight] | None = None
        self.made: dict[tuple[str, int], torch.nn.Parameter] = {}

    def use(self, widths: Sequence[int | None]) -> None:
        """One width for each unit of the block; None is the checkpoint's weight."""
        for unit, width in zip(self.nested.units[self.index], widths, strict=True):
            for name in unit.members:
                parameter = self.original[name] if width is None else self._at(name, width)
                self.layers[name]._parameters["weight"] = parameter

    def _at(self, name: str, width: int) -> torch.nn.Parameter:
        if (name, width) not in self.made:
            if self.stored is None:
                self.stored = self.nested.read(self.index)
            weight = self.stored[name].dequantize(self.nested.layout, width)
            device = self.original[name].device
            self.made[name, width] = torch.nn.Parameter(weight.to(device), requires_grad=False)
        return self.made[name, width]


def _facts_of_tokens(
    nested: NestedModel,
    batches: Sequence[torch.Tensor],
    choices: Sequence[Widths],
    groups: Sequence[_Shared],
    facts: Facts,
) -> torch.Tensor:
    model = nested.model
    result: list[list[torch.Tensor]] = [[] for _ in choices]
    first = next(group for group in groups if 0 in group.members)
    outputs: dict[int | None, torch.Tensor | None] = {None: None}
    if widths := {choice[OUTPUT_LAYER] for choice in choices if OUTPUT_LAYER in choice}:
        stored = nested.read(OUTPUT_INDEX)[OUTPUT_LAYER]
        outputs |= {width: stored.dequantize(nested.layout, width) for width in widths}
    for b, batch in enumerate(batches):
        for rows in torch.arange(len(batch)).split(max(1, _LOGIT_TOKENS // batch.shape[1])):
            output = outputs[choices[0].get(OUTPUT_LAYER)]
            truth = _log_softmax(model, batch[rows], first.hidden[b][rows], output)
            probability = truth.exp()
            for group in groups:
                done: dict[int | None, torch.Tensor] = {}
                for member in group.members:
                    if member == 0:
                        continue
                    width = choices[member].get(OUTPUT_LAYER)
                    if width not in done:
                        served = _log_softmax(
                            model, batch[rows], group.hidden[b][rows], outputs[width]
                        )
                        done[width] = facts(truth, probability, served).flatten(1).cpu()
                    result[member].append(done[width])
    return torch.stack([torch.cat(parts, 1) for parts in result[1:]], 1)


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
