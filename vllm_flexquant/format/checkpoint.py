# SPDX-License-Identifier: Apache-2.0
"""Saved flexquant checkpoints.

A folder in Hugging Face form. Each quantized module `M` has, instead of `M.weight`, the tensors
`M.plane0`, `M.plane1`, ... (uint8 [N, K * bits / 8], most significant plane first, see
`flexquant_kernels.pack`) and `M.scales` (fp16 [N, K / group_size, S, 2]: scale and offset; S is the
number of widths, or 1 for shared scales). A pruned module lacks its last planes, and the scales of
widths that it cannot run at. `config.json` holds a `quantization_config` that says how
to read them (`StoredConfig`), `flexquant.json` where they come from and their hashes. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_flexquant.format.layout import PARENT_BITS, PlaneLayout, ScaleMode, choose_group_size

FORMAT_VERSION = "1.1"
"""A reader takes any minor version of its major one."""

SIDECAR = "flexquant.json"

OUTPUT_LAYER = "lm_head"
"""Module name of the output layer."""


class OutputLayer(StrEnum):
    """Where the output layer's weights are."""

    PLANES = "planes"
    """Stored as planes of `lm_head`."""
    TIED = "tied"
    """Nowhere: it is the embedding, and is quantized from it at load."""
    PLAIN = "plain"
    """Stored unquantized."""


class StoredConfig(BaseModel):
    """`quantization_config` of a saved checkpoint; unknown keys are ignored.

    widths: those that have scales, all of the layout's if empty. top_widths: highest width of
    modules whose last planes were pruned.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    quant_method: str = "flexquant"
    format_version: str = FORMAT_VERSION
    layout: str = str(PlaneLayout())
    group_size: int = 64
    scales: ScaleMode = ScaleMode.PER_WIDTH
    output_layer: OutputLayer = OutputLayer.PLAIN
    ignore: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    top_widths: dict[str, int] = {}

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> StoredConfig:
        """Check and read `quantization_config`.

        Raises:
            ValueError: another major `format_version`, or a key that cannot be understood.
        """
        version = str(config.get("format_version"))
        major = version.partition(".")[0]
        ours = FORMAT_VERSION.partition(".")[0]
        if not major.isdigit() or major != ours:
            raise ValueError(
                f"config.json: format_version is '{version}', this release of vllm-flexquant reads "
                f"{ours}.x; install a release that reads it or quantize the model again"
            )
        try:
            stored = cls.model_validate(dict(config))
            layout = PlaneLayout.parse(stored.layout)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            raise ValueError(
                f"config.json: quantization_config.{key} is {problem['input']!r}: {problem['msg']}"
            ) from None
        for key, given in (("widths", stored.widths), ("top_widths", stored.top_widths.values())):
            if wrong := sorted(set(given) - set(layout.widths)):
                raise ValueError(
                    f"config.json: quantization_config.{key} has {wrong[0]}, layout {layout} has "
                    f"{', '.join(map(str, layout.widths))}; copy the checkpoint again"
                )
        return stored

    def widths_of(self, module: str) -> tuple[int, ...]:
        """The widths in bits at which `module` can run, ascending."""
        kept = self.widths or PlaneLayout.parse(self.layout).widths
        top = self.top_widths.get(module, kept[-1])
        return tuple(width for width in kept if width <= top)

    def planes_of(self, module: str) -> tuple[int, ...]:
        """Bits of the planes that are stored of `module`."""
        layout = PlaneLayout.parse(self.layout)
        return layout.planes[: layout.widths.index(self.widths_of(module)[-1]) + 1]

    def scale_sets(self, module: str) -> int:
        """How many pairs of scale and offset a group of `module` has."""
        return len(self.widths_of(module)) if self.scales is ScaleMode.PER_WIDTH else 1

    def options(self) -> dict[str, Any]:
        """The format options that this checkpoint fixes."""
        return {"layout": self.layout, "group_size": self.group_size, "scales": self.scales}


def tensor_names(module: str, planes: int) -> list[str]:
    """Names of the tensors that stand for `module.weight`; `planes` is their number."""
    return [*(f"{module}.plane{i}" for i in range(planes)), f"{module}.scales"]


class TensorEntry(BaseModel):
    """One tensor of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The header of a safetensors file, checked against the file's size.

    Raises:
        ValueError: the file is truncated or is no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise ValueError(f"{file.name} is truncated or no safetensors file; copy it again")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise ValueError(f"{file.name} has a broken header; copy it again") from None
    header.pop("__metadata__", None)
    entries = {name: TensorEntry.model_validate(entry) for name, entry in header.items()}
    end = max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(
            f"{file.name} has {size} bytes where its header promises {8 + length + end}; "
            "copy it again"
        )
    return entries


