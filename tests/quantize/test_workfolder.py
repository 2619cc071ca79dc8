# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vllm_flexquant.quantize.rtn import QuantizedWeight
from vllm_flexquant.quantize.workfolder import WorkFolder, from_tensors, to_tensors


def test_results_come_back_and_the_folder_goes_at_the_end(tmp_path):
    work = WorkFolder(tmp_path / "out", {"model": "a"}, resume=False)
    assert work.read_json("x") is None
    assert work.read_tensors("x") is None
    work.write_json("x", {"1": [0.5]})
    weight = QuantizedWeight(torch.arange(4, dtype=torch.uint8), torch.ones(2).half())
    work.write_tensors("x", to_tensors({"m.q": weight}))
    again = WorkFolder(tmp_path / "out", {"model": "a"}, resume=True)
    assert again.read_json("x") == {"1": [0.5]}
    back = from_tensors(again.read_tensors("x"))
    assert torch.equal(back["m.q"].codes, weight.codes)
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_is_not_overwritten_and_not_mixed_with_another(tmp_path):
    WorkFolder(tmp_path / "out", {"model": "a", "text": "b"}, resume=False)
    with pytest.raises(ValueError, match="left from an interrupted run; add --resume"):
        WorkFolder(tmp_path / "out", {"model": "a", "text": "b"}, resume=False)
    with pytest.raises(ValueError, match="text was 'b' and is now 'c'"):
        WorkFolder(tmp_path / "out", {"model": "a", "text": "c"}, resume=True)


def test_a_damaged_file_is_named(tmp_path):
    work = WorkFolder(tmp_path / "out", {}, resume=False)
    work.write_tensors("block", {"a": torch.ones(3)})
    file = work.path / "block.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"block\.safetensors is damaged"):
        work.read_tensors("block")
