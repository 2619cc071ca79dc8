# SPDX-License-Identifier: Apache-2.0
"""W8A8 and W4A16 checkpoints that stock vLLM serves, rounded to nearest.

    python -m benchmarks.serving.checkpoints --model FOLDER --scheme w8a8|w4a16 --out FOLDER

Both are compressed-tensors checkpoints, as llm-compressor writes them without calibration: weights
symmetric, the largest magnitude of a channel or group at half the range of the integers. The output
layer and the embeddings stay as they are, which is llm-compressor's default too.

w8a8   int8 [N, K] with one scale per output channel; vLLM quantizes activations to int8, one scale
       per token.
w4a16  eight 4-bit codes in each int32 [N, K / 8], lowest bits first, each code plus 8; one scale
       per group of 128 along K, or of 64 or 32 in layers whose K is no multiple of 128.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_flexquant.format import compressed_tensors
from vllm_flexquant.format.compressed_tensors import INDEX, packed_tensors
from vllm_flexquant.format.layout import choose_group_size
from vllm_flexquant.quantize.pipeline import linear_modules

IGNORED = ("lm_head",)


@dataclass(frozen=True)
class Scheme:
    """One format: `group_size` is the largest, None for a scale per channel.

    `scale_dtype` is what vLLM holds the scales in, so that weights are rounded with the scale that
    will be used.
    """

    name: str
    format: str
    bits: int
    group_size: int | None
    scale_dtype: torch.dtype
    activations: dict[str, Any] | None


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            name="w8a8",
            format="int-quantized",
            bits=8,
            group_size=None,
            scale_dtype=torch.float32,
            activations={
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        ),
        Scheme(
            name="w4a16",
            format="pack-quantized",
            bits=4,
            group_size=128,
            scale_dtype=torch.bfloat16,
            activations=None,
        ),
    )
}


def round_to_nearest(
    weight: torch.Tensor, bits: int, group_size: int | None, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric integers and their scales.

    Args:
        weight: [N, K], any float dtype.
        group_size: weights along K that share a scale, a divisor of K; None for all of a row.

    Returns:
        codes int8 [N, K] in [-2^(bits-1), 2^(bits-1) - 1]; scales `scale_dtype` [N, K/group_size].
    """
    rows, columns = weight.shape
    grouped = weight.float().reshape(rows, -1, group_size or columns)
    half = 2 ** (bits - 1)
    scales = (grouped.abs().amax(dim=-1) / (half - 0.5)).to(scale_dtype)
    scales = scales.masked_fill(scales == 0, 1.0)  # a group of zeros
    codes = (grouped / scales.float().unsqueeze(-1)).round().clamp(-half, half - 1)
    return codes.to(torch.int8).reshape(rows, columns), scales


def quantize_weight(name: str, weight: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The tensors that stand in a checkpoint for `{name}.weight`, [N, K]."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{name}.weight holds NaN or infinite values; it cannot be quantized")
    group_size = choose(name, weight.shape[1], scheme)
    codes, scales = round_to_nearest(weight, scheme.bits, group_size, scheme.scale_dtype)
    if scheme.bits == 8:
        return {f"{name}.weight": codes, f"{name}.weight_scale": scales}
    half = 1 << (scheme.bits - 1)
    return packed_tensors(name, (codes + half).to(torch.uint8), scales, scheme.bits)


def choose(name: str, columns: int, scheme: Scheme) -> int | None:
    """Group size of a layer with K = `columns`; None where the scheme has a scale per channel."""
    if scheme.group_size is None:
        return None
    group_size = choose_group_size(columns, scheme.group_size)
    if group_size is None:
        raise ValueError(f"{name}: no group size of 128, 64 or 32 divides its {columns} inputs")
    return group_size


def quantization_config(modules: dict[str, tuple[int, int]], scheme: Scheme) -> dict[str, Any]:
    """`quantization_config` for config.json.

    Args:
        modules: (N, K) of each layer to quantize.
    """
    group_sizes = {name: choose(name, columns, scheme) for name, (_, columns) in modules.items()}
    return compressed_tensors.quantization_config(
        group_sizes, scheme.bits, True, scheme.format, scheme.activations, IGNORED
    )


def make_checkpoint(model: Path, out: Path, scheme: Scheme) -> Path:
    """Quantize the checkpoint folder `model` into the new folder `out`, which is returned.

    Raises:
        ValueError: `model` is no unquantized checkpoint in safetensors form, or `out` exists.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    files = sorted(model.glob("*.safetensors"))
    if not files or "quantization_config" in config:
        raise ValueError(f"{model} is no unquantized checkpoint with .safetensors files")
    if out.exists():
        raise ValueError(f"{out} exists; name a new folder")
    modules = {n: s for n, s in linear_modules(model).items() if n not in IGNORED}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / "checkpoint"
        folder.mkdir()
        for file in model.glob("*.*"):
            if file.suffix in (".json", ".txt", ".model", ".jinja") and file.name != INDEX:
                shutil.copy2(file, folder)
        where: dict[str, str] = {}
        for file in files:
            tensors = dict(quantized_tensors(file, modules, scheme))
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
            where |= dict.fromkeys(tensors, file.name)
        suffix = "weight" if scheme.bits == 8 else "weight_packed"
        if missing := [name for name in modules if f"{name}.{suffix}" not in where]:
            raise ValueError(f"{model} lacks {missing[0]}.weight")
        if len(files) > 1:
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
        config["quantization_config"] = quantization_config(modules, scheme)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        folder.rename(out)
    return out


def quantized_tensors(
    file: Path, modules: dict[str, tuple[int, int]], scheme: Scheme
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one file, those of `modules` quantized."""
    with safe_open(file, framework="pt") as source:
        for key in source.keys():  # noqa: SIM118 - not a mapping
            name = key.removesuffix(".weight")
            tensor = source.get_tensor(key)
            if key.endswith(".weight") and name in modules:
                yield from quantize_weight(name, tensor, scheme).items()
            else:
                yield key, tensor


def main() -> None:
    """Write a checkpoint."""
    parser = argparse.ArgumentParser(description="Make a W8A8 or W4A16 checkpoint.")
    parser.add_argument("--model", type=Path, required=True, help="unquantized checkpoint folder")
    parser.add_argument("--scheme", choices=sorted(SCHEMES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    options = parser.parse_args()
    try:
        print(make_checkpoint(options.model, options.out, SCHEMES[options.scheme]))
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
