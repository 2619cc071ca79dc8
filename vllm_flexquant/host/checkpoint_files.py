# SPDX-License-Identifier: Apache-2.0
"""Checking a saved checkpoint's files, in a folder or from the hub, once for each start."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_flexquant.format.checkpoint import validate_checkpoint

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig

_STAMP = "FLEXQUANT_VERIFIED"
"""Environment variable by which child processes know which files were read through already."""

_FROM_HUB = ("auto", "hf", "safetensors")
"""vLLM's load formats that take the files from the hub as they are."""


def check_folder(folder: Path, verify: bool) -> None:
    """Check the files of a saved checkpoint.

    Args:
        verify: also compare hashes, unless this process or a parent of it did.

    Raises:
        ValueError: as `validate_checkpoint`.
    """
    stamp = _stamp(folder)
    done = os.environ.get(_STAMP, "").split()
    validate_checkpoint(folder, verify=verify and stamp not in done)
    if verify and stamp not in done:
        os.environ[_STAMP] = " ".join([*done, stamp])


def check_download(model_config: ModelConfig, load_config: LoadConfig, verify: bool) -> None:
    """Where a checkpoint is named on the hub: download it, as the model loader would do next, and
    check its files.

    Raises:
        ValueError: as `validate_checkpoint`.
    """
    import huggingface_hub
    from vllm import envs
    from vllm.model_executor.model_loader.weight_utils import get_lock

    model = model_config.model
    if Path(model).is_dir() or envs.VLLM_USE_MODELSCOPE or load_config.load_format not in _FROM_HUB:
        return
    with get_lock(model, load_config.download_dir):
        folder = huggingface_hub.snapshot_download(
            model,
            revision=model_config.revision,
            cache_dir=load_config.download_dir,
            allow_patterns=["*.json", "*.safetensors"],
            local_files_only=huggingface_hub.constants.HF_HUB_OFFLINE,
        )
    check_folder(Path(folder), verify)


def _stamp(folder: Path) -> str:
    """Changes when one of the files does."""
    found = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(folder.iterdir())
        if file.is_file()
    ]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]
