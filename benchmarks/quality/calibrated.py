# SPDX-License-Identifier: Apache-2.0
"""What calibration is worth: KL of the calibrated checkpoint at each width, beside other ways.

    python -m benchmarks.quality.calibrated --model FOLDER --checkpoint FOLDER [--text FILE]
        [--tokens N] [--plot]

Plain transformers in fp32, block by block, with fp32 activations: what the weights alone cost.
Compared on text that was not calibrated on: the calibrated checkpoint at its uniform widths and
along its ladder, nested round to nearest, and round to nearest with a grid for one width alone
(*dedicated*). Reference: the checkpoint as given (for the demo's model, the dequantized GGUF).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from safetensors import safe_open

from benchmarks.provenance import ROOT, provenance, write_json
from flexquant_kernels.pack import unpack_planes
from vllm_flexquant.format.checkpoint import (
    OUTPUT_LAYER,
    OutputLayer,
    StoredConfig,
    read_sidecar,
    tensor_names,
    validate_checkpoint,
)
from vllm_flexquant.format.layout import PARENT_BITS, PlaneLayout, choose_group_size
from vllm_flexquant.format.record import CalibrationRecord, read_calibration
from vllm_flexquant.quantize import evaluate
from vllm_flexquant.quantize.blocks import BlockModel, Unit
from vllm_flexquant.quantize.calibration import load_tokenizer
from vllm_flexquant.quantize.rtn import QuantizedWeight, quantize_rtn

TEXT = ROOT / "benchmarks" / "data" / "text.txt"
RESULTS = ROOT / "benchmarks" / "results"
LENGTH = 512
MEAN_BITS = 5.0
"""Where the ladder is compared with a mix of uniform widths."""

TARGETS = (
    ("4 bit over nested round to nearest", "calibrated 4", "nested to nearest 4", 0.6),
    ("6 bit over dedicated round to nearest", "calibrated 6", "dedicated to nearest 6", 1.1),
    ("8 bit over dedicated round to nearest", "calibrated 8", "dedicated to nearest 8", 1.1),
)

Source = Callable[[str, torch.Tensor, int], QuantizedWeight]
"""Name, weight and group size of a layer to codes and scales."""


class StoredCheckpoint:
    """Codes and scales of a saved checkpoint."""

    def __init__(self, folder: Path) -> None:
        validate_checkpoint(folder)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        self.config = StoredConfig.read(config)
        self.layout = PlaneLayout.parse(self.config.layout)
        self.files = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as reader:
                self.files.update(dict.fromkeys(reader.keys(), file))
        record = read_calibration(read_sidecar(folder))
        if record is None or record.ladder is None:
            raise SystemExit(f"{folder} is not calibrated; quantize the model with calibration")
        self.record: CalibrationRecord = record

    def layer(self, name: str, weight: torch.Tensor, group_size: int) -> QuantizedWeight:
        """As stored; a tied output layer is rounded from the embedding, as the engine does."""
        if name == OUTPUT_LAYER and self.config.output_layer is OutputLayer.TIED:
            return quantize_rtn(weight, self.layout, group_size)
        *planes, scales = (self._read(n) for n in tensor_names(name, len(self.layout.planes)))
        codes = unpack_planes(planes, self.layout.planes, PARENT_BITS, weight.shape[1])
        return QuantizedWeight(codes, scales)

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], framework="pt") as reader:
            return reader.get_tensor(name)


def dedicated(layout: PlaneLayout, width: int) -> Source:
    """Round to nearest on a grid of `width` bits from the smallest to the largest of a group."""

    def quantize(_: str, weight: torch.Tensor, group_size: int) -> QuantizedWeight:
        groups = weight.float().unflatten(1, (-1, group_size))
        lowest, highest = groups.amin(-1), groups.amax(-1)
        offset = lowest.half()
        top = (1 << width) - 1
        scale = ((highest - offset.float()) / top).clamp_min(2.0**-24).half()
        codes = (groups - offset.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
        codes = codes.round_().clamp_(0, top).flatten(1).to(torch.uint8)
        pair = torch.stack((scale, offset), dim=-1)
        scales = pair.unsqueeze(2).expand(-1, -1, len(layout.widths), -1)
        return QuantizedWeight(codes << (PARENT_BITS - width), scales)

    return quantize


class Comparison:
    """KL of many choices on one text."""

    def __init__(
        self, model: BlockModel, tokens: torch.Tensor, checkpoint: StoredCheckpoint
    ) -> None:
        self.model, self.tokens, self.checkpoint = model, tokens, checkpoint
        self.layout = checkpoint.layout
        layers = {name: unit for unit in checkpoint.record.units for name in unit.layers}
        self.blocks: list[list[Unit]] = []
        for index in range(len(model)):
            found: dict[tuple[str, ...], list[torch.nn.Linear]] = {}
            for name, linear in model.linears(index):
                if name in layers:
                    found.setdefault(layers[name].layers, []).append(linear)
            self.blocks.append(
                [
                    Unit(names, tuple(m.out_features for m in part), part[0].in_features)
                    for names, part in found.items()
                ]
            )
        self.names = [unit.name for unit in checkpoint.record.units]

    def kl(
        self,
        source: Source,
        choices: Sequence[Mapping[str, int]],
        progress: Progress | None = None,
        label: str = "",
    ) -> torch.Tensor:
        """KL in nats, fp32 [choices, tokens]."""
        advance = None
        if progress:
            task = progress.add_task(label, total=len(self.model))
            advance = partial(_advance, progress, task)
        return evaluate.divergence(self.nested(source), self.tokens, choices, advance)

    def nested(self, source: Source) -> evaluate.NestedModel:
        """The model with layers as `source` has them."""
        return evaluate.NestedModel(
            self.model, self.blocks, self.layout, partial(self._read, source)
        )

    def _read(self, source: Source, index: int) -> dict[str, QuantizedWeight]:
        if index == evaluate.OUTPUT_INDEX:
            layers = [(OUTPUT_LAYER, self.model.model.get_output_embeddings())]
        else:
            layers = self.model.linears(index)
        stored = {}
        for name, layer in layers:
            group_size = choose_group_size(layer.in_features, self.checkpoint.config.group_size)
            if group_size is not None:
                stored[name] = source(name, layer.weight.data, group_size)
        return stored


def _advance(progress: Progress, task: TaskID, done: int) -> None:
    progress.update(task, completed=done)


def mix(kl: Mapping[int, float], bits: float) -> float:
    """KL of uniform widths at `bits` mean bits, choosing between the two around it at random."""
    low = max(w for w in kl if w <= bits)
    high = min(w for w in kl if w >= bits)
    share = (bits - low) / (high - low) if high > low else 0.0
    return (1 - share) * kl[low] + share * kl[high]


def measure(comparison: Comparison, rungs: int, progress: Progress) -> dict[str, Any]:
    """KL and standard error of everything compared, and the figures to reach."""
    record, layout = comparison.checkpoint.record, comparison.layout
    assert record.ladder is not None
    uniform = [dict.fromkeys(comparison.names, w) for w in layout.widths]
    count = len(record.ladder.rungs) - 1
    bits = [rung.mean_bits for rung in record.ladder.rungs]
    at_mean = min(range(len(bits)), key=lambda i: abs(bits[i] - MEAN_BITS))
    picked = sorted({at_mean, *(i * count // max(rungs - 1, 1) for i in range(rungs))})
    results: dict[str, Any] = {}

    def take(name: str, values: torch.Tensor, **facts: Any) -> None:
        kl, error = evaluate.mean_and_error(values)
        results[name] = {"kl_nats": kl, "standard_error": error} | facts

    choices = [*uniform, *(record.widths_after(i) for i in picked)]
    found = comparison.kl(comparison.checkpoint.layer, choices, progress, "calibrated")
    for width, values in zip(layout.widths, found, strict=False):
        take(f"calibrated {width}", values, mean_bits=width)
    for steps, values in zip(picked, found[len(uniform) :], strict=True):
        take(f"level {count - steps}", values, mean_bits=bits[steps])

    def nearest(name: str, weight: torch.Tensor, group_size: int) -> QuantizedWeight:
        return quantize_rtn(weight, layout, group_size, name=name)

    for width, values in zip(
        layout.widths, comparison.kl(nearest, uniform, progress, "nested, to nearest"), strict=True
    ):
        take(f"nested to nearest {width}", values, mean_bits=width)
    for width, choice in zip(layout.widths, uniform, strict=True):
        (values,) = comparison.kl(
            dedicated(layout, width), [choice], progress, f"dedicated {width}, to nearest"
        )
        take(f"dedicated to nearest {width}", values, mean_bits=width)
    ladder = results[f"level {count - at_mean}"]["kl_nats"]
    plain = mix({w: results[f"calibrated {w}"]["kl_nats"] for w in layout.widths}, MEAN_BITS)
    targets = [
        {"target": name, "value": results[a]["kl_nats"] / results[b]["kl_nats"], "bound": bound}
        for name, a, b, bound in TARGETS
        if a in results and b in results
    ]
    targets.append(
        {
            "target": f"ladder at {bits[at_mean]:.2f} mean bits over uniform widths mixed",
            "value": ladder / plain,
            "bound": 0.7,
        }
    )
    return {"entries": results, "targets": targets}


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("", "mean bits", "KL nats", "error"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, entry in results["entries"].items():
        table.add_row(
            name,
            f"{entry['mean_bits']:.2f}",
            f"{entry['kl_nats']:.5f}",
            f"{entry['standard_error']:.5f}",
        )
    console.print(table)
    for target in results["targets"]:
        met = "met" if target["value"] <= target["bound"] else "NOT MET"
        console.print(
            f"- {target['target']}: {target['value']:.2f}, at most {target['bound']:g}: {met}",
            highlight=False,
        )


def plot(results: dict[str, Any], file: Path) -> None:
    """KL against mean bits."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    kinds = {
        "level": ("o-", "calibrated, along the ladder"),
        "calibrated": ("s--", "calibrated, uniform widths"),
        "dedicated": ("^:", "to nearest, a checkpoint for each width"),
        "nested": ("v:", "to nearest, nested"),
    }
    for kind, (style, label) in kinds.items():
        points = sorted(
            (e["mean_bits"], e["kl_nats"])
            for n, e in results["entries"].items()
            if n.startswith(kind)
        )
        axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(yscale="log", xlabel="mean bits", ylabel="KL, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="KL of a calibrated checkpoint.")
    parser.add_argument("--model", type=Path, required=True, help="unquantized checkpoint folder")
    parser.add_argument("--checkpoint", type=Path, required=True, help="calibrated checkpoint")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--rungs", type=int, default=9, help="levels of the ladder to measure")
    parser.add_argument("--out", type=Path, default=RESULTS / "calibrated.json")
    options = parser.parse_args()
    facts = provenance(options.model, options.text)
    tokenizer = load_tokenizer(options.model)
    text = options.text.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(options.tokens, len(ids)) // LENGTH
    if count == 0:
        raise SystemExit(f"{options.text} has {len(ids)} tokens; give at least {LENGTH}")
    tokens = torch.tensor(ids[: count * LENGTH]).reshape(count, LENGTH)
    checkpoint = StoredCheckpoint(options.checkpoint)
    with Progress() as progress:
        comparison = Comparison(BlockModel(options.model), tokens, checkpoint)
        results = measure(comparison, options.rungs, progress)
    made = read_sidecar(options.checkpoint)["provenance"]
    settings = {
        "tokens": tokens.numel(),
        "length": LENGTH,
        # its command has paths of the machine that it was made on
        "checkpoint": {key: value for key, value in made.items() if key != "command"},
        "calibration_text": checkpoint.record.text,
    }
    write_json(options.out, {"settings": settings} | results, facts)
    plot(results, options.out.with_suffix(".png"))
    console = Console()
    show(results, console)
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
