# SPDX-License-Identifier: Apache-2.0
"""Shared scales against scales per width: KL of the model's output, and bytes.

    python -m benchmarks.quality.scales --model FOLDER [--text FILE] [--tokens N]

Plain transformers in fp32, every linear layer and the output layer replaced by its nested weights
at one width; the embedding that is looked up stays as it is. Reference: the checkpoint as given
(for the demo model, the dequantized GGUF).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from benchmarks.provenance import provenance, write_json
from benchmarks.quality.divergence import compare
from flexquant_kernels import pack, reference
from vllm_flexquant.format.layout import PARENT_BITS, PlaneLayout, ScaleMode, choose_group_size
from vllm_flexquant.quantize.rtn import quantize_rtn

DATA = Path(__file__).parent.parent / "data" / "text.txt"
CONTEXT = 256
"""Tokens per sequence."""


def linear_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    """All linear layers; a tied output layer gets a weight of its own."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            if name == "lm_head":
                module.weight = torch.nn.Parameter(module.weight.detach().clone())
            yield name, module


def log_probs(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """fp32 [sequences * tokens, vocabulary], a sequence at a time."""
    with torch.inference_mode():
        return torch.cat([functional.log_softmax(model(t[None]).logits[0], -1) for t in tokens])


def measure(
    model: torch.nn.Module, tokens: torch.Tensor, layouts: list[str], groups: list[int]
) -> list[dict[str, Any]]:
    """One entry per layout, group size, scale mode and width."""
    layers = dict(linear_layers(model))
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    truth = log_probs(model, tokens)
    results = []
    for layout, group, mode in (
        (PlaneLayout.parse(text), g, m) for text in layouts for g in groups for m in ScaleMode
    ):
        nested, stored = {}, 0
        for name, weight in weights.items():
            size = choose_group_size(weight.shape[1], group)
            if size is None:
                raise SystemExit(f"no group size divides the {weight.shape[1]} inputs of {name}")
            codes, scales = quantize_rtn(weight, layout, size, mode, name)
            nested[name] = (pack.pack_planes(codes, layout.planes), scales, size)
            stored += codes.numel() + scales.numel() * 2
        for width in layout.widths:
            read = 0
            for name, (planes, scales, size) in nested.items():
                n, k = weights[name].shape
                layers[name].weight.data = reference.dequantize(
                    planes, scales, layout.planes, width, size, n, tile=0
                )
                read += n * k * width // PARENT_BITS + n * k // size * 4
            rows = log_probs(model, tokens)
            divergence, agrees = compare(truth, rows)
            results.append(
                {
                    "layout": str(layout),
                    "group_size": group,
                    "scales": mode.value,
                    "width": width,
                    "kl_nats": float(divergence.mean()),
                    "kl_standard_error": float(divergence.std() / len(divergence) ** 0.5),
                    "top1_agreement": float(agrees.float().mean()),
                    "bytes_stored": stored,
                    "bytes_read_per_step": read,
                }
            )
    return results


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, default=DATA)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layouts", nargs="+", default=["4|2|2", "2|1|1|2|2"])
    parser.add_argument("--groups", nargs="+", type=int, default=[64, 128])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent.parent / "results" / "scales.json"
    )
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    ids = tokenizer(arguments.text.read_text(), return_tensors="pt").input_ids[0]
    count = min(arguments.tokens, len(ids)) // CONTEXT
    tokens = ids[: count * CONTEXT].reshape(count, CONTEXT)
    results = measure(model, tokens, arguments.layouts, arguments.groups)
    write_json(
        arguments.out,
        {"tokens": tokens.numel(), "context": CONTEXT, "entries": results},
        provenance(model=arguments.model, text=arguments.text),
    )
    table = Table("layout", "group", "scales", "width", "KL nats/token", "top-1", "MB stored")
    for r in results:
        table.add_row(
            r["layout"],
            str(r["group_size"]),
            r["scales"],
            str(r["width"]),
            f"{r['kl_nats']:.4f} ± {r['kl_standard_error']:.4f}",
            f"{r['top1_agreement']:.3f}",
            f"{r['bytes_stored'] / 1e6:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
