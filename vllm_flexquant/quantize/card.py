# SPDX-License-Identifier: Apache-2.0
"""Model cards of calibrated and of exported checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_flexquant.format.record import CalibrationRecord
from vllm_flexquant.quantize.plots import write_plots

CARD = "README.md"
BASE_CARD = "README.base-model.md"
"""What the source's own card is kept as."""

_SHOWN_RUNGS = 12

_NESTED = "nested weights for vllm-flexquant"
"""In the title of a calibrated checkpoint's card."""


def write_card(folder: Path, source: str, layout: str, record: CalibrationRecord) -> None:
    """Write `README.md` into a checkpoint folder; a card that was copied there is kept beside."""
    card = folder / CARD
    if card.exists():
        card.rename(folder / BASE_CARD)
    plots = write_plots(folder, record)
    lines = [*_lines(source, layout, record), *(f"\n![{t}]({name})" for name, t in plots.items())]
    card.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_export_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `README.md` into an exported folder, from what its record says.

    A card that is the base model's own is kept beside; a calibrated checkpoint's is not, as it
    tells of planes.
    """
    card, base = folder / CARD, folder / BASE_CARD
    if card.exists() and not base.exists() and not _is_calibrated_card(card):
        card.rename(base)
    card.write_text("\n".join(_export_lines(record)) + "\n", encoding="utf-8")


def _is_calibrated_card(card: Path) -> bool:
    return _NESTED in card.read_text(encoding="utf-8", errors="replace")


def _export_lines(record: Mapping[str, Any]) -> Iterator[str]:
    model = record["base_model"] or record["source"]
    yield from ("---", f"base_model: {model}", "library_name: vllm", "---", "")
    yield f"# {model}, {record['width']} bit"
    yield ""
    text = record["text"]
    by = f" on {text['tokens']} tokens of {text['text']}" if text else ""
    yield (
        f"A static {record['format']} checkpoint, exported by vllm-flexquant from "
        f"{record['source']}: its 8-bit weights rounded to {record['width']} bits by "
        f"{record['method']}{by}. vLLM serves it without a plugin:"
    )
    yield ""
    yield "    vllm serve THIS_FOLDER"
    yield ""
    yield "Where it comes from, and which layers are not quantized, is in `flexquant-export.json`."


def _lines(source: str, layout: str, record: CalibrationRecord) -> Iterator[str]:
    text = record.text
    yield from ("---", f"base_model: {source}", "library_name: vllm", "---", "")
    yield f"# {source}, {_NESTED}"
    yield ""
    yield f"One copy of the weights in planes {layout}, of which every layer can run at any width:"
    yield ""
    yield "    vllm serve THIS_FOLDER"
    yield ""
    yield (
        "KL to the unquantized model in nats per token, of the weights alone, measured on (a part "
        f"of) {text.get('held_back_tokens')} tokens held back from the calibration text "
        f"({text.get('text')}, sha256 {str(text.get('sha256'))[:12]}):"
    )
    yield ""
    yield "| | mean bits | MB read per step | MB stored if pruned to it | KL | standard error |"
    yield "|---|---|---|---|---|---|"
    for width, (kl, error) in record.uniform_kl.items():
        yield f"| uniform {width} bit | {width} | | | {kl:.5f} | {error:.5f} |"
    if record.ladder:
        measured = [rung for rung in record.ladder.rungs if rung.measured]
        count = min(_SHOWN_RUNGS, len(measured))
        for i in range(count):
            rung = measured[i * (len(measured) - 1) // max(count - 1, 1)]
            level = len(record.ladder.rungs) - 1 - rung.steps
            yield (
                f"| level {level} of {len(record.ladder.rungs) - 1} | {rung.mean_bits:.2f} "
                f"| {rung.bytes_read / 1e6:.1f} | {rung.bytes_stored / 1e6:.1f} "
                f"| {rung.kl_nats:.5f} | {rung.error:.5f} |"
            )
    if record.drafts:
        yield ""
        yield (
            "Levels as drafts for the best one (self-speculation): the share of their most likely "
            "tokens, and of tokens drawn at temperature 1, that it keeps. The same by the draft's "
            "entropy is in `flexquant.json`."
        )
        yield ""
        yield "| drafting level | mean bits | KL of the best level to it | greedy | drawn |"
        yield "|---|---|---|---|---|"
        for draft, level, bits in record.draft_levels():
            yield (
                f"| {level} | {bits:.2f} | {draft.kl_nats:.5f} | {draft.mean_greedy:.3f} "
                f"| {draft.mean_sampled:.3f} |"
            )
    yield ""
    yield "Sensitivities, the whole ladder and the probe are in `flexquant.json`."
