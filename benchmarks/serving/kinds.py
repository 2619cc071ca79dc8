# SPDX-License-Identifier: Apache-2.0
"""Prompts of three kinds: prose and code to go on with, and questions to answer.

Prose is the text of the benchmarks, which no checkpoint was calibrated on. Code and questions are
those of the calibration text `mix`: a checkpoint that was calibrated on it has seen them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT
from benchmarks.quality.sequences import TEXT
from vllm_flexquant.quantize.calibration import Document, read_text

_MIX = ROOT / "vllm_flexquant" / "quantize" / "mix"

FILES: dict[str, Path] = {
    "prose": TEXT,
    "code": _MIX / "code.txt",
    "chat": _MIX / "chat.jsonl",
}

ANSWER_STEP = 12
"""Where there are fewer conversations than prompts, they come again with so many tokens more of
their answer."""


@dataclass(frozen=True)
class Prompt:
    """`name` says in messages which one it is: kind and number."""

    name: str
    kind: str
    ids: list[int]


def make_prompts(
    files: Mapping[str, Path], tokenizer: Any, count: int, length: int
) -> dict[str, list[Prompt]]:
    """`count` prompts of each kind.

    Args:
        tokenizer: of transformers.
        length: tokens of a prompt that is cut from a text.

    Raises:
        ValueError: a text is too short.
    """
    return {
        kind: [
            Prompt(f"{kind} {n}", kind, ids)
            for n, ids in enumerate(_of_file(file, tokenizer, count, length))
        ]
        for kind, file in files.items()
    }


def in_turn(prompts: Mapping[str, Sequence[Prompt]], count: int) -> list[Prompt]:
    """`count` of all kinds, one of each after another."""
    kinds = list(prompts.values())
    return [kinds[i % len(kinds)][i // len(kinds)] for i in range(count)]


def of_round(prompts: Sequence[Prompt], number: int, count: int) -> list[list[int]]:
    """Tokens of the prompts of a round, other ones in each as far as they reach."""
    return [prompts[(number * count + i) % len(prompts)].ids for i in range(count)]


def _of_file(file: Path, tokenizer: Any, count: int, length: int) -> list[list[int]]:
    documents = read_text(str(file)).documents
    talks = [d for d in documents if not isinstance(d, str)]
    if talks:
        return [_question(talks[n % len(talks)], tokenizer, n // len(talks)) for n in range(count)]
    text = "".join(d for d in documents if isinstance(d, str)).replace("\f\n", "")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    stride = len(ids) // count
    if stride < length:
        raise ValueError(
            f"{file.name} has {len(ids)} tokens, too few for {count} prompts of {length}; ask for "
            f"{len(ids) // length} at most, or give a longer text"
        )
    first = tokenizer("")["input_ids"]
    return [[*first, *ids[n * stride : n * stride + length]] for n in range(count)]


def _question(talk: Document, tokenizer: Any, again: int) -> list[int]:
    """What a user asked, as the model's template has it, and so many steps into the answer."""
    assert not isinstance(talk, str)
    asked = [m for m in talk if m["role"] != "assistant"][:1]
    if getattr(tokenizer, "chat_template", None):
        rendered = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    else:
        rendered = asked[0]["content"] + "\n\n"
    ids: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    answer = next((m["content"] for m in talk if m["role"] == "assistant"), "")
    said = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return ids + said[: again * ANSWER_STEP]
