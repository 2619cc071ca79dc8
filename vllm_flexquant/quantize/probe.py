# SPDX-License-Identifier: Apache-2.0
"""The probe: a linear map of one hidden state that tells which tokens need precision.

For each candidate block in the first third, ridge regression in closed form from what its first
linear layer is given to the log of the token's KL. The score of a token is exp(w·x + b), its
expected KL over that of the average token. The block is chosen by what a policy of two levels would
reach with it on text that it was not fitted to: the half of the tokens that score lowest run at the
low level, and the KL is compared with that of choosing the half at random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_flexquant.quantize.blocks import Unit
from vllm_flexquant.quantize.evaluate import NestedModel, Swap
from vllm_flexquant.quantize.sensitivity import rank_correlation

LOW_SHARE = 0.5
"""Share of tokens that run at the low level."""

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge strengths tried, times the number of tokens; features are standardised."""

_FLOOR = 1e-7
"""Nats: below it KL is rounding noise, whose logarithm says nothing."""

_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Probe:
    """`score(x) = exp(weight · x + bias)`, mean 1 over the tokens of the fit.

    block: whose first linear layer's input it reads. relative_kl: KL of the two-level policy over
    that of a random half, on text kept from the fit. correlation: Spearman's, of score and KL.
    """

    block: int
    weight: torch.Tensor
    bias: float
    relative_kl: float
    correlation: float

    def score(self, inputs: torch.Tensor) -> torch.Tensor:
        """fp32 [tokens, H] -> fp32 [tokens]."""
        return torch.exp(inputs.float() @ self.weight + self.bias)


def candidates(blocks: int) -> list[int]:
    """The first third, the first block among them."""
    return list(range(max(1, blocks // 3 + 1)))


def inputs_of_blocks(
    nested: NestedModel,
    tokens: torch.Tensor,
    widths: Mapping[str, int],
    blocks: Sequence[int],
    advance: Callable[[int], None] | None = None,
) -> dict[int, torch.Tensor]:
    """What the first unit of each of `blocks` is given, fp32 [tokens, H] on the CPU."""
    batches = list(tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1])))
    found: dict[int, list[torch.Tensor]] = {index: [] for index in blocks}
    model, units = nested.model, nested.units
    with torch.inference_mode():
        hidden = [model.embed(batch) for batch in batches]
        for index in range(max(blocks) + 1):
            with model.loaded(index):
                Swap(nested, index).use([widths.get(unit.name) for unit in units[index]])

                def keep(_: Unit, given: torch.Tensor, index: int = index) -> None:
                    found[index].append(given.flatten(0, -2).float().cpu())

                watched = units[index][:1] if index in found else []
                with model.watching(index, watched, keep):
                    for b, batch in enumerate(batches):
                        model.match(batch)
                        hidden[b] = model.run(index, hidden[b])
            if advance:
                advance(index + 1)
    return {index: torch.cat(parts) for index, parts in found.items() if parts}


def two_level_kl(score: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> float:
    """KL when the tokens that score lowest run low, over that when as many at random do.

    Args:
        score, low, high: fp32 [tokens]; low and high are the KL of each token at the two levels.
    """
    runs_low = torch.zeros(len(score), dtype=torch.bool)
    runs_low[score.argsort()[: round(len(score) * LOW_SHARE)]] = True
    share = float(runs_low.float().mean())
    policy = torch.where(runs_low, low, high).mean()
    return float(policy / (share * low.mean() + (1 - share) * high.mean()))


def fit(
    inputs: Mapping[int, torch.Tensor],
    low: torch.Tensor,
    high: torch.Tensor,
    fitted: torch.Tensor,
) -> list[Probe]:
    """A probe for each block, the best first.

    Args:
        inputs: fp32 [tokens, H] by block.
        low, high: fp32 [tokens], KL of each token at two levels.
        fitted: bool [tokens], those to fit to; the others choose the ridge and rank the blocks.

    Raises:
        ValueError: all tokens are fitted, or none.
    """
    if bool(fitted.all()) or not bool(fitted.any()):
        raise ValueError("a probe needs tokens to fit to and others to be judged by")
    wanted = torch.log(low.clamp_min(_FLOOR)).double()
    probes = [
        _fit_block(block, given, wanted, low, high, fitted) for block, given in inputs.items()
    ]
    return sorted(probes, key=lambda probe: probe.relative_kl)


def _fit_block(
    block: int,
    given: torch.Tensor,
    wanted: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    fitted: torch.Tensor,
) -> Probe:
    """With the ridge whose squared error on tokens that are not fitted is least."""
    held = ~fitted
    mean, std = given[fitted].mean(0), given[fitted].std(0).clamp_min(1e-6)
    features = ((given - mean) / std).double()
    x, centre = features[fitted], wanted[fitted].mean()
    gram, pull = x.T @ x, x.T @ (wanted[fitted] - centre)
    identity = torch.eye(len(gram), dtype=gram.dtype)
    solutions = [torch.linalg.solve(gram + r * len(x) * identity, pull) for r in _RIDGES]
    errors = [
        float((features[held] @ solution + centre - wanted[held]).square().mean())
        for solution in solutions
    ]
    weight = (solutions[errors.index(min(errors))] / std.double()).float()
    raw = given @ weight
    bias = float(fitted.sum().log()) - float(torch.logsumexp(raw[fitted].double(), 0))
    return Probe(
        block,
        weight,
        bias,
        two_level_kl(raw[held], low[held], high[held]),
        rank_correlation(raw[held].tolist(), low[held].tolist()),
    )
