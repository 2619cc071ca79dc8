# SPDX-License-Identifier: Apache-2.0
"""Small models, what they are asked, and what comes of it."""

import json
import re
import shutil

import torch
from safetensors.torch import load_file, save_file

PROMPTS = ["The capital of France is", "Once upon a time,"]


def tokens(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def pin(llm, **changes):
    assert set(llm.collective_rpc("flexquant_change", args=(changes,))) == {""}


def folder_with_tokenizer(folder, model):
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder)


def small_checkpoint(folder, smollm2, config):
    """A random model of another shape with SmolLM2's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder_with_tokenizer(folder, smollm2)
    torch.manual_seed(0)  # the same tokens come out of every run
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.bfloat16().save_pretrained(folder)
    return folder


def first_blocks(folder, model, blocks):
    """A model with only its first blocks, which compiles in as much less time."""
    folder_with_tokenizer(folder, model)
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": blocks}
    (folder / "config.json").write_text(json.dumps(config))
    later = re.compile(r"model\.layers\.(\d+)\.")
    kept = {
        name: tensor
        for name, tensor in load_file(model / "model.safetensors").items()
        if not (found := later.match(name)) or int(found[1]) < blocks
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
