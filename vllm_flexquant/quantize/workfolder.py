# SPDX-License-Identifier: Apache-2.0
"""What an interrupted run leaves behind, so that the next one goes on from there.

A hidden folder beside the one that is made. Every file in it appears by renaming, complete or not
at all, and `run.json` says which model, text and options it belongs to.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vllm_flexquant.format.files import writing
from vllm_flexquant.quantize.rtn import QuantizedWeight

_RUN = "run.json"


class WorkFolder:
    """Results of finished stages, by name.

    Raises:
        ValueError: the folder is of an interrupted run and `resume` is false, or it is of another
            run than the one described by `facts`.
    """

    def __init__(self, out: Path, facts: Mapping[str, Any], resume: bool) -> None:
        self.path = out.parent / f".{out.name}.partial"
        run = self.facts_file = self.path / _RUN
        if run.exists():
            before = json.loads(run.read_text())
            now = json.loads(json.dumps(dict(facts)))
            if not resume:
                raise ValueError(
                    f"{self.path} is left from an interrupted run; add --resume to go on with it, "
                    "or delete it"
                )
            if changed := sorted(k for k in {*before, *now} if before.get(k) != now.get(k)):
                key = changed[0]
                raise ValueError(
                    f"cannot resume {self.path}: {key} was {before.get(key)!r} and is now "
                    f"{now.get(key)!r}; use the same, or delete the folder"
                )
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write(_RUN, json.dumps(dict(facts), indent=2).encode())

    def read_json(self, name: str) -> Any | None:
        """What `write_json` stored, None if it did not."""
        file = self.path / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def write_json(self, name: str, value: Any) -> None:
        self._write(f"{name}.json", json.dumps(value).encode())

    def has_tensors(self, name: str) -> bool:
        """Whether `write_tensors` stored them."""
        return (self.path / f"{name}.safetensors").exists()

    def read_tensors(self, name: str) -> dict[str, torch.Tensor] | None:
        """What `write_tensors` stored, None if it did not."""
        file = self.path / f"{name}.safetensors"
        if not file.exists():
            return None
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); delete it and resume again") from None

    def write_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        temporary = self.path / f"{name}.safetensors.new"
        with writing(temporary):
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
        os.replace(temporary, self.path / f"{name}.safetensors")

    def remove(self) -> None:
        """Delete everything; the run is complete."""
        shutil.rmtree(self.path)

    def _write(self, name: str, content: bytes) -> None:
        temporary = self.path / f"{name}.new"
        with writing(temporary):
            temporary.write_bytes(content)
        os.replace(temporary, self.path / name)


def to_tensors(weights: Mapping[str, QuantizedWeight]) -> dict[str, torch.Tensor]:
    """Codes and scales of layers as named tensors."""
    return {f"{n}.codes": w.codes.cpu() for n, w in weights.items()} | {
        f"{n}.scales": w.scales.cpu() for n, w in weights.items()
    }


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, QuantizedWeight]:
    """Inverse of `to_tensors`."""
    names = [name.removesuffix(".codes") for name in tensors if name.endswith(".codes")]
    return {n: QuantizedWeight(tensors[f"{n}.codes"], tensors[f"{n}.scales"]) for n in names}
