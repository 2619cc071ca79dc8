# SPDX-License-Identifier: Apache-2.0
"""Saved checkpoints, checked once for each start."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from vllm_flexquant.format import checkpoint
from vllm_flexquant.host import checkpoint_files

NAME, COMMIT = "someone/small", "0" * 40


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A folder with one module in planes, and a list of the files whose hashes were taken."""
    folder = tmp_path / "saved"
    folder.mkdir()
    tensors = {f"a.plane{i}": torch.zeros(4, 64 * b // 8, dtype=torch.uint8) for i, b in PLANES}
    tensors["a.scales"] = torch.zeros(4, 1, 3, 2, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors")
    config = checkpoint.StoredConfig().model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    digest = checkpoint.hash_file(folder / "model.safetensors")
    sidecar = {"files": {"model.safetensors": digest}}
    (folder / "flexquant.json").write_text(json.dumps(sidecar))
    monkeypatch.delenv(checkpoint_files._STAMP, raising=False)
    hashed = []
    taken = checkpoint.hash_file
    monkeypatch.setattr(checkpoint, "hash_file", lambda file: hashed.append(file) or taken(file))
    yield folder, hashed
    monkeypatch.delenv(checkpoint_files._STAMP, raising=False)


PLANES = ((0, 4), (1, 2), (2, 2))


def break_weights(folder):
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def test_files_are_read_through_once_while_they_stay_the_same(saved):
    folder, hashed = saved
    for _ in range(3):  # as each API server process does, whose environment is its parent's
        checkpoint_files.check_folder(folder, verify=True)
    assert len(hashed) == 1
    break_weights(folder)
    with pytest.raises(ValueError, match="is corrupted: its hash is not the one"):
        checkpoint_files.check_folder(folder, verify=True)
    checkpoint_files.check_folder(folder, verify=False)


@pytest.fixture
def downloaded(saved, tmp_path, monkeypatch):
    """The same as it lies in the cache of the hub's client."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    root = tmp_path / "hub" / "models--someone--small"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    shutil.copytree(saved[0], root / "snapshots" / COMMIT)
    return root / "snapshots" / COMMIT


def test_a_checkpoint_from_the_hub_is_checked_once_it_is_there(downloaded, tmp_path, saved):
    model = SimpleNamespace(model=NAME, revision=None)
    load = SimpleNamespace(download_dir=str(tmp_path / "hub"), load_format="auto")
    checkpoint_files.check_download(model, load, verify=True)
    assert len(saved[1]) == 1
    break_weights(downloaded)
    with pytest.raises(ValueError, match="is corrupted"):
        checkpoint_files.check_download(model, load, verify=True)
    load.load_format = "dummy"
    checkpoint_files.check_download(model, load, verify=True)
