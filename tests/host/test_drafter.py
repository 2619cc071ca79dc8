# SPDX-License-Identifier: Apache-2.0
"""How drafts are drawn; the rest of the drafter needs an engine (tests/e2e)."""

from types import SimpleNamespace

import pytest
import torch

from vllm_flexquant.host.drafter import SelfDrafter


def draw(logits, temperature, probabilistic=True, rows=None):
    drafter = SimpleNamespace(_enable_probabilistic_draft_probs=probabilistic)
    sampling = SimpleNamespace(
        temperature=temperature, all_greedy=temperature is None or not temperature.any()
    )
    return SelfDrafter._draw(drafter, logits, sampling, rows or list(range(len(logits))))


def test_greedy_requests_get_the_most_likely_token():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    for temperature, probabilistic in (
        (None, True),
        (torch.zeros(2), True),
        (torch.ones(2), False),
    ):
        tokens, chances = draw(logits, temperature, probabilistic)
        assert tokens.tolist() == [1, 0]
        assert chances is None


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_what_the_rejection_sampler_is_told(temperature):
    torch.manual_seed(0)
    row = torch.tensor([1.0, -torch.inf, 0.0, 2.0, -1.0], dtype=torch.bfloat16)
    count = 40_000
    tokens, chances = draw(row.expand(count, -1), torch.full((count,), temperature))
    expected = (row.float() / temperature).softmax(-1)
    assert torch.allclose(chances[0], expected)
    found = torch.bincount(tokens, minlength=5) / count
    assert found[1] == 0
    error = (expected * (1 - expected) / count).sqrt()
    assert ((found - expected).abs() <= 4.5 * error).all()


def test_a_batch_may_hold_both_kinds_and_rows_may_be_left_out():
    logits = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    temperature = torch.tensor([1.0, 0.0, 0.0])
    tokens, chances = draw(logits, temperature, rows=[1, 2])
    assert tokens.tolist() == [0, 1]
    assert chances.shape == (2, 2)
