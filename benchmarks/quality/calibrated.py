# SPDX-License-Identifier: Apache-2.0
"""What calibration is worth: KL of the calibrated checkpoint at each width, beside other ways.

    python -m benchmarks.quality.calibrated --model FOLDER --checkpoint FOLDER [--text FILE]
        [--tokens N] [--dedicated FOLDER]

Plain transformers in fp32, block by block, with fp32 activations: what the weights alone cost.
Compared on text that was not calibrated on: the calibrated checkpoint at its uniform widths and
along its ladder, nested round to nearest, and round to nearest with a grid for one width alone
(*dedicated*). Reference: the checkpoint as given (for the demo's model, the dequantized GGUF).

--dedicated, once for each width, names what `dedicated_gptq.py` has left: an outside tool's weights
are compared with ours at that width in the blocks, the output layer being left as it is.

Also what is stored: the checkpoint, a static one of 8 bits, and a static one for each level.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from benchmarks.provenance import ROOT, hash_model, provenance, write_json
from benchmarks.quality.dedicated_gptq import Dedicated
from vllm_flexquant.format.checkpoint import OUTPUT_LAYER, OutputLayer, read_sidecar
from vllm_flexquant.format.layout import PARENT_BITS, PlaneLayout, choose_group_size
from vllm_flexquant.format.record import CalibrationRecord, read_calibration
from vllm_flexquant.format.saved import SavedCheckpoint
from vllm_flexquant.quantize import evaluate
from vllm_flexquant.quantize.blocks import BlockModel, Unit
from vllm_flexquant.quantize.calibration import load_tokenizer
from vllm_flexquant.quantize.pipeline import unquantized_bytes
from vllm_flexquant.quantize.plots import write_plots
from vllm_flexquant.quantize.rtn import quantize_rtn
from vllm_flexquant.quantize.rungs import Sizes

TEXT = ROOT / "benchmarks" / "data" / "text.txt"
RESULTS = ROOT / "benchmarks" / "results"
LENGTH = 512
MEAN_BITS = 5.0
"""Where the ladder is compared with a mix of uniform widths."""

TARGETS = (
    ("4 bit over nested round to nearest", "calibrated 4", "nested to nearest 4", 0.6),
    ("3 bit over nested round to nearest", "calibrated 3", "nested to nearest 3", 1.0),
    ("6 bit over dedicated round to nearest", "calibrated 6", "dedicated to nearest 6", 1.1),
    ("8 bit over dedicated round to nearest", "calibrated 8", "dedicated to nearest 8", 1.1),
)

DEDICATED_BOUND = 1.05
"""Most that KL at a width may be over that of an outside tool's GPTQ for the width alone."""

STORED_BOUND = 1.08
"""Most that a checkpoint may take of a static one of 8 bits with the same groups."""

BLOCKS_ONLY = "blocks only"

Source = Callable[[str, torch.Tensor, int], evaluate.Weight]
"""Name, weight and group size of a layer to what it is at each width."""


class Dense(NamedTuple):
    """A weight [N, K] that is the same at every width."""

    weight: torch.Tensor

    def dequantize(self, layout: PlaneLayout, width: int) -> torch.Tensor:
        return self.weight


class _Stored(NamedTuple):
    """A layer of a checkpoint, read when it is wanted."""

    checkpoint: SavedCheckpoint
    name: str

    def dequantize(self, layout: PlaneLayout, width: int) -> torch.Tensor:
        return self.checkpoint.dequantize(self.name, width)


