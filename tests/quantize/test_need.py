# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vllm_flexquant.planner.figures import without_calibration
from vllm_flexquant.planner.sequences import SequenceEntropy
from vllm_flexquant.planner.state import empty_state
from vllm_flexquant.quantize.bins import BINS
from vllm_flexquant.quantize.need import DECAY, need_of_entropy


def test_need_follows_the_entropy_that_made_it():
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(40_000, generator=generator) * 6
    kl = 0.01 * (0.2 + entropy) * (0.5 + torch.rand(40_000, generator=generator))
    record = need_of_entropy(kl, entropy, 200)
    assert record.by_entropy[12] == pytest.approx(3.325 / 3.2, rel=0.05)
    assert record.by_entropy[2] == pytest.approx(0.825 / 3.2, rel=0.15)
    assert len(record.by_entropy) == len(record.by_average) == BINS
    assert record.by_entropy[-1] > 1.5  # where no token was, that of the nearest
    assert record.by_average[12] == pytest.approx(1.0, rel=0.05)  # tokens do not depend on another


def test_the_average_is_the_engines():
    """Sequences that alternate between two entropies, needs that follow the average before."""
    entropy = torch.tensor([4.0, 0.1] * 50).repeat(3)
    table = torch.zeros(0, dtype=torch.int32)
    state = empty_state(table, without_calibration([1.0]), slots=1, rows=1)
    sequences = SequenceEntropy(state)
    before = []
    for nats in entropy[:100]:
        before.append(float(state.average[0]) if state.seen[0] else None)
        sequences.update(nats.reshape(1).numpy(), torch.tensor([0]).numpy(), DECAY)
    high = [b for b in before[10:] if b > 2]
    kl = torch.tensor([2.0 if (b or 0) > 2 else 1.0 for b in before]).repeat(3)
    record = need_of_entropy(kl, entropy, 100)
    assert record.by_average[int(high[0] / record.bin_nats)] == pytest.approx(4 / 3, rel=0.1)
