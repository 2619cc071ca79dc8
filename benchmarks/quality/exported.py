# SPDX-License-Identifier: Apache-2.0
"""What exporting one width costs: KL of static checkpoints beside the nested one at that width.

    python -m benchmarks.quality.exported --model FOLDER --checkpoint FOLDER [--text FILE]
        [--tokens N] EXPORTED...

Plain transformers in fp32, block by block, with fp32 activations: what the weights alone cost. The
output layer and the embedding are those of each folder; a tied output layer is unquantized in all
of them. Reference: the checkpoint as given (for the demo's model, the dequantized GGUF).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.provenance import provenance, write_json
from benchmarks.quality.calibrated import LENGTH, RESULTS, TEXT, read_tokens
from vllm_flexquant.format.compressed_tensors import unpack_int32
from vllm_flexquant.format.saved import SavedCheckpoint
from vllm_flexquant.quantize.blocks import BlockModel
from vllm_flexquant.quantize.evaluate import mean_and_error
from vllm_flexquant.quantize.one_width import EXPORT_RECORD, SavedModel

BATCH = 4


class ExportedModel(BlockModel):
    """A pack-quantized checkpoint as a model of plain weights."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor as stored, or dequantized to fp32."""
        module = name.removesuffix(".weight")
        if f"{module}.weight_packed" not in self._files:
            return super().read(name)
        packed, scales = super().read(f"{name}_packed"), super().read(f"{name}_scale")
        columns = int(super().read(f"{name}_shape")[1])
        bits = packed.shape[1] * 32 // columns
        zeros = torch.tensor(1 << (bits - 1))
        if f"{name}_zero_point" in self._files:
            zeros = unpack_int32(super().read(f"{name}_zero_point"), bits, dim=0)
        groups = unpack_int32(packed, bits).float().unflatten(1, (scales.shape[1], -1))
        return ((groups - zeros.float().unsqueeze(-1)) * scales.float().unsqueeze(-1)).flatten(1)


def compare(
    reference: BlockModel, models: Mapping[str, BlockModel], tokens: torch.Tensor
) -> dict[str, torch.Tensor]:
    """KL(reference || model) in nats of every token of int64 [sequences, length], by name."""
    batches = tokens.split(BATCH)
    everything = {"": reference, **models}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in models}
    with torch.inference_mode(), Progress() as progress:
        task = progress.add_task("blocks", total=len(reference) * len(everything))
        hidden = {n: [model.embed(batch) for batch in batches] for n, model in everything.items()}
        for name, model in everything.items():
            for index in range(len(model)):
                with model.loaded(index):
                    for i, batch in enumerate(batches):
                        model.match(batch)
                        hidden[name][i] = model.run(index, hidden[name][i])
                progress.advance(task)
        for i, batch in enumerate(batches):
            truth = torch.log_softmax(reference.logits(batch, hidden[""][i]), dim=-1)
            for name, model in models.items():
                served = torch.log_softmax(model.logits(batch, hidden[name][i]), dim=-1)
                found[name].append((truth.exp() * (truth - served)).sum(-1).flatten())
    return {name: torch.cat(parts) for name, parts in found.items()}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="KL of exported checkpoints.")
    parser.add_argument("--model", type=Path, required=True, help="unquantized checkpoint folder")
    parser.add_argument("--checkpoint", type=Path, required=True, help="flexquant checkpoint")
    parser.add_argument("exported", type=Path, nargs="+", help="folders that were exported from it")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=RESULTS / "exported.json")
    options = parser.parse_args()
    facts = provenance(options.model, options.text)
    tokens = read_tokens(options.text, options.model, options.tokens)
    saved = SavedCheckpoint(options.checkpoint)
    records = {}
    for folder in options.exported:
        record = json.loads((folder / EXPORT_RECORD).read_text(encoding="utf-8"))
        records[f"exported {record['width']} bit, {record['method']}"] = record
    models: dict[str, BlockModel] = {
        f"nested {width} bit": SavedModel(saved, width=width) for width in saved.layout.widths
    }
    models |= zip(records, map(ExportedModel, options.exported), strict=True)
    entries = {}
    for name, values in compare(BlockModel(options.model), models, tokens).items():
        kl, error = mean_and_error(values)
        entries[name] = {"kl_nats": kl, "standard_error": error}
    settings = {"tokens": tokens.numel(), "length": LENGTH, "exported": records}
    write_json(options.out, {"settings": settings, "entries": entries}, facts)
    table = Table("", "KL nats", "error", box=box.SIMPLE_HEAD)
    for name, entry in entries.items():
        table.add_row(name, f"{entry['kl_nats']:.4f}", f"{entry['standard_error']:.4f}")
    console = Console()
    console.print(table)
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
