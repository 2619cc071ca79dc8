# SPDX-License-Identifier: Apache-2.0
"""From a saved flexquant checkpoint to a static one of a single width, which stock vLLM serves.

The grid of a static format has whole zeros (`integer_grid`), so layers are rounded anew, from the
highest width that the checkpoint has of them: with error compensation on calibration text, or to
nearest. Peak memory is that of one block and what has not been written yet.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_flexquant.format.checkpoint import OUTPUT_LAYER, hash_file, read_sidecar
from vllm_flexquant.format.compressed_tensors import (
    ShardWriter,
    packed_tensors,
    quantization_config,
)
from vllm_flexquant.format.saved import SavedCheckpoint
from vllm_flexquant.quantize import calibration
from vllm_flexquant.quantize.batches import Batches
from vllm_flexquant.quantize.blocks import BlockModel
from vllm_flexquant.quantize.card import write_export_card
from vllm_flexquant.quantize.integer_grid import IntegerWeight, compensated, nearest
from vllm_flexquant.quantize.pipeline import installed_versions, linear_modules, new_checkpoint
from vllm_flexquant.quantize.rounding import Method

EXPORT_RECORD = "flexquant-export.json"
"""Says in an exported folder where it comes from."""

FORMAT = "compressed-tensors"

SYMMETRIC = {4: False, 8: True}
"""Widths that can be exported, and whether the zero is the middle of the range: vLLM's Marlin
kernels take 4 and 8 bits, with a zero per group at 4 only; its CPU kernel takes 4 bits only."""

_ROWS = 32
"""vLLM's kernels take outputs in multiples of this."""

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that vLLM makes one of, and so must be quantized alike."""

_TIED = 0.01
"""An output layer that differs from the embedding by less than this share of its energy is the
embedding, rounded."""

Advance = Callable[[str, float], None]
"""Called with a stage's name and the share of it that is done."""

Take = Callable[[str, IntegerWeight], None]
"""Called with a layer's name and what became of its weight."""


@dataclass(frozen=True)
class ExportOptions:
    """What `flexquant export` can be told; text, sequences and length are for gptq."""

    width: int = 4
    method: Method = "gptq"
    text: str = calibration.BUILT_IN
    sequences: int = 96
    length: int = 512
    device: str = "cpu"


@dataclass(frozen=True)
class Exported:
    """What an export wrote: layers at the width, and layers left unquantized with the reason."""

    layers: tuple[str, ...]
    plain: Mapping[str, str] = field(default_factory=dict)


class SavedModel(BlockModel):
    """A saved flexquant checkpoint as a model of plain weights.

    width: in bits; None is the highest of each layer.
    """

    def __init__(
        self, saved: SavedCheckpoint, device: str = "cpu", width: int | None = None
    ) -> None:
        self._saved, self._width = saved, width
        super().__init__(saved.folder, device)

    def read(self, name: str) -> torch.Tensor:
        """One tensor as stored, or dequantized."""
        module = name.removesuffix(".weight")
        if name != module and module in self._saved.modules:
            return self._saved.dequantize(module, self._width)
        return super().read(name)


def check_width(width: int) -> None:
    """Refuse a width that no static checkpoint can hold for vLLM.

    Raises:
        ValueError: it is neither 4 nor 8.
    """
    if width not in SYMMETRIC:
        raise ValueError(
            f"width {width} cannot be exported: stock vLLM has kernels for static integer weights "
            "of 4 bits (CPU and GPU) and 8 bits (GPU) only; export one of these, or serve the "
            "flexquant checkpoint, which runs at any width of its layout"
        )


