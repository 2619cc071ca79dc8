# SPDX-License-Identifier: Apache-2.0
"""From a Hugging Face checkpoint to a saved flexquant checkpoint, one file at a time."""

from __future__ import annotations

import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flexquant_kernels.pack import pack_planes
from vllm_flexquant.format.checkpoint import (
    FORMAT_VERSION,
    OUTPUT_LAYER,
    SIDECAR,
    OutputLayer,
    StoredConfig,
    hash_file,
    read_header,
    tensor_names,
    validate_checkpoint,
)
from vllm_flexquant.format.files import writing
from vllm_flexquant.format.layout import PlaneLayout, choose_group_size
from vllm_flexquant.format.record import CalibrationRecord
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.quantize.card import write_card
from vllm_flexquant.quantize.rtn import QuantizedWeight, quantize_rtn

_KEPT = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README*")
"""What is copied beside the weights."""

Progress = Callable[[str, int, int], None]
"""Called with a module's name, its number and how many there are."""


def linear_modules(folder: Path) -> dict[str, tuple[int, int]]:
    """(N, K) of each linear layer of the model's architecture, from its `config.json` alone.

    Raises:
        ValueError: transformers does not know the architecture.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{folder}: transformers cannot build this model: {error}") from None
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


@dataclass(frozen=True)
class Rounded:
    """Layers that were quantized before, and what is to be said of them.

    read: codes and scales of a layer by name, None for one that is to be rounded to nearest.
    method: of rounding, in words. calibration: what calibration found. run: what it took.
    """

    read: Callable[[str], QuantizedWeight | None]
    method: str
    calibration: CalibrationRecord
    run: Mapping[str, Any]


def check_paths(model: Path, out: Path) -> None:
    """Refuse what cannot be quantized, before any time is spent on it.

    Raises:
        ValueError: `model` is no unquantized checkpoint, or `out` is not empty.
    """
    _read_config(model)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; name a new folder")
    if not any(model.glob("*.safetensors")):
        raise ValueError(f"{model} has no .safetensors file; convert the checkpoint first")


def quantize_checkpoint(
    model: Path,
    out: Path,
    options: FlexQuantOptions,
    progress: Progress | None = None,
    rounded: Rounded | None = None,
    keep_widths: tuple[int, ...] = (),
) -> dict[str, tuple[int, int]]:
    """Write `model` as planes into the new folder `out`, rounded to nearest or as `rounded`.

    The folder appears only when it is complete and has passed validation.

    Args:
        keep_widths: in bits, ascending; planes and scales that none of them needs are left out.

    Returns:
        (N, K) of each quantized module.

    Raises:
        ValueError: `model` is no unquantized checkpoint in safetensors form, `out` exists, no layer
            can be quantized, or a weight is NaN or infinite.
    """
    check_paths(model, out)
    check_widths(keep_widths, options.layout)
    config = _read_config(model)
    files = sorted(model.glob("*.safetensors"))
    chosen, ignored = choose_layers(model, options)
    if not chosen:
        raise ValueError(f"{model} has no layer that can be quantized ({'; '.join(ignored)})")
    stored = StoredConfig(
        layout=str(options.layout),
        group_size=options.group_size,
        scales=options.scales,
        ignore=tuple(sorted(name for name in ignored if name != OUTPUT_LAYER)),
        widths=keep_widths,
    )
    with new_checkpoint(out, model) as folder:
        written = _write_weights(files, folder, chosen, options, stored, progress, rounded)
        if missing := sorted(set(chosen) - written - {OUTPUT_LAYER}):
            raise ValueError(f"{model} lacks {missing[0]}.weight; copy the checkpoint again")
        output = _output_layer(chosen, written, config)
        if output is OutputLayer.PLANES:
            config["tie_word_embeddings"] = False  # or vLLM would not read its planes
        write_facts(
            folder,
            config,
            stored.model_copy(update={"output_layer": output}),
            {
                "source": model.name,
                "source_files": {f.name: hash_file(f) for f in files},
                "method": rounded.method if rounded else "round to nearest",
                **({"run": dict(rounded.run)} if rounded else {}),
            },
            rounded.calibration if rounded else None,
        )
        return validate_checkpoint(folder, verify=False)


@contextmanager
def new_checkpoint(out: Path, source: Path) -> Iterator[Path]:
    """A folder with what `source` has beside its weights, which becomes `out` at the end.

    Left out are an index of weight files and what we say of a checkpoint (`flexquant.json`).

    Nothing is left of it if anything fails.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "checkpoint"
        folder.mkdir()
        for pattern in _KEPT:
            for file in source.glob(pattern):
                if file.name != SIDECAR and not file.name.endswith(".index.json"):
                    shutil.copy2(file, folder)
        yield folder
        if out.exists():
            out.rmdir()
        folder.rename(out)


def check_widths(widths: tuple[int, ...], layout: PlaneLayout) -> None:
    """Refuse widths to keep that the layout does not have.

    Raises:
        ValueError: naming the first of them.
    """
    if unknown := [width for width in widths if width not in layout.widths]:
        raise ValueError(
            f"width {unknown[0]} cannot be kept: layout {layout} has "
            f"{', '.join(map(str, layout.widths))}"
        )


