# SPDX-License-Identifier: Apache-2.0
"""Packing and files of static checkpoints, against the compressed-tensors package itself."""

import json

import pytest
import torch
from safetensors.torch import load_file

from vllm_flexquant.format.compressed_tensors import (
    INDEX,
    ShardWriter,
    pack_int32,
    quantization_config,
    unpack_int32,
)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("dim", "shape"), [(1, (5, 8)), (1, (3, 576)), (0, (64, 9))])
def test_packing_is_that_of_compressed_tensors(bits, dim, shape):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    top = (1 << bits) - 1
    codes = torch.randint(0, top + 1, shape, dtype=torch.uint8)
    codes[0, 0], codes[-1, -1] = 0, top
    packed = pack_int32(codes, bits, dim)
    assert packed.is_contiguous()
    signed = (codes.int() - (top + 1) // 2).to(torch.int8)
    assert torch.equal(packed, helpers.pack_to_int32(signed, bits, packed_dim=dim))
    assert torch.equal(unpack_int32(packed, bits, dim), codes)


def test_codes_that_do_not_fill_words_are_refused():
    with pytest.raises(ValueError, match="6 bits do not fill 32-bit words"):
        pack_int32(torch.zeros(2, 32, dtype=torch.uint8), 6)
    with pytest.raises(ValueError, match="12 codes of 4 bits do not fill"):
        pack_int32(torch.zeros(12, 2, dtype=torch.uint8), 4, dim=0)


def test_config_is_valid_and_has_a_group_for_each_group_size():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    sizes = {"a": 64, "b": 32, "c": 64}
    config = quantization_config(sizes, 4, False, "pack-quantized", None, ["lm_head"])
    assert config["ignore"] == ["lm_head"]
    read = quantization.QuantizationConfig.model_validate(config)
    found = {tuple(g.targets): g.weights for g in read.config_groups.values()}
    assert {t: w.group_size for t, w in found.items()} == {("a", "c"): 64, ("b",): 32}
    assert not any(w.symmetric for w in found.values())


@pytest.mark.parametrize(("limit", "files"), [(1 << 20, 1), (400, 2)])
def test_shards_are_found_by_the_index(tmp_path, limit, files):
    tensors = {f"t{i}": torch.randn(10, 10)[:, :7] for i in range(3)}
    writer = ShardWriter(tmp_path, limit=limit)
    for name, tensor in tensors.items():
        writer.add({name: tensor})
    written = writer.close()
    assert len(written) == files
    assert {f.name for f in tmp_path.glob("*")} - {INDEX} == {f.name for f in written}
    assert (tmp_path / INDEX).exists() == (files > 1)
    stored = {k: v for f in written for k, v in load_file(f).items()}
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)
    if files > 1:
        where = json.loads((tmp_path / INDEX).read_text())["weight_map"]
        assert all(name in load_file(tmp_path / file) for name, file in where.items())
