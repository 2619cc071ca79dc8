# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.quality.reference import (
    PlanesLinear,
    linear_weights,
    planes_reference,
    use_planes,
    write_reference,
)
from benchmarks.quality.sequences import TokenSequence


class Tiny(torch.nn.Module):
    """Next-token logits from the token alone; enough to be a language model here."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(vocab_size=20)
        self.embed = torch.nn.Embedding(20, 64)
        self.inner = torch.nn.Linear(64, 64)
        self.odd = torch.nn.Linear(64, 20)
        self.lm_head = torch.nn.Linear(20, 20, bias=False)  # no group size divides 20

    def forward(self, tokens, use_cache):
        return SimpleNamespace(logits=self.lm_head(self.odd(self.inner(self.embed(tokens)).tanh())))


SEQUENCES = [TokenSequence("a", [1, 2], [3, 4, 5]), TokenSequence("b", [6], [7, 8])]


@pytest.fixture
def progress():
    return Progress(console=Console(quiet=True))


def test_rows_predict_the_forced_tokens(tmp_path, progress):
    model = Tiny()
    rows = write_reference(model, SEQUENCES, tmp_path, progress)
    assert rows.shape == (5, 20)
    with torch.inference_mode():
        after_two = model(torch.tensor([[2]]), use_cache=False).logits[0, 0].log_softmax(-1)
    np.testing.assert_allclose(rows[0], after_two.numpy(), rtol=1e-4, atol=1e-5)
    assert linear_weights(model) == 64 * 64 + 64 * 20 + 20 * 20


def test_more_bits_are_closer_and_int8_activations_cost_something(tmp_path, progress):
    model = Tiny()
    rows = write_reference(model, SEQUENCES, tmp_path, progress)
    results = planes_reference(model, rows, SEQUENCES, [4, 8], torch.float32, progress)
    assert isinstance(model.inner, PlanesLinear)
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert len(results["4"]["float"]["kl"]) == 3  # position 0 is not scored
    assert sum(results["8"]["float"]["kl"]) < sum(results["4"]["float"]["kl"]) / 10
    assert results["8"]["int8"]["kl"] != results["8"]["float"]["kl"]


def test_planes_at_8_bits_are_the_layer(progress):
    model = Tiny()
    before = model.inner.weight.detach().clone()
    (inner, odd) = use_planes(model, torch.float32, progress)
    inner.set_width(8)
    step = (before.amax() - before.amin()) / 255
    assert (inner.weight - before).abs().max() < step
    assert odd.rows == 20
