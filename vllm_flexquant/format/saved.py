# SPDX-License-Identifier: Apache-2.0
"""Reading the weights of a saved flexquant checkpoint, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from flexquant_kernels import reference
from vllm_flexquant.format.checkpoint import StoredConfig, tensor_names, validate_checkpoint
from vllm_flexquant.format.layout import PlaneLayout, ScaleMode, choose_group_size


class SavedCheckpoint:
    """A saved checkpoint, checked on opening.

    `config` is all of `config.json`, `stored` the part that says how planes are read, `modules`
    (N, K) of each layer that has planes.

    Raises:
        ValueError: no flexquant checkpoint, or as `validate_checkpoint`.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        try:
            self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{folder} has no config.json; give a checkpoint folder") from None
        except ValueError:
            raise ValueError(f"{folder}: config.json is not valid JSON; copy it again") from None
        method = (self.config.get("quantization_config") or {}).get("quant_method")
        if method != "flexquant":
            kind = f"is quantized by {method}" if method else "is not quantized"
            raise ValueError(
                f"{folder} {kind}; give a checkpoint that 'flexquant quantize' has written"
            )
        self.folder = folder
        self.modules = validate_checkpoint(folder, verify)
        self.stored = StoredConfig.read(self.config["quantization_config"])
        self.layout = PlaneLayout.parse(self.stored.layout)
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as reader:
                self._files.update(dict.fromkeys(reader.keys(), file))

    def group_size(self, module: str) -> int:
        """Weights of a layer that share a scale."""
        size = choose_group_size(self.modules[module][1], self.stored.group_size)
        assert size is not None  # or validation had refused it
        return size

    def read(self, name: str) -> torch.Tensor:
        """A tensor as stored."""
        with safe_open(self._files[name], framework="pt") as reader:
            return reader.get_tensor(name)

    def dequantize(self, module: str, width: int | None = None) -> torch.Tensor:
        """Weight of a layer at `width` bits, or the highest that it has, fp32 [N, K]."""
        widths = self.stored.widths_of(module)
        width = width or widths[-1]
        *planes, scales = (self.read(name) for name in self._tensor_names(module))
        if self.stored.scales is ScaleMode.PER_WIDTH:
            # one set stands for all that the layout has: only that of this width is used
            scales = scales[:, :, [widths.index(width)]].expand(-1, -1, len(self.layout.widths), -1)
        return reference.dequantize(
            planes,
            scales,
            self.layout.planes,
            width,
            self.group_size(module),
            self.modules[module][0],
        )

    def _tensor_names(self, module: str) -> list[str]:
        return tensor_names(module, len(self.stored.planes_of(module)))

    def plain_names(self) -> Iterator[str]:
        """Tensors that are not quantized, in the order of the files."""
        of_planes = {name for module in self.modules for name in self._tensor_names(module)}
        yield from (name for name in self._files if name not in of_planes)
