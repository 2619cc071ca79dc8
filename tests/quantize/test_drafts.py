# SPDX-License-Identifier: Apache-2.0
from itertools import chain

import pytest
import torch

from vllm_flexquant.format import PlaneLayout
from vllm_flexquant.format.checkpoint import OUTPUT_LAYER
from vllm_flexquant.format.record import RungRecord
from vllm_flexquant.quantize.bins import BIN_NATS, BINS
from vllm_flexquant.quantize.blocks import BlockModel
from vllm_flexquant.quantize.drafts import draft_levels, measure_drafts
from vllm_flexquant.quantize.evaluate import OUTPUT_INDEX, NestedModel
from vllm_flexquant.quantize.parallel import Local
from vllm_flexquant.quantize.rtn import quantize_rtn

LAYOUT = PlaneLayout()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(2, 90, (12, 64), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def nested(tiny_model, tokens):
    model, units, stored = BlockModel(tiny_model), [], {}
    for index in range(len(model)):
        with model.loaded(index):
            units.append(model.units(index, model.embed(tokens[:1])))
            stored[index] = {n: quantize_rtn(m.weight, LAYOUT, 64) for n, m in model.linears(index)}
    output = model.model.get_output_embeddings().weight.data
    stored[OUTPUT_INDEX] = {OUTPUT_LAYER: quantize_rtn(output, LAYOUT, 64)}
    return NestedModel(model, units, LAYOUT, stored.__getitem__)


def at(nested, width, output=8):
    return {unit.name: width for unit in chain(*nested.units)} | {OUTPUT_LAYER: output}


def logits_at(nested, whole, tokens, widths):
    """Of the whole model with the layers' weights dequantized; the embedding stays as it is."""
    changed = {}
    stored = {
        k: w for i in range(OUTPUT_INDEX, len(nested.units)) for k, w in nested.read(i).items()
    }
    members = {unit.name: unit.members for unit in chain(*nested.units)}
    for unit, width in widths.items():
        for name in members.get(unit, (unit,)):
            changed[f"{name}.weight"] = stored[name].dequantize(LAYOUT, width)
    with torch.inference_mode():
        found = torch.func.functional_call(whole, changed, (tokens,), tie_weights=False).logits
    return found.log_softmax(-1).flatten(0, 1).double()


def by_bin(entropy, values):
    """Ratio of sums, each token counting in other bins by how near they are."""
    number = (entropy / BIN_NATS).long().clamp(0, BINS - 1)
    near = torch.exp(-2.0 * (torch.arange(BINS)[:, None] - number[None, :]).abs().double())
    return (near @ values) / near.sum(1)


def test_acceptance_is_that_of_the_models_with_those_weights(nested, whole, tokens):
    best = at(nested, 8)
    mixed = best | {unit.name: 4 for unit in nested.units[1]}
    levels = {3: mixed, 5: at(nested, 6, output=4), 9: at(nested, 4, output=4)}
    reported = []
    record = measure_drafts(nested, Local(), tokens, best, levels, reported.append)
    assert reported[-1] == 1.0
    assert record.bin_nats == BIN_NATS
    assert [level.steps for level in record.levels] == [3, 5, 9]
    target = logits_at(nested, whole, tokens, best)
    for level, widths in zip(record.levels, levels.values(), strict=True):
        draft = logits_at(nested, whole, tokens, widths)
        entropy = -(draft.exp() * draft).sum(-1)
        kl = (target.exp() * (target - draft)).sum(-1)
        greedy = (target.argmax(-1) == draft.argmax(-1)).double()
        sampled = torch.minimum(target.exp(), draft.exp()).sum(-1)
        assert level.kl_nats == pytest.approx(float(kl.mean()), rel=1e-3, abs=1e-6)
        assert level.mean_greedy == pytest.approx(float(greedy.mean()), abs=1e-6)
        assert level.mean_sampled == pytest.approx(float(sampled.mean()), abs=1e-5)
        number = (entropy / BIN_NATS).long().clamp(0, BINS - 1)
        share = torch.bincount(number, minlength=BINS) / len(number)
        assert level.share == pytest.approx(share.tolist(), abs=1e-6)
        assert level.greedy == pytest.approx(by_bin(entropy, greedy).tolist(), abs=1e-5)
        assert level.sampled == pytest.approx(by_bin(entropy, sampled).tolist(), abs=1e-5)
        assert 0.3 < level.mean_greedy < 1
    assert record.levels[1].mean_sampled > record.levels[2].mean_sampled


def test_the_best_level_keeps_all_that_it_drafts_itself(nested, tokens):
    best = at(nested, 8)
    (level,) = measure_drafts(nested, Local(), tokens, best, {0: best}, lambda _: None).levels
    assert level.kl_nats == 0
    assert level.mean_greedy == 1
    assert set(level.greedy) == {1.0}
    assert level.mean_sampled == pytest.approx(1, abs=1e-6)
    assert level.sampled == pytest.approx([1] * BINS, abs=1e-6)
    assert sum(level.share) == pytest.approx(1)


def rungs(*bits):
    return [
        RungRecord(steps=i, mean_bits=b, bytes_read=1, kl_nats=0.1, measured=True)
        for i, b in enumerate(bits)
    ]


def test_levels_lie_evenly_between_the_cheapest_and_the_best():
    ladder = rungs(*(8 - i / 10 for i in range(41)))
    steps = draft_levels(ladder, 4)
    assert [ladder[n].mean_bits for n in steps] == pytest.approx([7, 6, 5, 4])
    assert len(draft_levels(ladder)) == 6
    # a large layer's step leaves a gap: levels beside it stand for all in it, once
    assert draft_levels(rungs(8, 7.9, 4.1, 4), 4) == [1, 2, 3]
    assert draft_levels(rungs(8, 4)) == [1]
    assert draft_levels(rungs(4)) == []
