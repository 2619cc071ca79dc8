# SPDX-License-Identifier: Apache-2.0
"""What each unit's width costs: KL of the model's output in nats per token.

Measured for one choice it takes a pass through all blocks after the unit. For all of them there is
an estimate at the price of one backward pass. With g the gradient of the log-likelihood of tokens
drawn from the model itself with respect to a layer's output, and d what a width changes in that
output, KL is E[(g·d)²] / 2 to second order (the Fisher information is the Hessian of KL). Here the
terms of different tokens are taken for uncorrelated, which makes the estimate far less noisy and
somewhat too small; how well it ranks is reported beside it (`rank_correlation`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from vllm_flexquant.quantize.blocks import BlockModel
from vllm_flexquant.quantize.evaluate import NestedModel, mean_and_error

_BATCH_TOKENS = 1024


Terms = dict[tuple[str, int], torch.Tensor]
"""By unit and width: the estimate's term of each token in nats, fp32 [tokens]."""


@dataclass(frozen=True)
class Cost:
    """KL in nats per token with its standard error over tokens."""

    kl: float
    error: float


def estimate(
    nested: NestedModel,
    tokens: torch.Tensor,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> dict[str, dict[int, Cost]]:
    """Second-order estimate for each unit of the blocks at each width, all others unquantized.

    Args:
        tokens: int64 [sequences, length], held-back text.
        seed: of the tokens that are drawn from the model.
    """
    return summarize([per_token(nested, list(enumerate(cut(tokens), seed)), advance)])


def cut(tokens: torch.Tensor) -> list[torch.Tensor]:
    """Batches of `tokens` [sequences, length] whose terms do not depend on each other."""
    return list(tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1])))


def per_token(
    nested: NestedModel,
    seeded: Sequence[tuple[int, torch.Tensor]],
    advance: Callable[[int], None] | None = None,
) -> Terms:
    """The estimate's terms for batches of `cut`, each with the seed of what is drawn for it."""
    model = nested.model
    batches = [batch for _, batch in seeded]
    given = _forward(model, batches)
    gradients = [
        _output_gradient(model, batch, hidden, torch.Generator(model.device).manual_seed(seed))
        for (seed, batch), hidden in zip(seeded, given.pop(), strict=True)
    ]
    terms: Terms = {}
    for index in reversed(range(len(model))):
        with model.loaded(index):
            found, gradients = _block_terms(nested, index, batches, given.pop(), gradients)
        terms |= found
        if advance:
            advance(len(model) - index)
    return terms


def summarize(parts: Sequence[Terms]) -> dict[str, dict[int, Cost]]:
    """Costs by unit and width, from the terms of all batches in their order."""
    costs: dict[str, dict[int, Cost]] = {}
    for name, width in parts[0]:
        values = torch.cat([part[name, width] for part in parts])
        costs.setdefault(name, {})[width] = Cost(*mean_and_error(values))
    return costs


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, for values without ties."""
    if len(first) < 2:
        return float("nan")
    ranks = [torch.argsort(torch.argsort(torch.tensor(v))).double() for v in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _forward(model: BlockModel, batches: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """What each block is given, and at the end what the last one returns, by batch, on the CPU."""
    with torch.no_grad():
        given = [[model.embed(batch).cpu() for batch in batches]]
        for index in range(len(model)):
            with model.loaded(index):
                after = []
                for batch, hidden in zip(batches, given[-1], strict=True):
                    model.match(batch)
                    after.append(model.run(index, hidden.to(model.device)).cpu())
            given.append(after)
    return given


def _output_gradient(
    model: BlockModel, batch: torch.Tensor, hidden: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Of the log-likelihood of tokens drawn from the model, by the last block's output."""
    hidden = hidden.to(model.device).requires_grad_(True)
    with torch.enable_grad():
        likelihood = torch.log_softmax(model.logits(batch, hidden), dim=-1)
        drawn = torch.multinomial(
            likelihood.detach().exp().flatten(0, 1), 1, generator=generator
        ).unflatten(0, batch.shape)
        (gradient,) = torch.autograd.grad(likelihood.gather(-1, drawn).sum(), hidden)
    return gradient


def _block_terms(
    nested: NestedModel,
    index: int,
    batches: Sequence[torch.Tensor],
    given: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
) -> tuple[Terms, list[torch.Tensor]]:
    """Terms of a block's units, and the gradients by what the block is given."""
    model, units = nested.model, nested.units[index]
    layers = dict(model.linears(index))
    changes = _changes(nested, index, layers)
    values: dict[tuple[str, int], list[torch.Tensor]] = {}
    before = []
    for batch, hidden, gradient in zip(batches, given, gradients, strict=True):
        inputs: dict[str, torch.Tensor] = {}
        outputs: dict[str, torch.Tensor] = {}
        hidden = hidden.to(model.device).requires_grad_(True)
        with ExitStack() as stack, torch.enable_grad():
            for unit in units:
                for name in unit.members:
                    handle = layers[name].register_forward_hook(_keep(name, inputs, outputs))
                    stack.callback(handle.remove)
            model.match(batch)
            out = model.run(index, hidden)
            names = list(outputs)
            found = torch.autograd.grad(out, [hidden, *(outputs[n] for n in names)], gradient)
        before.append(found[0])
        by_name = dict(zip(names, found[1:], strict=True))
        with torch.no_grad():
            for unit in units:
                for width in nested.layout.widths:
                    moved = sum(
                        (torch.nn.functional.linear(inputs[n], changes[n, width]) * by_name[n]).sum(
                            -1
                        )
                        for n in unit.members
                    )
                    assert isinstance(moved, torch.Tensor)
                    half = moved.square().flatten() / 2
                    values.setdefault((unit.name, width), []).append(half.cpu())
    return {key: torch.cat(parts) for key, parts in values.items()}, before


def _keep(
    name: str, inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]
) -> Callable[..., None]:
    def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        inputs[name], outputs[name] = args[0].detach(), output

    return hook


def _changes(
    nested: NestedModel, index: int, layers: Mapping[str, torch.nn.Linear]
) -> dict[tuple[str, int], torch.Tensor]:
    """Weights at each width minus those of the checkpoint, fp32 [N, K]."""
    stored = nested.read(index)
    result = {}
    for name in (n for unit in nested.units[index] for n in unit.members):
        for width in nested.layout.widths:
            at = stored[name].dequantize(nested.layout, width)
            result[name, width] = at.to(layers[name].weight.device) - layers[name].weight
    return result
