# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vllm_flexquant.quantize.probe import ProbeFit, candidates, two_level_kl


@pytest.fixture(scope="module")
def tokens():
    """KL whose logarithm block 1 tells well, block 2 badly and block 0 not at all."""
    generator = torch.Generator().manual_seed(0)
    count, size = 3000, 24
    inputs = {b: torch.randn(count, size, generator=generator) for b in range(3)}
    inputs[1] = inputs[1] * torch.logspace(0, 2, size) + 5
    signal = (inputs[1] - 5) / torch.logspace(0, 2, size) @ torch.randn(size, generator=generator)
    inputs[2][:, 0] = signal / 4 + torch.randn(count, generator=generator)
    low = torch.exp(signal / 3 + torch.randn(count, generator=generator) / 4) * 0.1
    fitted = torch.arange(count) % 4 != 3
    return inputs, low, low / 10, fitted


def test_the_block_that_tells_has_the_least_kl(tokens):
    inputs, low, high, fitted = tokens
    fit = ProbeFit(low, high, fitted)
    nothing, best, some = (fit.probe(block, inputs[block]) for block in range(3))
    assert [probe.block for probe in (nothing, best, some)] == [0, 1, 2]
    assert best.relative_kl < some.relative_kl < 0.5
    assert nothing.relative_kl > 0.9
    assert best.correlation > 0.9


def test_scores_are_expected_kl_relative_to_the_average_token(tokens):
    inputs, low, high, fitted = tokens
    score = ProbeFit(low, high, fitted).probe(1, inputs[1]).score(inputs[1])
    assert float(score[fitted].mean()) == pytest.approx(1.0, rel=1e-3)
    upper = score > score.median()
    ratio = float(low[upper].mean() / low.mean())
    assert float(score[upper].mean()) == pytest.approx(ratio, rel=0.05)


def test_scores_tell_the_mean_where_the_mean_of_the_log_would_not():
    """Two kinds of tokens: one has twice the mean KL of the other, in rare large errors."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(20000) % 2
    rare = torch.rand(20000, generator=generator) < 0.05
    low = torch.where(kind == 0, torch.ones(20000), torch.where(rare, 40.0, 0.01))
    inputs = kind.float().unsqueeze(1) + torch.randn(20000, 1, generator=generator) / 100
    fitted = torch.arange(20000) % 5 != 4
    score = ProbeFit(low, low / 10, fitted).probe(0, inputs).score(inputs)
    ratio = float(low[kind == 1].mean() / low[kind == 0].mean())
    assert ratio > 1.7
    assert float(score[kind == 1].mean() / score[kind == 0].mean()) == pytest.approx(ratio, rel=0.1)


def test_both_levels_count_whatever_their_kl(tokens):
    inputs, low, _, fitted = tokens
    other = low.flip(0)
    weights = [
        ProbeFit(low, other * scale, fitted).probe(1, inputs[1]).weight for scale in (1, 0.001)
    ]
    alone = ProbeFit(low, low, fitted).probe(1, inputs[1]).weight
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(weights[0], alone, rtol=0.1)


def test_a_token_without_kl_and_an_input_that_is_always_the_same(tokens):
    inputs, low, high, fitted = tokens
    low = low.clone()
    low[::7] = -1e-9  # rounding noise
    given = torch.cat([inputs[1], torch.ones(len(low), 1)], 1)
    probe = ProbeFit(low, high, fitted).probe(1, given)
    assert torch.isfinite(probe.weight).all()
    assert probe.relative_kl < 0.6


def test_two_levels_by_an_oracle_by_chance_and_by_the_opposite():
    low, high = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4)
    assert two_level_kl(low, low, high) == pytest.approx(3 / 5)
    assert two_level_kl(-low, low, high) == pytest.approx(7 / 5)
    assert two_level_kl(low, low, low) == pytest.approx(1.0)


def test_tokens_to_fit_to_and_to_judge_by_are_both_needed(tokens):
    _, low, high, fitted = tokens
    for bad in (torch.ones_like(fitted), torch.zeros_like(fitted)):
        with pytest.raises(ValueError, match="tokens to fit to and others to be judged by"):
            ProbeFit(low, high, bad)


def test_candidates_are_the_first_third():
    assert candidates(30) == list(range(11))
    assert candidates(1) == [0]