def export_checkpoint(
    checkpoint: Path, out: Path, options: ExportOptions, advance: Advance | None = None
) -> Exported:
    """Write the saved flexquant `checkpoint` as a static one into the new folder `out`.

    The folder appears only when it is complete.

    Raises:
        ValueError: a width that cannot be exported, `checkpoint` is none or damaged, `out` is not
            empty, or the calibration text or the tokenizer cannot be used.
    """
    check_width(options.width)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; name a new folder")
    saved = SavedCheckpoint(checkpoint)
    linears = linear_modules(checkpoint)
    plain = _left_plain(saved.modules, linears)
    chosen = [name for name in saved.modules if name not in plain]
    if not chosen:
        raise ValueError(f"{checkpoint} has no layer that can be exported ({plain})")
    text: dict[str, Any] = {}
    tokens = None
    if options.method == "gptq":
        source = calibration.read_text(options.text)
        cut = calibration.cut_tokens(
            source, calibration.load_tokenizer(checkpoint), options.sequences, options.length
        )
        tokens = cut.fit
        text = calibration.describe(source, cut)
        del text["held_back_tokens"]  # nothing is measured
    with new_checkpoint(out, checkpoint) as folder:
        writer = ShardWriter(folder)
        _round(saved, chosen, tokens, options, writer, advance)
        tied = _write_plain(saved, plain, writer)
        files = writer.close()
        ignored = {name: plain.get(name, "unquantized in the source") for name in linears}
        ignored = {name: why for name, why in ignored.items() if name not in chosen}
        if OUTPUT_LAYER in ignored and (tied or saved.config.get("tie_word_embeddings")):
            ignored[OUTPUT_LAYER] = "tied to the embedding"
        config = {k: v for k, v in saved.config.items() if k != "quantization_config"}
        if tied:
            config["tie_word_embeddings"] = True
        config["quantization_config"] = quantization_config(
            {name: saved.group_size(name) for name in chosen},
            options.width,
            SYMMETRIC[options.width],
            "pack-quantized",
            None,
            ignored,
        )
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        record = _record(saved, options, text, files, ignored)
        (folder / EXPORT_RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        write_export_card(folder, record)
    return Exported(tuple(chosen), ignored)


def _left_plain(modules: Mapping[str, tuple[int, int]], linears: Collection[str]) -> dict[str, str]:
    """Layers with planes that are written unquantized, with the reason."""
    plain = {}
    for name, (rows, _) in modules.items():
        if name == OUTPUT_LAYER:
            plain[name] = "output layer"
        elif rows % _ROWS:
            plain[name] = f"its {rows} outputs are no multiple of {_ROWS}"
    for name in modules:
        parent, _, last = name.rpartition(".")
        fused = next((names for names in _FUSED if last in names), ())
        for other in (f"{parent}.{n}" for n in fused):
            if name not in plain and other in linears and (other not in modules or other in plain):
                plain[name] = f"vLLM fuses it with {other}, which is unquantized"
    return plain


def _round(
    saved: SavedCheckpoint,
    chosen: Sequence[str],
    tokens: torch.Tensor | None,
    options: ExportOptions,
    writer: ShardWriter,
    advance: Advance | None,
) -> None:
    """Write all `chosen` layers; with `tokens`, those of blocks by their inputs."""
    width, symmetric = options.width, SYMMETRIC[options.width]
    done: set[str] = set()

    def take(name: str, weight: IntegerWeight) -> None:
        zeros = None if symmetric else weight.zeros
        writer.add(packed_tensors(name, weight.codes, weight.scales, width, zeros))
        done.add(name)
        if advance:
            advance("rounding", len(done) / len(chosen))

    if tokens is not None:
        with torch.inference_mode():
            _round_blocks(saved, set(chosen), tokens, options, take)
    for name in chosen:
        if name not in done:
            weight = saved.dequantize(name).to(options.device)
            _check_finite(name, weight, "weights")
            take(name, nearest(weight, width, saved.group_size(name), symmetric))


def _round_blocks(
    saved: SavedCheckpoint,
    chosen: set[str],
    tokens: torch.Tensor,
    options: ExportOptions,
    take: Take,
) -> None:
    """Round the layers of all blocks, each by what the rounded blocks before it give it."""
    model = SavedModel(saved, options.device)
    width = options.width
    batches = Batches(model, tokens)
    hidden = batches.embed()
    for index in range(len(model)):
        with model.loaded(index):
            layers = dict(model.linears(index))
            units = [u for u in batches.units(index) if chosen & set(u.members)]
            hessians = batches.hessians(index, units, hidden)
            for unit in units:
                hessian = hessians.pop(unit.name)
                _check_finite(unit.name, hessian, "inputs from the calibration text")
                for name in sorted(chosen & set(unit.members)):
                    weight = layers[name].weight.data
                    rounded = compensated(
                        weight, hessian, width, saved.group_size(name), SYMMETRIC[width]
                    )
                    layers[name].weight.data = rounded.dequantize()
                    take(name, rounded)
            hidden = batches.forward(index, hidden)


def _check_finite(name: str, values: torch.Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} has NaN or infinite {what}; quantize the model again")


def _write_plain(saved: SavedCheckpoint, plain: Mapping[str, str], writer: ShardWriter) -> bool:
    """All that is not quantized; True if the output layer turned out to be the embedding."""
    dtypes: Counter[torch.dtype] = Counter()
    embedding = None
    for name in saved.plain_names():
        tensor = saved.read(name)
        dtypes[tensor.dtype] += tensor.numel()
        if tuple(tensor.shape) == saved.modules.get(OUTPUT_LAYER):
            embedding = name
        writer.add({name: tensor})
    dtype = max(dtypes, key=lambda d: (d.is_floating_point, dtypes[d]))
    tied = False
    for name in plain:
        weight = saved.dequantize(name)
        _check_finite(name, weight, "weights")
        if name == OUTPUT_LAYER and embedding:
            source = saved.read(embedding).float()
            tied = bool((weight - source).square().sum() < _TIED * source.square().sum())
            if tied:
                continue
        writer.add({f"{name}.weight": weight.to(dtype)})
    return tied


def _record(
    saved: SavedCheckpoint,
    options: ExportOptions,
    text: Mapping[str, Any],
    files: Sequence[Path],
    ignored: Mapping[str, str],
) -> dict[str, Any]:
    sidecar = read_sidecar(saved.folder)
    provenance = sidecar.get("provenance", {})
    names = {"gptq": "GPTQ", "rtn": "round to nearest"}
    return {
        "format": FORMAT,
        "width": options.width,
        "method": names[options.method],
        "text": dict(text),
        "source": saved.folder.name,
        "source_method": provenance.get("method"),
        "source_files": sidecar.get("files", {}),
        "base_model": provenance.get("source"),
        "files": {file.name: hash_file(file) for file in files},
        "unquantized": dict(ignored),
        "versions": installed_versions(),
    }
