# SPDX-License-Identifier: Apache-2.0
"""The probe: a linear map of one hidden state that tells which tokens need precision.

The score of a token is exp(w·x + b), its expected KL over that of the average token; what is
expected is the mean over some levels of the ladder. For each candidate block in the first third, w
is fitted to what the block's first linear layer is given: ridge regression in closed form to the
log of the KL, then gamma regression from there, with the same ridge (McCullagh and Nelder,
Generalized Linear Models, chapter 8). The mean of the log says little of the mean, which rare
tokens make up, and it is the mean that a policy spends.

The block is chosen by what a policy of two levels would reach with it on text that it was not
fitted to: the half of the tokens that score lowest run at the low level, and the KL is compared
with that of choosing the half at random.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from vllm_flexquant.quantize.blocks import Unit
from vllm_flexquant.quantize.evaluate import NestedModel, Swap
from vllm_flexquant.quantize.sensitivity import rank_correlation

LOW_SHARE = 0.5
"""Share of tokens that run at the low level."""

_RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Ridge strengths tried, times the number of tokens; features are standardised."""

_FLOOR = 1e-4
"""Of the mean KL: below it a token's KL is rounding noise, whose logarithm says nothing."""

_STEPS = 30
_ENOUGH = 1e-5
_LEAST_STEP = 1e-3
"""Most steps of gamma regression, the gain in deviance below which it ends, the shortest step."""

_PARTS = 4
"""Of the fitted tokens, for `ProbeFit.tempered`."""

