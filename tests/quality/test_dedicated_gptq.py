# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.quality import calibrated, dedicated_gptq
from benchmarks.quality.dedicated_gptq import FACTS, WEIGHTS, Dedicated
from benchmarks.quality.gptq_worker import most_levels
from vllm_flexquant.format.layout import PlaneLayout
from vllm_flexquant.quantize import evaluate
from vllm_flexquant.quantize.blocks import BlockModel, Unit

LAYOUT = PlaneLayout.parse("4|2|2")

SETTINGS = {
    "width": 4,
    "group_size": 64,
    "symmetric": False,
    "observer": None,
    "model_sha256": {"model.safetensors": "aa"},
    "text_sha256": "bb",
}
TOOL = {"tool": "some-tool", "versions": {"some-tool": "1.2"}}


@pytest.fixture(scope="module")
def model(tiny_model):
    return BlockModel(tiny_model)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(2, 92, (5, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """A dedicated checkpoint whose weights are those of the model."""
    weights = {}
    for index in range(len(model)):
        with model.loaded(index):
            for name, layer in model.linears(index):
                weights[f"{name}.weight"] = layer.weight.detach().clone()
    scratch = tmp_path / "scratch.safetensors"
    save_file(weights, scratch)
    out = tmp_path / "gptq4"
    out.mkdir()
    dedicated_gptq.write(out, scratch, SETTINGS, TOOL, torch.zeros(3, 8, dtype=torch.int64))
    return out


def nested_from(model, source):
    """All layers of the blocks as `source` has them, a unit each."""
    units = [
        [Unit((n,), (m.out_features,), m.in_features) for n, m in model.linears(i)]
        for i in range(len(model))
    ]

    def read(index):
        return {n: source(n, m.weight.data, 32) for n, m in model.linears(index)}

    return evaluate.NestedModel(model, units, LAYOUT, read)


def all_at_4(nested):
    return {unit.name: 4 for block in nested.units for unit in block}


def test_weights_of_the_checkpoint_cost_nothing_and_others_do(model, tokens, folder):
    same = nested_from(model, calibrated.given(Dedicated.read(folder)))
    other = nested_from(model, lambda _, weight, __: calibrated.Dense(weight * 1.1))
    for nested, low, high in ((same, 0.0, 0.0), (other, 1e-3, 1e3)):
        (kl,) = evaluate.divergence(nested, tokens, [all_at_4(nested)])
        assert kl.shape == (tokens.numel(),)
        assert low <= float(kl.mean()) <= high


def test_a_dedicated_grid_is_at_least_as_fine_as_a_nested_one(model, tokens):
    kl = {}
    for name, source in (("nested", calibrated.nested(LAYOUT)), ("own", calibrated.dedicated(4))):
        nested = nested_from(model, source)
        kl[name] = float(evaluate.divergence(nested, tokens, [all_at_4(nested)]).mean())
    assert 0 < kl["own"] < 1.2 * kl["nested"]
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    back = calibrated.dedicated(4)("a", weight, 32).dequantize(LAYOUT, 4)
    spread = weight.unflatten(1, (2, 32))
    step = (spread.amax(-1) - spread.amin(-1)) / 15
    assert ((back - weight).unflatten(1, (2, 32)).abs().amax(-1) <= 0.51 * step).all()


def test_the_label_says_what_is_not_the_tools_default(folder):
    assert Dedicated.read(folder).label == "dedicated GPTQ 4 (some-tool 1.2)"
    facts = json.loads((folder / FACTS).read_text())
    (folder / FACTS).write_text(json.dumps(facts | {"symmetric": True, "observer": "mse"}))
    assert Dedicated.read(folder).label == "dedicated GPTQ 4 (some-tool 1.2, symmetric, mse)"


def test_facts_name_the_weights_and_the_tokens(folder):
    facts = Dedicated.read(folder).facts
    assert facts["weights_sha256"] == dedicated_gptq.hash_file(folder / WEIGHTS)
    assert (facts["tokens"], facts["sequence_tokens"]) == (24, 8)


@pytest.mark.parametrize("damage", ["absent", "no facts", "cut facts", "cut weights"])
def test_an_incomplete_folder_is_refused(folder, damage):
    if damage == "absent":
        folder = folder / "nowhere"
    elif damage == "no facts":
        (folder / FACTS).unlink()
    elif damage == "cut facts":
        (folder / FACTS).write_text('{"width": 4}')
    else:
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])
    with pytest.raises(SystemExit, match=r"holds no complete dedicated checkpoint .*make it with"):
        Dedicated.read(folder)


