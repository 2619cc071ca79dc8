# SPDX-License-Identifier: Apache-2.0
"""The tokens that are teacher-forced, and what is recorded of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import fsum, sqrt
from pathlib import Path
from typing import Any

TEXT = Path(__file__).resolve().parents[1] / "data" / "text.txt"
"""The text that ships with the repository."""

FIRST_SCORED = 1
"""Position 0 comes out of the prompt's step, which may run at another width; it is not scored."""


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and the tokens that must follow it."""

    id: str
    prompt: list[int]
    forced: list[int]

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.forced]


def cut_text(
    tokenizer: Any, text: str, count: int, prompt: int = 16, forced: int = 112
) -> list[TokenSequence]:
    """Cut `count` sequences out of `text`, evenly spaced, none overlapping another.

    Args:
        tokenizer: of transformers. What it puts before every text (a BOS token) comes on top of
            `prompt`.
        prompt, forced: tokens of each sequence.

    Raises:
        ValueError: the text is too short.
    """
    first = tokenizer("")["input_ids"]
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    length, stride = prompt + forced, len(tokens) // max(count, 1)
    if count < 1 or stride < length:
        raise ValueError(
            f"{count} sequences of {length} tokens do not fit into a text of {len(tokens)} tokens; "
            f"ask for 1 to {len(tokens) // length}, or give a longer text"
        )
    parts = [tokens[i * stride : i * stride + length] for i in range(count)]
    return [
        TokenSequence(f"text-{i}", [*first, *part[:prompt]], part[prompt:])
        for i, part in enumerate(parts)
    ]


def save_sequences(path: Path, sequences: Iterable[TokenSequence]) -> None:
    """Write sequences as JSON."""
    path.write_text(json.dumps([asdict(s) for s in sequences]), encoding="utf-8")


def load_sequences(path: Path) -> list[TokenSequence]:
    """Read what `save_sequences` wrote."""
    return [TokenSequence(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def read_records(path: Path, run: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Records of one run by sequence and position.

    A position may occur twice: the logits of a prompt chunk that is not the last are computed and
    thrown away. The later record is the one that counts.
    """
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines if line.strip()]
    return {(r["id"], r["position"]): r for r in records if r["run"] == run}


def scored(
    records: dict[tuple[str, int], dict[str, Any]], sequences: Sequence[TokenSequence]
) -> list[dict[str, Any]]:
    """The records of all scored positions, in the order of `sequences`.

    Raises:
        ValueError: one is missing, so the engine did not decode what it was told to.
    """
    wanted = [(s.id, i) for s in sequences for i in range(FIRST_SCORED, len(s.forced))]
    if missing := [key for key in wanted if key not in records]:
        raise ValueError(f"{len(missing)} of {len(wanted)} tokens were not recorded: {missing[0]}")
    return [records[key] for key in wanted]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, taking the values for independent."""
    count = len(values)
    mean = fsum(values) / count
    if count < 2:
        return mean, float("nan")
    return mean, sqrt(fsum((v - mean) ** 2 for v in values) / (count - 1) / count)


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """KL in nats per token with its standard error, top-1 agreement, NLL of the text in nats."""
    kl, error = mean_and_error([r["kl"] for r in records])
    return {
        "tokens": len(records),
        "kl": kl,
        "kl_standard_error": error,
        "top1": fsum(r["top1"] for r in records) / len(records),
        "nll": fsum(r["nll"] for r in records) / len(records),
        "nll_reference": fsum(r["nll_reference"] for r in records) / len(records),
    }