class StoredCheckpoint(SavedCheckpoint):
    """A saved checkpoint that was calibrated.

    Raises:
        SystemExit: it was not.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        record = read_calibration(read_sidecar(folder))
        if record is None or record.ladder is None:
            raise SystemExit(f"{folder} is not calibrated; quantize the model with calibration")
        self.record: CalibrationRecord = record

    def layer(self, name: str, weight: torch.Tensor, group_size: int) -> evaluate.Weight:
        """As stored; a tied output layer is rounded from the embedding, as the engine does."""
        if name == OUTPUT_LAYER and self.stored.output_layer is OutputLayer.TIED:
            return quantize_rtn(weight, self.layout, group_size)
        return _Stored(self, name)


def nested(layout: PlaneLayout) -> Source:
    """Round to nearest, all widths in one code."""
    return lambda name, weight, group_size: quantize_rtn(weight, layout, group_size, name=name)


def dedicated(width: int) -> Source:
    """Round to nearest on a grid of `width` bits from the smallest to the largest of a group."""

    def quantize(_: str, weight: torch.Tensor, group_size: int) -> evaluate.Weight:
        groups = weight.float().unflatten(1, (-1, group_size))
        lowest, highest = groups.amin(-1), groups.amax(-1)
        offset = lowest.half().float().unsqueeze(-1)
        top = (1 << width) - 1
        scale = ((highest.unsqueeze(-1) - offset) / top).clamp_min(2.0**-24).half().float()
        codes = ((groups - offset) / scale).round_().clamp_(0, top)
        return Dense((codes * scale + offset).flatten(1))

    return quantize


def given(folder: Dedicated) -> Source:
    """Weights from a folder."""
    return lambda name, weight, _: Dense(folder.weight(name, weight.shape))


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

    def uniform(self, width: int, blocks_only: bool = False) -> dict[str, int]:
        """All units at a width, or all but the output layer."""
        return {n: width for n in self.names if not (blocks_only and n == OUTPUT_LAYER)}

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

    def _read(self, source: Source, index: int) -> dict[str, evaluate.Weight]:
        if index == evaluate.OUTPUT_INDEX:
            layers = [(OUTPUT_LAYER, self.model.model.get_output_embeddings())]
            quantized = {OUTPUT_LAYER}
        else:
            layers = self.model.linears(index)
            quantized = {name for unit in self.blocks[index] for name in unit.members}
        stored = {}
        for name, layer in layers:
            if name in quantized:
                size = choose_group_size(layer.in_features, self.checkpoint.stored.group_size)
                assert size is not None, "or it had not been quantized"
                stored[name] = source(name, layer.weight.data, size)
        return stored


def read_tokens(text: Path, model: Path, most: int) -> torch.Tensor:
    """The first tokens of a text, int64 [sequences, LENGTH], `most` of them at the most.

    Raises:
        SystemExit: they do not fill one sequence.
    """
    tokenizer = load_tokenizer(model)
    content = text.read_text(encoding="utf-8")
    ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(most, len(ids)) // LENGTH
    if count == 0:
        raise SystemExit(f"{text} has {len(ids)} tokens; give at least {LENGTH}")
    return torch.tensor(ids[: count * LENGTH]).reshape(count, LENGTH)


def _advance(progress: Progress, task: TaskID, done: int) -> None:
    progress.update(task, completed=done)


def mix(kl: Mapping[int, float], bits: float) -> float:
    """KL of uniform widths at `bits` mean bits, choosing between the two around it at random."""
    low = max(w for w in kl if w <= bits)
    high = min(w for w in kl if w >= bits)
    share = (bits - low) / (high - low) if high > low else 0.0
    return (1 - share) * kl[low] + share * kl[high]


def measure(
    comparison: Comparison, rungs: int, folders: Sequence[Dedicated], progress: Progress
) -> dict[str, Any]:
    """KL and standard error of everything compared, and the figures to reach.

    All of it in one sweep over the blocks, so that the reference is run once.
    """
    record, layout = comparison.checkpoint.record, comparison.layout
    assert record.ladder is not None
    sources: list[Source] = []
    choices: dict[str, dict[str, int]] = {}
    facts: dict[str, dict[str, Any]] = {}

    def add(name: str, source: Source, widths: Mapping[str, int], bits: float) -> None:
        if source not in sources:
            sources.append(source)
        choices[name] = {n: _key(sources.index(source), w) for n, w in widths.items()}
        facts[name] = {"mean_bits": bits}
        if OUTPUT_LAYER in comparison.names and OUTPUT_LAYER not in widths:
            facts[name]["blocks_only"] = True

    alone = [folder.width for folder in folders]
    calibrated, nearest = comparison.checkpoint.layer, nested(layout)
    for width in sorted(record.uniform_kl):
        for kind, source in (
            ("calibrated", calibrated),
            ("nested to nearest", nearest),
            ("dedicated to nearest", dedicated(width)),
        ):
            add(f"{kind} {width}", source, comparison.uniform(width), width)
            if width in alone:
                blocks = comparison.uniform(width, blocks_only=True)
                add(f"{kind} {width}, {BLOCKS_ONLY}", source, blocks, width)
    for folder in folders:
        blocks = comparison.uniform(folder.width, blocks_only=True)
        add(folder.label, given(folder), blocks, folder.width)
    count = len(record.ladder.rungs) - 1
    bits = [rung.mean_bits for rung in record.ladder.rungs]
    at_mean = min(range(len(bits)), key=lambda i: abs(bits[i] - MEAN_BITS))
    for steps in sorted({at_mean, *(i * count // max(rungs - 1, 1) for i in range(rungs))}):
        widths = record.widths_after(steps)
        add(f"level {count - steps}", calibrated, widths, bits[steps])
    found = comparison.kl(_any_of(sources), list(choices.values()), progress, "all")
    results = {}
    for name, values in zip(choices, found, strict=True):
        kl, error = evaluate.mean_and_error(values)
        results[name] = facts[name] | {"kl_nats": kl, "standard_error": error}
    return {"entries": results, "targets": targets(results, record, at_mean, folders)}


_MOST_BITS = 16


def _key(source: int, width: int) -> int:
    """Stands for a width where several sources are swept together."""
    return source * _MOST_BITS + width


class _Any(NamedTuple):
    """A layer as any of some sources has it, by `_key`."""

    sources: Sequence[Source]
    layer: tuple[str, torch.Tensor, int]

    def dequantize(self, layout: PlaneLayout, width: int) -> torch.Tensor:
        source, bits = divmod(width, _MOST_BITS)
        return self.sources[source](*self.layer).dequantize(layout, bits)


def _any_of(sources: Sequence[Source]) -> Source:
    return lambda *layer: _Any(sources, layer)


def targets(
    results: Mapping[str, Mapping[str, Any]],
    record: CalibrationRecord,
    at_mean: int,
    folders: Sequence[Dedicated],
) -> list[dict[str, Any]]:
    """The figures to reach, with what was found; `at_mean` is the level compared with a mix."""
    assert record.ladder is not None

    def ratio(name: str, above: str, below: str, bound: float) -> dict[str, Any]:
        value = results[above]["kl_nats"] / results[below]["kl_nats"]
        return {"target": name, "value": value, "bound": bound}

    found = [ratio(*row) for row in TARGETS if row[1] in results and row[2] in results]
    for folder in folders:
        name = f"{folder.width} bit over {folder.label}, {BLOCKS_ONLY}"
        above = f"calibrated {folder.width}, {BLOCKS_ONLY}"
        found.append(ratio(name, above, folder.label, DEDICATED_BOUND))
    rung = record.ladder.rungs[at_mean]
    level = f"level {len(record.ladder.rungs) - 1 - at_mean}"
    uniform = {w: results[f"calibrated {w}"]["kl_nats"] for w in record.uniform_kl}
    found.append(
        {
            "target": f"ladder at {rung.mean_bits:.2f} mean bits over uniform widths mixed",
            "value": results[level]["kl_nats"] / mix(uniform, rung.mean_bits),
            "bound": 0.7,
        }
    )
    return found


def storage(comparison: Comparison, model: Path) -> dict[str, Any]:
    """Bytes of the checkpoint and of static ones with the same groups, a scale and an offset each.

    static_channelwise_bytes: 8 bits with one scale per output and no offset. A tied output layer is
    counted with the embedding, once.
    """
    checkpoint, record = comparison.checkpoint, comparison.checkpoint.record
    assert record.ladder is not None
    units = [unit for block in comparison.blocks for unit in block]
    chosen = {name for unit in units for name in unit.members}
    if checkpoint.stored.output_layer is OutputLayer.PLANES:
        rows, columns = checkpoint.modules[OUTPUT_LAYER]
        units.append(Unit((OUTPUT_LAYER,), (rows,), columns))
        chosen.add(OUTPUT_LAYER)
    other = unquantized_bytes(model, chosen)
    sizes = Sizes(units, checkpoint.stored.group_size, checkpoint.layout.widths, other=other)

    def static(widths: Mapping[str, int]) -> int:
        return other + sizes.read({unit.name: widths[unit.name] for unit in units})

    stored = sum(file.stat().st_size for file in checkpoint.folder.glob("*.safetensors"))
    eight = static(comparison.uniform(PARENT_BITS))
    levels = [static(record.widths_after(n)) for n in range(len(record.ladder.rungs))]
    rows = sum(n for unit in units for n in unit.rows)
    return {
        "checkpoint_bytes": stored,
        "static_8_bit_bytes": eight,
        "static_channelwise_bytes": other + sum(unit.weights for unit in units) + 2 * rows,
        "static_per_level_bytes": sum(levels),
        "levels": len(levels),
        "over_static_8_bit": stored / eight,
        "per_level_over_checkpoint": sum(levels) / stored,
        "per_uniform_width_over_checkpoint": sum(
            static(comparison.uniform(w)) for w in record.uniform_kl
        )
        / stored,
    }


def read_dedicated(
    folders: Sequence[Path], model: Path, checkpoint: StoredCheckpoint
) -> list[Dedicated]:
    """Folders of `dedicated_gptq.py`, for widths of the checkpoint.

    Raises:
        SystemExit: made from another model, text or group size, of a width that the checkpoint
            lacks, or two of one width.
    """
    found = [Dedicated.read(folder) for folder in folders]
    hashes = hash_model(model) if found else {}
    for entry in found:
        entry.check(
            model_sha256=hashes,
            text_sha256=checkpoint.record.text["sha256"],
            group_size=checkpoint.stored.group_size,
        )
        if entry.width not in checkpoint.layout.widths:
            raise SystemExit(
                f"{entry.folder} is of {entry.width} bits, and the checkpoint has "
                f"{', '.join(map(str, checkpoint.layout.widths))}; make one of these"
            )
    if len({entry.label for entry in found}) < len(found):
        raise SystemExit("--dedicated names two checkpoints of one kind; give one for each width")
    return found


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
    kept = results["storage"]
    console.print(
        f"{kept['checkpoint_bytes'] / 1e6:.1f} MB stored, a static checkpoint of 8 bits "
        f"{kept['static_8_bit_bytes'] / 1e6:.1f} (one scale per output "
        f"{kept['static_channelwise_bytes'] / 1e6:.1f}); one for each of {kept['levels']} levels "
        f"{kept['per_level_over_checkpoint']:.0f} times as much, for each uniform width "
        f"{kept['per_uniform_width_over_checkpoint']:.2f}",
        highlight=False,
    )
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
            if n.startswith(kind) and "blocks_only" not in e
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
    parser.add_argument(
        "--dedicated",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="what dedicated_gptq.py has left; once for each width",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "calibrated.json")
    options = parser.parse_args()
    facts = provenance(options.model, options.text)
    tokens = read_tokens(options.text, options.model, options.tokens)
    checkpoint = StoredCheckpoint(options.checkpoint)
    folders = read_dedicated(options.dedicated, options.model, checkpoint)
    with Progress() as progress:
        comparison = Comparison(BlockModel(options.model), tokens, checkpoint)
        results = measure(comparison, options.rungs, folders, progress)
    results["storage"] = storage(comparison, options.model)
    results["targets"].append(
        {
            "target": "bytes stored over a static checkpoint of 8 bits with the same groups",
            "value": results["storage"]["over_static_8_bit"],
            "bound": STORED_BOUND,
        }
    )
    made = read_sidecar(options.checkpoint)["provenance"]
    settings = {
        "tokens": tokens.numel(),
        "length": LENGTH,
        # its command has paths of the machine that it was made on
        "checkpoint": {key: value for key, value in made.items() if key != "command"},
        "calibration_text": checkpoint.record.text,
        "dedicated": [folder.facts for folder in folders],
    }
    write_json(options.out, {"settings": settings} | results, facts)
    plot(results, options.out.with_suffix(".png"))
    for name in write_plots(options.out.parent, checkpoint.record):
        made_plot = options.out.parent / name
        made_plot.replace(made_plot.with_name(f"{options.out.stem}-{name}"))
    console = Console()
    show(results, console)
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
