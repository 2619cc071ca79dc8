# SPDX-License-Identifier: Apache-2.0
"""The end of the demo: the table and what must be said of it."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

BASELINE = "bf16"
HEADINGS = ("tok/s", "to bf16", "bits: chat", "text", "MB/step", "KL, nats/token", "top-1")


def with_ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`rows` by policy, each with `speed_to_bf16`."""
    base = rows[BASELINE]["chat"]["tokens_per_second"]
    return {
        name: row | {"speed_to_bf16": row["chat"]["tokens_per_second"] / base}
        for name, row in rows.items()
    }


def table(rows: dict[str, dict[str, Any]]) -> Table:
    """One line per policy; `rows` as in the JSON that the demo writes."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    made.add_column("policy", no_wrap=True)
    for heading in HEADINGS:
        made.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        text = row["text"]
        made.add_row(
            name,
            f"{row['chat']['tokens_per_second']:.0f}",
            f"{row['speed_to_bf16']:.2f} x",
            f"{row['chat_steps']['mean_bits']:.2f}",
            f"{row['text_steps']['mean_bits']:.2f}",
            f"{row['chat_steps']['bytes_per_step'] / 1e6:.0f}",
            f"{text['kl']:.4f} ± {text['kl_standard_error']:.4f}",
            f"{100 * text['top1']:.1f}%",
            end_section=name == BASELINE,
        )
    return made


def notes(
    dequantized_gguf: bool, tokens: int, rounds: int, flags: list[str], calibrated: bool = False
) -> str:
    """What the numbers are, and what they are not.

    Args:
        rounds: chat runs of each policy.
        dequantized_gguf: the checkpoint is one (`demo.get_model`).
        tokens: scored tokens of the text.
        flags: CPU flags that matter (`benchmarks.provenance`).
        calibrated: a calibrated checkpoint was served.
    """
    origin = ", here a dequantized GGUF, not the weights as trained" if dequantized_gguf else ""
    lines = [
        f"KL(reference || served) ± standard error over {tokens} teacher-forced tokens. The "
        f"reference is the unquantized checkpoint in fp32{origin}.",
        "Bits and MB are means over decoding steps, each layer by its size; MB are planes and "
        "scales of the linear layers, for bf16 2 bytes per weight.",
        f"Speeds are medians of {rounds} chat run(s), bf16's before the others. On a shared "
        "machine they are noisy: only large ratios mean anything.",
        "Bits and KL belong together only for the text: its KL is that of the bits under 'text'.",
        "Served from a calibrated checkpoint."
        if calibrated
        else "The weights are rounded to nearest without calibration, layers lowered by weight "
        "error. For calibrated ones: flexquant quantize MODEL MODEL-flexquant, then again.",
    ]
    if "amx_bf16" in flags:
        lines.append("This CPU multiplies bf16 in hardware (AMX), which favours bf16.")
    return "\n".join(f"- {line}" for line in lines)


def show(console: Console, rows: dict[str, dict[str, Any]], remarks: str) -> None:
    """Print table and remarks."""
    console.print(table(rows))
    console.print(remarks, highlight=False)
