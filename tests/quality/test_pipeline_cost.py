# SPDX-License-Identifier: Apache-2.0
import pytest

from benchmarks.quality.pipeline_cost import FIT, decoder, from_config, launches, operations


def test_shapes_have_the_weights_of_the_models_they_stand_for(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,'
        ' "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}'
    )
    assert from_config(tmp_path).weights == pytest.approx(134.5e6, rel=1e-3)
    assert decoder("7B", 32, 4096, 11008, 4096, 32000).weights == pytest.approx(6.6e9, rel=0.01)
    assert decoder("70B", 80, 8192, 28672, 1024, 32000).weights == pytest.approx(68.7e9, rel=0.01)


def test_operations_grow_as_the_stages_do():
    shape, deep = decoder("a", 2, 64, 128, 64, 100), decoder("b", 4, 64, 128, 64, 100)
    one, two = operations(shape, 3), operations(deep, 3)
    assert two["rounding"] == pytest.approx(2 * one["rounding"])
    assert operations(shape, 5)["rounding"] > one["rounding"]
    # at least a pass of all tokens through all blocks, twice
    assert one["rounding"] > 2 * FIT * 2 * 2 * shape.block_weights
    assert launches(deep) == 2 * launches(shape)
