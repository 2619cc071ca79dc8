# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vllm_flexquant.quantize.probe import candidates, fit, two_level_kl


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


def test_the_block_that_tells_is_chosen(tokens):
    inputs, low, high, fitted = tokens
    found = fit(inputs, low, high, fitted)
    assert [probe.block for probe in found] == [1, 2, 0]
    best = found[0]
    assert best.relative_kl < found[1].relative_kl < 0.5
    assert found[2].relative_kl > 0.9
    assert best.correlation > 0.9


def test_scores_are_expected_kl_relative_to_the_average_token(tokens):
    inputs, low, high, fitted = tokens
    best = fit(inputs, low, high, fitted)[0]
    score = best.score(inputs[1])
    assert float(score[fitted].mean()) == pytest.approx(1.0, rel=1e-3)
    upper = score > score.median()
    ratio = float(low[upper].mean() / low.mean())
    assert float(score[upper].mean()) == pytest.approx(ratio, rel=0.15)


def test_two_levels_by_an_oracle_by_chance_and_by_the_opposite():
    low, high = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4)
    assert two_level_kl(low, low, high) == pytest.approx(3 / 5)
    assert two_level_kl(-low, low, high) == pytest.approx(7 / 5)
    assert two_level_kl(low, low, low) == pytest.approx(1.0)


def test_tokens_to_fit_to_and_to_judge_by_are_both_needed(tokens):
    inputs, low, high, fitted = tokens
    for bad in (torch.ones_like(fitted), torch.zeros_like(fitted)):
        with pytest.raises(ValueError, match="tokens to fit to and others to be judged by"):
            fit(inputs, low, high, bad)


def test_candidates_are_the_first_third():
    assert candidates(30) == list(range(11))
    assert candidates(1) == [0]