def hash_file(file: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _weight_files(folder: Path) -> Iterator[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no .safetensors file; copy the checkpoint again")
    yield from files


def validate_checkpoint(folder: Path, verify: bool = True) -> dict[str, tuple[int, int]]:
    """Check a saved checkpoint on disk, without loading it.

    Args:
        folder: the checkpoint.
        verify: also compare the hash of each file with `flexquant.json` (reads all bytes once).

    Returns:
        (N, K) of each quantized module.

    Raises:
        ValueError: a wrong format version, a truncated, missing, foreign or corrupted file or
            tensor; the message names it.
    """
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    stored = StoredConfig.read(config)
    layout = PlaneLayout.parse(stored.layout)
    entries: dict[str, TensorEntry] = {}
    for file in _weight_files(folder):
        entries |= read_header(file)
    recorded = read_sidecar(folder)
    for name, digest in recorded.get("files", {}).items():
        if not (folder / name).exists():
            raise ValueError(f"{folder} lacks {name}, which {SIDECAR} lists; copy it again")
        if verify and hash_file(folder / name) != digest:
            raise ValueError(
                f"{name} is corrupted: its hash is not the one in {SIDECAR}; copy it again"
            )
    suffixes = ("scales", *(f"plane{i}" for i in range(len(layout.planes))))
    modules = {n.rpartition(".")[0] for n in entries if n.rpartition(".")[2] in suffixes}
    if not modules:
        raise ValueError(f"{folder} says it is a flexquant checkpoint but holds no planes")
    return {m: _validate_module(m, entries, stored) for m in sorted(modules)}


def _validate_module(
    module: str, entries: Mapping[str, TensorEntry], stored: StoredConfig
) -> tuple[int, int]:
    planes = stored.planes_of(module)
    for name in tensor_names(module, len(planes)):
        if name not in entries:
            raise ValueError(f"the checkpoint has no {name}; copy it again or quantize again")
    first = entries[f"{module}.plane0"]
    rows = first.shape[0] if first.shape else 0
    columns = math.prod(first.shape[1:]) * PARENT_BITS // planes[0]
    group_size = choose_group_size(columns, stored.group_size) or 1
    sets = stored.scale_sets(module)
    expected = {
        f"{module}.plane{i}": ("U8", (rows, columns * bits // PARENT_BITS))
        for i, bits in enumerate(planes)
    } | {f"{module}.scales": ("F16", (rows, columns // group_size, sets, 2))}
    for name, (dtype, shape) in expected.items():
        entry = entries[name]
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise ValueError(
                f"{name} is {entry.dtype} {list(entry.shape)} where layout {stored.layout} and "
                f"groups of {group_size} need {dtype} {list(shape)}; quantize the model again"
            )
    return rows, columns


def read_sidecar(folder: Path) -> dict[str, Any]:
    """The content of `flexquant.json`, empty where there is none.

    Raises:
        ValueError: it is not JSON.
    """
    file = folder / SIDECAR
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except ValueError:
        raise ValueError(f"{SIDECAR} is not valid JSON; copy it again") from None


def parts_of(name: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
    """The layers of the checkpoint that vLLM fuses into its layer `name`, itself if none."""
    path, _, last = name.rpartition(".")
    return [f"{path}.{part}".lstrip(".") for part in fused.get(last, [last])]