def unquantized_bytes(model: Path, chosen: Iterable[str]) -> int:
    """Bytes of all tensors of a checkpoint but the weights of `chosen` modules."""
    left_out = {f"{name}.weight" for name in chosen}
    return sum(
        entry.data_offsets[1] - entry.data_offsets[0]
        for file in sorted(model.glob("*.safetensors"))
        for name, entry in read_header(file).items()
        if name not in left_out
    )


def _read_config(model: Path) -> dict:
    try:
        config = json.loads((model / "config.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{model} has no config.json; give a Hugging Face checkpoint") from None
    if existing := config.get("quantization_config"):
        raise ValueError(
            f"{model} is already quantized ({existing.get('quant_method')}); "
            "start from the unquantized checkpoint"
        )
    return config


def choose_layers(
    model: Path, options: FlexQuantOptions
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """(N, K) of linear layers to quantize, and those left alone with the reason."""
    chosen, ignored = {}, {}
    for name, (rows, columns) in linear_modules(model).items():
        if any(name == i or name.endswith(f".{i}") for i in options.ignore):
            ignored[name] = "named in ignore"
        elif name == OUTPUT_LAYER and not options.output_layer:
            ignored[name] = "output layer switched off"
        elif choose_group_size(columns, options.group_size) is None:
            ignored[name] = f"no group size divides its {columns} inputs"
        else:
            chosen[name] = (rows, columns)
    return chosen, ignored


def _tensors(files: list[Path]) -> Iterator[tuple[Path, str, torch.Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - safe_open is no mapping
                yield file, name, reader.get_tensor(name)


def _write_weights(
    files: list[Path],
    folder: Path,
    chosen: dict[str, tuple[int, int]],
    options: FlexQuantOptions,
    stored: StoredConfig,
    progress: Progress | None,
    rounded: Rounded | None,
) -> set[str]:
    """One output file per input file; returns the modules quantized."""
    written: set[str] = set()
    pending: dict[Path, dict[str, torch.Tensor]] = {}
    for file, name, tensor in _tensors(files):
        if file not in pending:
            flush(pending, folder)
            pending[file] = {}
        module = name.removesuffix(".weight")
        if name == module or module not in chosen:
            pending[file][name] = tensor
            continue
        group_size = choose_group_size(tensor.shape[1], options.group_size)
        assert group_size is not None
        quantized = (rounded.read(module) if rounded else None) or quantize_rtn(
            tensor, options.layout, group_size, options.scales, name=name
        )
        pending[file] |= _planes(module, quantized, stored)
        written.add(module)
        if progress:
            progress(module, len(written), len(chosen))
    if (
        rounded
        and {OUTPUT_LAYER} & set(chosen) - written
        and (output := rounded.read(OUTPUT_LAYER))
    ):
        # tied to the embedding, but with planes of its own
        pending[files[-1]] |= _planes(OUTPUT_LAYER, output, stored)
        written.add(OUTPUT_LAYER)
    flush(pending, folder)
    return written


def _planes(
    module: str, quantized: QuantizedWeight, stored: StoredConfig
) -> dict[str, torch.Tensor]:
    layout = PlaneLayout.parse(stored.layout)
    planes = pack_planes(quantized.codes, layout.planes)[: len(stored.planes_of(module))]
    scales = quantized.scales
    if scales.shape[2] > 1:
        scales = scales[:, :, [layout.widths.index(w) for w in stored.widths_of(module)]]
    names = tensor_names(module, len(planes))
    return dict(zip(names, [*planes, scales.contiguous()], strict=True))


def flush(pending: dict[Path, dict[str, torch.Tensor]], folder: Path) -> None:
    """Write the tensors of each file into a file of the same name in `folder`, and forget them."""
    for file, tensors in pending.items():
        metadata = {"format": "pt", "flexquant_format_version": FORMAT_VERSION}
        with writing(folder / file.name):
            save_file(tensors, folder / file.name, metadata=metadata)
    pending.clear()


def _output_layer(chosen: dict, written: set[str], config: dict) -> OutputLayer:
    if OUTPUT_LAYER in written:
        return OutputLayer.PLANES
    if OUTPUT_LAYER in chosen or config.get("tie_word_embeddings"):
        return OutputLayer.TIED
    return OutputLayer.PLAIN


def installed_versions() -> dict[str, str | None]:
    """Python's and those of the packages that made a checkpoint."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    names = ("vllm-flexquant", "torch", "safetensors")
    return {"python": platform.python_version(), **{n: installed(n) for n in names}}


def write_facts(
    folder: Path,
    config: dict[str, Any],
    stored: StoredConfig,
    origin: dict[str, Any],
    calibration: CalibrationRecord | None,
) -> None:
    """Write `config.json`, `flexquant.json` and, if it was calibrated, the model card.

    Args:
        config: of the model.
        origin: of the weights: `source` and its `source_files`, `method`, and what else is known.
    """
    config["quantization_config"] = stored.model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    record: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "files": {f.name: hash_file(f) for f in sorted(folder.glob("*.safetensors"))},
        "provenance": origin
        | {
            "command": sys.argv,
            "versions": installed_versions(),
        },
    }
    if calibration:
        record["calibration"] = calibration.model_dump(mode="json")
        write_card(folder, origin["source"], stored.layout, calibration)
    (folder / SIDECAR).write_text(json.dumps(record, indent=1))