_TEMPERS = tuple(n / 20 for n in range(4, 21))
"""Powers of the score that are tried."""

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
    nested: NestedModel, tokens: torch.Tensor, widths: Mapping[str, int], blocks: Sequence[int]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Each of `blocks`, ascending, and what its first unit is given, fp32 [tokens, H] on the CPU.

    One at a time, so that they need not fit into memory together.
    """
    batches = list(tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1])))
    model, units = nested.model, nested.units
    with torch.inference_mode():
        hidden = [model.embed(batch) for batch in batches]
    for index in range(max(blocks) + 1):
        found: list[torch.Tensor] = []

        def keep(_: Unit, given: torch.Tensor, found: list[torch.Tensor] = found) -> None:
            found.append(given.flatten(0, -2).float().cpu())

        watched = units[index][:1] if index in blocks else []
        with torch.inference_mode(), model.loaded(index):
            Swap(nested, index).use([widths.get(unit.name) for unit in units[index]])
            with model.watching(index, watched, keep):
                for b, batch in enumerate(batches):
                    model.match(batch)
                    hidden[b] = model.run(index, hidden[b])
        if found:
            yield index, torch.cat(found)


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


class ProbeFit:
    """Fits probes to some tokens and judges them by others.

    Args:
        low, high: fp32 [tokens], KL of each token at the two levels of the policy; a probe tells
            the mean of both, each relative to its own mean.
        fitted: bool [tokens], those to fit to; the others choose the ridge and judge.

    Raises:
        ValueError: all tokens are fitted, or none.
    """

    def __init__(self, low: torch.Tensor, high: torch.Tensor, fitted: torch.Tensor) -> None:
        if bool(fitted.all()) or not bool(fitted.any()):
            raise ValueError("a probe needs tokens to fit to and others to be judged by")
        kl = torch.stack([low, high]).clamp_min(0).double()
        relative = (kl / kl.mean(-1, keepdim=True)).mean(0).clamp_min(_FLOOR)
        self.relative = relative / relative[fitted].mean()
        self.low, self.high, self.fitted = low, high, fitted

    def probe(self, block: int, given: torch.Tensor) -> Probe:
        """The probe of `block`, whose first layer is given fp32 [tokens, H].

        Of the ridges tried, it has the one with the least deviance on the tokens not fitted.
        """
        fitted, held = self.fitted, ~self.fitted
        weight = self._solve(given, fitted, held)
        raw = given @ weight
        return Probe(
            block,
            weight,
            self._bias(raw, fitted),
            two_level_kl(raw[held], self.low[held], self.high[held]),
            rank_correlation(raw[held].tolist(), self.low[held].tolist()),
        )

    def tempered(self, probe: Probe, given: torch.Tensor) -> Probe:
        """`probe` with the spread of scores that text unlike the fitted one bears out, and mean 1
        over what was not fitted to.

        Args:
            given: fp32 [tokens, H], what the probe was made from.
        """
        places = self.fitted.nonzero()[:, 0]
        logs, wanted = [], []
        for part in places.chunk(_PARTS):
            judged = torch.zeros_like(self.fitted)
            judged[part] = True
            weight = self._solve(given, self.fitted & ~judged, judged)
            raw = (given[part] @ weight).double()
            logs.append(raw - torch.logsumexp(raw, 0))
            wanted.append(self.relative[part] / self.relative[part].mean())
        log, need = torch.cat(logs), torch.cat(wanted)
        power = min(_TEMPERS, key=lambda t: _deviance(t * log, need))
        weight = probe.weight * power
        return replace(probe, weight=weight, bias=self._bias(given @ weight, ~self.fitted))

    def _solve(
        self, given: torch.Tensor, fitted: torch.Tensor, judged: torch.Tensor
    ) -> torch.Tensor:
        """Weight of the probe fitted to some tokens, with the ridge that judges others best."""
        mean, std = given[fitted].mean(0), given[fitted].std(0).clamp_min(1e-6)
        regression = _GammaRegression(
            ((given[fitted] - mean) / std).double(), self.relative[fitted]
        )
        features, wanted = ((given[judged] - mean) / std).double(), self.relative[judged]
        solutions = {ridge: regression.solve(ridge) for ridge in _RIDGES}
        best = min(solutions, key=lambda r: _deviance(features @ solutions[r], wanted))
        return (solutions[best] / std.double()).float()

    @staticmethod
    def _bias(raw: torch.Tensor, over: torch.Tensor) -> float:
        """What makes the mean of exp(raw + b) over some tokens 1."""
        return float(over.sum().log()) - float(torch.logsumexp(raw[over].double(), 0))


class _GammaRegression:
    """`wanted`, fp64 [tokens], is exp(features · w + b) in the mean, with an error of its size.

    The information matrix of this likelihood does not depend on w: it is that of ridge regression.
    """

    def __init__(self, features: torch.Tensor, wanted: torch.Tensor) -> None:
        self.features, self.wanted = features, wanted
        self.log = torch.log(wanted)
        self.gram = features.T @ features / len(features)

    def solve(self, ridge: float) -> torch.Tensor:
        """w, fp64 [H], by Fisher scoring; each step is halved until it gains."""
        identity = torch.eye(len(self.gram), dtype=self.gram.dtype)
        factor = torch.linalg.cholesky(self.gram + ridge * identity)

        def ridge_regression(pull: torch.Tensor) -> torch.Tensor:
            return torch.cholesky_solve(pull.unsqueeze(1), factor).squeeze(1)

        def loss(w: torch.Tensor) -> float:
            return _deviance(self.features @ w, self.wanted) + ridge * float(w @ w) / 2

        w = ridge_regression(self._pull(self.log - self.log.mean()))
        least = loss(w)
        for _ in range(_STEPS):
            expected = self.features @ w
            bias = _bias(expected, self.wanted)
            excess = self.wanted * torch.exp(-expected - bias) - 1
            step = ridge_regression(self._pull(excess) - ridge * w)
            size = 1.0
            while (found := loss(w + size * step)) >= least and size > _LEAST_STEP:
                size /= 2
            gain = least - found
            if gain > 0:
                w, least = w + size * step, found
            if gain < _ENOUGH:
                break
        return w

    def _pull(self, target: torch.Tensor) -> torch.Tensor:
        return self.features.T @ target / len(self.features)


def _bias(raw: torch.Tensor, wanted: torch.Tensor) -> float:
    """The best b for exp(raw + b) as the mean of `wanted`."""
    return float(torch.logsumexp(torch.log(wanted) - raw, 0)) - math.log(len(raw))


def _deviance(raw: torch.Tensor, wanted: torch.Tensor) -> float:
    """Minus the log-likelihood a token of a gamma distribution, with the best b, up to a constant.

    With that b, the mean of wanted / exp(raw + b) is 1 and drops out.
    """
    return float(raw.mean()) + _bias(raw, wanted)