@pytest.mark.parametrize("damage", ["missing", "shape", "nan"])
def test_a_damaged_folder_names_the_layer(model, tokens, folder, damage):
    name = "model.layers.1.mlp.down_proj"
    weights = load_file(folder / WEIGHTS)
    if damage == "missing":
        del weights[f"{name}.weight"]
    elif damage == "shape":
        weights[f"{name}.weight"] = torch.zeros(2, 2)
    else:
        weights[f"{name}.weight"][0, 0] = torch.nan
    save_file(weights, folder / WEIGHTS)
    nested = nested_from(model, calibrated.given(Dedicated.read(folder)))
    with pytest.raises(SystemExit, match=rf"{name}.*make it again"):
        evaluate.divergence(nested, tokens, [all_at_4(nested)])


def test_a_folder_is_made_once_and_not_for_other_settings(folder, tmp_path):
    assert dedicated_gptq.is_complete(folder, SETTINGS)
    assert not dedicated_gptq.is_complete(tmp_path / "new", SETTINGS)
    with pytest.raises(SystemExit, match=r"made with width 4, and .* has 3"):
        dedicated_gptq.is_complete(folder, SETTINGS | {"width": 3})


def test_an_environment_of_another_maker_is_left_alone(tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(SystemExit, match="was not built by this script"):
        dedicated_gptq.tool_environment(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_a_model_without_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--model", str(tmp_path), "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit, match=r"has no \.safetensors file"):
        dedicated_gptq.main()


def test_levels_of_a_group_are_counted():
    weight = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 2.0, 5.0, 5.0]])
    assert most_levels(weight, 2) == 2
    assert most_levels(weight, 4) == 3


@pytest.fixture
def checkpoint():
    """What `read_dedicated` looks at of a calibrated checkpoint."""
    return SimpleNamespace(
        record=SimpleNamespace(text={"sha256": "bb"}),
        stored=SimpleNamespace(group_size=64),
        layout=LAYOUT,
    )


def test_a_fair_comparison_is_accepted(folder, checkpoint, monkeypatch):
    monkeypatch.setattr(calibrated, "hash_model", lambda _: SETTINGS["model_sha256"])
    assert calibrated.read_dedicated([], Path(), checkpoint) == []
    (read,) = calibrated.read_dedicated([folder], Path(), checkpoint)
    assert read.width == 4
    with pytest.raises(SystemExit, match="two checkpoints of one kind"):
        calibrated.read_dedicated([folder, folder], Path(), checkpoint)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_sha256": {}}, "made with model_sha256"),
        ({"text_sha256": "cc"}, "made with text_sha256 cc"),
        ({"group_size": 128}, "made with group_size 128, .* has 64"),
        ({"width": 3}, "is of 3 bits, and the checkpoint has 4, 6, 8"),
    ],
)
def test_an_unfair_comparison_is_refused(folder, checkpoint, monkeypatch, changed, message):
    monkeypatch.setattr(calibrated, "hash_model", lambda _: SETTINGS["model_sha256"])
    (folder / FACTS).write_text(json.dumps(SETTINGS | TOOL | changed))
    with pytest.raises(SystemExit, match=message):
        calibrated.read_dedicated([folder], Path(), checkpoint)
