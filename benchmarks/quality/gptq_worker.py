# SPDX-License-Identifier: Apache-2.0
"""llm-compressor's GPTQ on the linear layers of a model's blocks, in an environment of its own.

    python benchmarks/quality/gptq_worker.py SETTINGS

Run by `dedicated_gptq.py`, whose other modules this environment lacks. SETTINGS is a JSON file with
model, tokens, weights and facts (paths), width, group_size, symmetric and observer. `tokens` is a
safetensors file with int64 [sequences, length]. Writes `weights`, fp32 [N, K] as dequantized by
layer name, then `facts`, JSON of what the tool says of itself.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

TOOL = "llmcompressor"
PACKAGES = (TOOL, "compressed-tensors", "torch", "transformers")


def quantize(settings: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Dequantized weights fp32 [N, K] by layer name, and facts; what is not set is the tool's own.

    Raises:
        SystemExit: layers that the tool rounded without error compensation, or not at all.
    """
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    tokens = load_file(settings["tokens"])["tokens"]
    columns = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    # fp32, as in our own calibration; the tool then keeps its scales in fp32 too
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    weights = {
        "num_bits": settings["width"],
        "type": "int",
        "symmetric": settings["symmetric"],
        "strategy": "group",
        "group_size": settings["group_size"],
        "observer": settings["observer"],
    }
    gptq = GPTQModifier(
        config_groups={"blocks": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    fallen_back: list[str] = []
    log = gptq._log_rtn_fallback_summary

    def note() -> None:  # the tool forgets them when it ends
        fallen_back.extend(gptq._rtn_fallback_module_names)
        log()

    object.__setattr__(gptq, "_log_rtn_fallback_summary", note)
    oneshot(
        model=model,
        processor=settings["model"],
        dataset=Dataset.from_dict(columns),
        recipe=gptq,
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
        max_seq_length=tokens.shape[1],
    )
    if fallen_back:
        raise SystemExit(f"rounded to nearest for want of an inverse: {', '.join(fallen_back)}")
    found = {
        name: layer.weight.detach().float().contiguous()
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings()
    }
    for name, weight in found.items():
        levels = most_levels(weight, settings["group_size"])
        if levels > 1 << settings["width"]:
            raise SystemExit(f"{name} has {levels} levels in a group; {TOOL} left it as it was")
    facts = {
        "tool": TOOL,
        "versions": {name: version(name) for name in PACKAGES},
        "damping": gptq.dampening_frac,
        "activation_order": str(gptq.actorder),
        "block_size": gptq.block_size,
    }
    return found, facts


def most_levels(weight: torch.Tensor, group_size: int) -> int:
    """How many values the group of `weight` [N, K] with the most has."""
    groups = weight.unflatten(1, (-1, group_size)).sort(-1).values
    return int((groups.diff(dim=-1) != 0).sum(-1).max()) + 1


def main() -> None:
    """Quantize and write; `facts` only when `weights` is whole."""
    from safetensors.torch import save_file

    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    weights, facts = quantize(settings)
    save_file({f"{name}.weight": w for name, w in weights.items()}, settings["weights"])
    Path(settings["facts"]).write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
