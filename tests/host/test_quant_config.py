# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vllm_flexquant.format.checkpoint import StoredConfig
from vllm_flexquant.host.linear import StoredFlexLinearMethod
from vllm_flexquant.host.quant_config import FlexQuantConfig
from vllm_flexquant.options import Sources


def test_groups_that_straddle_a_shard_are_refused_with_the_size_that_fits():
    config = FlexQuantConfig(Sources(stored={"group_size": 128}), StoredConfig(group_size=128))
    method = StoredFlexLinearMethod(config, "model.layers.0.mlp.down_proj")
    with pytest.raises(
        ValueError,
        match="groups of 128 do not divide the 192 inputs that each of 2 tensor-parallel ranks "
        "holds; quantize again with --group-size 64",
    ):
        method.create_weights(
            torch.nn.Module(), 192, [64], 384, 64, torch.bfloat16, weight_loader=None
        )


def test_a_saved_checkpoint_fixes_its_format():
    config = FlexQuantConfig.from_config({"format_version": "1.0", "layout": "2|2|4"})
    assert str(config.options.layout) == "2|2|4"
    with pytest.raises(ValueError, match="option 'layout' is fixed by the saved checkpoint"):
        config.give({"layout": "4|2|2"})
    config.give({"policy": "static", "width": 4})
    assert config.options.width == 4


def test_ignoring_a_part_of_a_fused_layer_is_refused():
    config = FlexQuantConfig(Sources(additional={"ignore": ["q_proj", "k_proj"]}))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    with pytest.raises(ValueError, match=r"fuses into model.layers.0.self_attn.qkv_proj"):
        config._ignored("model.layers.0.self_attn.qkv_proj")
    config.give({"ignore": ["q_proj", "k_proj", "v_proj", "layers.1.mlp.up_proj"]})
    assert config._ignored("model.layers.0.self_attn.qkv_proj")
    assert config._ignored("model.layers.1.mlp.up_proj")
    assert not config._ignored("model.layers.11.mlp.up_proj")


def test_overrides_in_the_place_of_what_a_saved_checkpoint_says_are_refused(tmp_path):
    (tmp_path / "flexquant.json").write_text("{}")
    config = FlexQuantConfig.from_config({"quant_method": "flexquant", "min_bits": 4})
    with pytest.raises(ValueError, match="give options by --additional-config instead"):
        config.maybe_update_config(str(tmp_path))


def test_options_of_all_sources_are_checked_together():
    overrides = {"quant_method": "flexquant", "width": 4}
    config = FlexQuantConfig.from_config(overrides)
    config.give({"policy": "static"})
    assert (config.options.policy, config.options.width) == ("static", 4)
