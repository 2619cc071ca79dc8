# SPDX-License-Identifier: Apache-2.0
"""Static checkpoints in the compressed-tensors format, as stock vLLM reads them.

A layer `M` of format `pack-quantized` has, instead of `M.weight` [N, K]:

    M.weight_packed      int32 [N, K * bits / 32]: codes along K, lowest bits first
    M.weight_scale       [N, K / group_size]
    M.weight_zero_point  int32 [N * bits / 32, K / group_size]: zeros along N, lowest bits first;
                         absent where all zeros are 2^(bits - 1) (symmetric)
    M.weight_shape       int64 [2]: N, K

A weight is scale * (code - zero).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_flexquant.format.files import writing

INDEX = "model.safetensors.index.json"

_WORD = 32


def pack_int32(codes: torch.Tensor, bits: int, dim: int = 1) -> torch.Tensor:
    """Codes uint8 [R, C] below 2^bits -> int32, 32 / bits of them in a word along `dim`.

    Raises:
        ValueError: `bits` does not divide 32, or 32 / bits not the size of `dim`.
    """
    if _WORD % bits:
        raise ValueError(f"codes of {bits} bits do not fill 32-bit words; use 1, 2, 4 or 8 bits")
    if dim == 0:
        return pack_int32(codes.T, bits).T.contiguous()
    per_word = _WORD // bits
    rows, columns = codes.shape
    if columns % per_word:
        raise ValueError(f"{columns} codes of {bits} bits do not fill whole 32-bit words")
    packed = torch.zeros((rows, columns // per_word), dtype=torch.int32, device=codes.device)
    for place in range(per_word):
        packed |= codes[:, place::per_word].to(torch.int32) << (bits * place)
    return packed


def unpack_int32(packed: torch.Tensor, bits: int, dim: int = 1) -> torch.Tensor:
    """Inverse of `pack_int32`: codes uint8 [R, C]."""
    if dim == 0:
        return unpack_int32(packed.T, bits).T.contiguous()
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32, device=packed.device)
    fields = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return fields.flatten(1).to(torch.uint8)


def packed_tensors(
    module: str,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    zeros: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors that stand for `module.weight`, which is scale * (code - zero).

    Args:
        codes: uint8 [N, K]. scales: float [N, G]. zeros: uint8 [N, G]; None for 2^(bits - 1), which
            is not stored.
    """
    tensors = {
        f"{module}.weight_packed": pack_int32(codes, bits),
        f"{module}.weight_scale": scales,
        f"{module}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zeros is not None:
        tensors[f"{module}.weight_zero_point"] = pack_int32(zeros, bits, dim=0)
    return tensors


def quantization_config(
    group_sizes: Mapping[str, int | None],
    bits: int,
    symmetric: bool,
    layout: str,
    activations: Mapping[str, Any] | None,
    ignore: Iterable[str],
) -> dict[str, Any]:
    """`quantization_config` for config.json.

    Args:
        group_sizes: of each quantized layer by name; None for one scale per row. Layers are named
            one by one, as vLLM would take the target "Linear" to mean experts too.
        layout: how tensors are stored, `pack-quantized` or `int-quantized`.
        activations: how they are quantized; None if they are not.
        ignore: linear layers that are left as they are.
    """
    members: dict[int | None, list[str]] = {}
    for name, group_size in group_sizes.items():
        members.setdefault(group_size, []).append(name)
    groups = {}
    for number, (group_size, names) in enumerate(members.items()):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "channel" if group_size is None else "group",
            "group_size": group_size,
            "dynamic": False,
        }
        groups[f"group_{number}"] = {
            "targets": names,
            "weights": weights,
            "input_activations": activations,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
    }


class ShardWriter:
    """Writes tensors into files of about `limit` bytes, so that no more is held in memory.

    The names of the files say how many there are, so they are final, and the index that vLLM wants
    of several written, only when `close` returns.
    """

    def __init__(self, folder: Path, limit: int = 2 << 30) -> None:
        self._folder, self._limit = folder, limit
        self._pending: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._parts: list[list[str]] = []

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take tensors, on any device, whose names are new."""
        for name, tensor in tensors.items():
            self._pending[name] = tensor.cpu().contiguous()
            self._bytes += tensor.nbytes
        if self._bytes >= self._limit:
            self._flush()

    def close(self) -> list[Path]:
        """Write what is left; the files."""
        if self._pending or not self._parts:
            self._flush()
        count, total = len(self._parts), 0
        files: list[Path] = []
        where: dict[str, str] = {}
        for number, names in enumerate(self._parts, 1):
            file = "model" if count == 1 else f"model-{number:05d}-of-{count:05d}"
            path = self._folder / f"{file}.safetensors"
            self._part(number).rename(path)
            total += path.stat().st_size
            files.append(path)
            where |= dict.fromkeys(names, path.name)
        if count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (self._folder / INDEX).write_text(json.dumps(index, indent=1))
        return files

    def _flush(self) -> None:
        self._parts.append(list(self._pending))
        part = self._part(len(self._parts))
        with writing(part):
            save_file(self._pending, part, metadata={"format": "pt"})
        self._pending, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number}"
