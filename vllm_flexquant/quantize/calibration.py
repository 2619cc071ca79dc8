# SPDX-License-Identifier: Apache-2.0
"""Calibration text: where it comes from, and the token sequences that are cut from it.

Text is a list of documents. A document that is a conversation goes through the model's chat
template where it has one. Documents are joined with the end-of-text token and cut into sequences of
equal length; of every few sequences one is held back, for measuring what the others were used to
make.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN = "mix"
"""Name of the text that comes with the package (`mix/README.md`)."""

HELD_BACK = 4
"""One sequence in so many is held back."""

LEAST_SEQUENCES = 8
"""Fewer sequences than this do not make a Hessian of any use."""

Document = str | list[dict[str, str]]
"""Text, or the messages of a conversation: `role` and `content`."""


@dataclass(frozen=True)
class CalibrationText:
    """`documents`, and what the record says of them: `name`, and `sha256` over all of them."""

    name: str
    documents: tuple[Document, ...]
    sha256: str


@dataclass(frozen=True)
class CalibrationTokens:
    """int64 [sequences, length] to calibrate with, and to measure with."""

    fit: torch.Tensor
    held_back: torch.Tensor


def read_text(source: str) -> CalibrationText:
    """The calibration text that `source` names.

    Args:
        source: `mix`, a `.txt`, `.jsonl` or `.json` file (of `{"text": ...}` or
            `{"messages": [...]}` per line), or the name of a dataset on the hub,
            `NAME[:CONFIG[:SPLIT]]`, which needs the package `datasets`.

    Raises:
        ValueError: an unknown or unreadable source, or one without text.
    """
    path = Path(source)
    if source == BUILT_IN:
        documents = list(_built_in())
    elif path.is_file():
        documents = list(_from_file(path))
    elif path.suffix in (".txt", ".jsonl", ".json") or path.exists():
        raise ValueError(f"calibration text {source} is no file; name a .txt or .jsonl file")
    else:
        documents = list(_from_hub(source))
    documents = [d for d in documents if d]
    if not documents:
        raise ValueError(f"calibration text {source} is empty; name one with text in it")
    content = json.dumps(documents, ensure_ascii=False).encode()
    name = path.name if path.is_file() else source
    return CalibrationText(name, tuple(documents), hashlib.sha256(content).hexdigest())


def cut_tokens(
    text: CalibrationText, tokenizer: PreTrainedTokenizerBase, sequences: int, length: int
) -> CalibrationTokens:
    """Tokenize and cut; where there is more text than needed, sequences are taken evenly.

    Args:
        sequences: to calibrate with; a third as many more are held back.
        length: tokens of a sequence.

    Raises:
        ValueError: fewer than `LEAST_SEQUENCES` sequences come out.
    """
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for document in text.documents:
        rendered = _rendered(document, tokenizer)
        # verbose: no warning that a document is longer than the context
        ids += tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        if end is not None:
            ids.append(end)
    count = len(ids) // length
    if count < LEAST_SEQUENCES:
        raise ValueError(
            f"calibration text {text.name} has {len(ids)} tokens, {count} sequences of {length}; "
            f"give at least {LEAST_SEQUENCES * length} tokens"
        )
    rows = torch.tensor(ids[: count * length]).reshape(count, length)
    wanted = min(count, max(LEAST_SEQUENCES, -(-sequences * HELD_BACK // (HELD_BACK - 1))))
    rows = rows[torch.arange(wanted) * count // wanted]
    held = torch.arange(wanted) % HELD_BACK == HELD_BACK - 1
    return CalibrationTokens(rows[~held], rows[held])


def take_evenly(sequences: torch.Tensor, share: float) -> torch.Tensor:
    """So many of the sequences, from all over; at least one."""
    count = max(1, round(len(sequences) * share))
    return sequences[torch.arange(count) * len(sequences) // count]


def load_tokenizer(model: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder.

    Raises:
        ValueError: it has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(
            f"{model} has no tokenizer that transformers can load ({error}); copy the tokenizer's "
            "files into it, or use --method rtn, which needs no text"
        ) from None


def _rendered(document: Document, tokenizer: Any) -> str:
    if isinstance(document, str):
        return document
    if getattr(tokenizer, "chat_template", None):
        return str(tokenizer.apply_chat_template(document, tokenize=False))
    return "\n\n".join(message["content"] for message in document)


def _built_in() -> Iterator[Document]:
    folder = files("vllm_flexquant.quantize") / "mix"
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".txt"):
            yield from entry.read_text(encoding="utf-8").split("\n\x0c\n")
        elif entry.name.endswith(".jsonl"):
            yield from _from_lines(entry.name, entry.read_text(encoding="utf-8"))


def _from_file(path: Path) -> Iterator[Document]:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration text {path} is not UTF-8: {error}") from None
    if path.suffix in (".jsonl", ".json"):
        yield from _from_lines(path.name, content)
    else:
        yield content


def _from_lines(name: str, content: str) -> Iterator[Document]:
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield _document(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"calibration text {name}, line {number}: expected an object with 'text' or "
                    f"'messages', got {line[:60]!r}"
                ) from None


def _document(record: dict[str, Any]) -> Document:
    if "messages" in record:
        return [{"role": m["role"], "content": m["content"]} for m in record["messages"]]
    return str(record["text"])


def _from_hub(source: str) -> Iterator[Document]:
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"calibration text {source} is neither '{BUILT_IN}' nor a file; to read it as a "
            "dataset of the hub, pip install datasets"
        ) from None
    try:
        records = load_dataset(name, config or None, split=split or "train", streaming=True)
        for record, _ in zip(records, range(_HUB_DOCUMENTS), strict=False):
            yield _document(record)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"calibration dataset {source} cannot be read: {error}") from None


_HUB_DOCUMENTS = 2000
"""Documents taken from a dataset at most."""


def describe(text: CalibrationText, tokens: CalibrationTokens) -> dict[str, Any]:
    """What the record of a checkpoint says of its calibration."""
    return {
        "text": text.name,
        "sha256": text.sha256,
        "sequence_tokens": tokens.fit.shape[1],
        "tokens": tokens.fit.numel(),
        "held_back_tokens": tokens.held_back.numel(),
    }
