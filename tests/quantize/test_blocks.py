# SPDX-License-Identifier: Apache-2.0
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_flexquant.format import PlaneLayout
from vllm_flexquant.format.checkpoint import OUTPUT_LAYER
from vllm_flexquant.quantize import sensitivity
from vllm_flexquant.quantize.blocks import BlockModel
from vllm_flexquant.quantize.evaluate import OUTPUT_INDEX, NestedModel, divergence
from vllm_flexquant.quantize.rtn import quantize_rtn

LAYOUT = PlaneLayout()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(2, 90, (4, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def blocks(tiny_model):
    return BlockModel(tiny_model)


def all_units(model, tokens):
    found = []
    for index in range(len(model)):
        with model.loaded(index):
            found.append(model.units(index, model.embed(tokens[:1])))
    return found


@pytest.fixture(scope="module")
def nested(blocks, tokens):
    def read(index):
        if index == OUTPUT_INDEX:
            weight = blocks.model.get_output_embeddings().weight.data
            return {OUTPUT_LAYER: quantize_rtn(weight, LAYOUT, 64)}
        with blocks.loaded(index):
            return {n: quantize_rtn(m.weight, LAYOUT, 64) for n, m in blocks.linears(index)}

    stored = {index: read(index) for index in range(OUTPUT_INDEX, len(blocks))}
    return NestedModel(blocks, all_units(blocks, tokens), LAYOUT, stored.__getitem__)


def test_block_by_block_is_the_whole_model(whole, blocks, tokens):
    with torch.inference_mode():
        hidden = blocks.embed(tokens)
        for index in range(len(blocks)):
            with blocks.loaded(index):
                hidden = blocks.run(index, hidden)
        assert torch.equal(blocks.logits(tokens, hidden), whole(tokens).logits)


def test_only_the_block_at_work_has_memory(blocks, tokens):
    blocks.load(1)
    assert not any(p.is_meta for p in blocks.blocks[1].parameters())
    assert all(p.is_meta for p in blocks.blocks[0].parameters())
    blocks.unload(1)
    assert all(p.is_meta for p in blocks.blocks[1].parameters())


def test_layers_with_one_input_are_one_unit(blocks, tokens):
    units = all_units(blocks, tokens)[1]
    names = [[n.rpartition(".")[2] for n in unit.members] for unit in units]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"],
                     ["down_proj"]]  # fmt: skip
    assert units[0].rows == (64, 32, 32)
    assert units[0].weights == 128 * 64
    assert units[0].name == "model.layers.1.self_attn.q_proj"


def test_divergence_is_that_of_the_model_with_those_weights(whole, tokens, nested):
    units = nested.units
    choices = [
        {},
        {units[1][2].name: 4},
        {u.name: 6 for part in units for u in part},
        {u.name: 4 for part in units for u in part} | {OUTPUT_LAYER: 4},
    ]
    found = divergence(nested, tokens, choices)
    assert found.shape == (4, tokens.numel())
    assert found[0].abs().max() == 0
    members = {u.name: u.members for part in units for u in part}
    with torch.inference_mode():
        truth = whole(tokens).logits.log_softmax(-1)
        for choice, kl in zip(choices, found, strict=True):
            changed = {}
            for unit, width in choice.items():
                for name in members.get(unit, (unit,)):
                    index = OUTPUT_INDEX if unit == OUTPUT_LAYER else int(name.split(".")[2])
                    changed[f"{name}.weight"] = nested.read(index)[name].dequantize(LAYOUT, width)
            # the embedding is tied to the output layer, but is looked up unquantized
            served = torch.func.functional_call(
                whole, changed, (tokens,), tie_weights=False
            ).logits.log_softmax(-1)
            expected = (truth.exp() * (truth - served)).sum(-1).flatten()
            assert torch.allclose(kl, expected, atol=1e-5, rtol=1e-3)


def test_choices_do_not_depend_on_each_other(tokens, nested):
    units = nested.units
    some = [{units[0][0].name: 4}, {units[2][3].name: 4}, {units[0][0].name: 4}]
    together = divergence(nested, tokens, some)
    for choice, kl in zip(some, together, strict=True):
        assert torch.equal(divergence(nested, tokens, [choice])[0], kl)


def test_estimated_sensitivities_rank_as_measured_ones(nested):
    tokens = torch.randint(2, 90, (16, 32), generator=torch.Generator().manual_seed(2))
    costs = sensitivity.estimate(nested, tokens)
    pairs = [(u.name, w) for part in nested.units for u in part for w in (4, 6)]
    assert set(costs) == {name for name, _ in pairs}
    measured = divergence(nested, tokens, [{n: w} for n, w in pairs]).mean(-1)
    estimated = [costs[n][w].kl for n, w in pairs]
    assert sensitivity.rank_correlation(estimated, measured.tolist()) > 0.9
    ratio = torch.tensor(estimated) / measured
    assert 0.5 < float(ratio.median()) < 2.0
    assert all(c.error > 0 for by in costs.values() for c in by.values())


def test_checkpoints_that_cannot_be_calibrated_say_why(tiny_model, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 3] = float("nan")
    save_file(weights, folder / "model.safetensors")
    broken = BlockModel(folder)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN or infinite"):
        broken.load(1)
    del weights[name]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        BlockModel(folder).load(1)
