# SPDX-License-Identifier: Apache-2.0
"""The end of the demo: the table and what must be said of it."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

BITS = {"bf16": 16, "fp32": 32}
"""Of a weight, by baseline."""


def baseline_reason(baseline: str) -> str:
    """Which unquantized engine speeds are compared with, and why that one."""
    if baseline == "fp32":
        return (
            "Baseline: fp32. This CPU has no instructions for bf16 (AVX512-BF16, AMX): vLLM "
            "emulates it, so fp32 is what one would serve unquantized here."
        )
    return "Baseline: bf16, for which this CPU has instructions."


def with_ratios(rows: dict[str, dict[str, Any]], baseline: str) -> dict[str, dict[str, Any]]:
    """`rows` by policy, each with `speed_to_baseline`."""
    base = rows[baseline]["chat"]["tokens_per_second"]
    return {
        name: row | {"speed_to_baseline": row["chat"]["tokens_per_second"] / base}
        for name, row in rows.items()
    }


def table(rows: dict[str, dict[str, Any]], baseline: str) -> Table:
    """One line per policy; `rows` as in the JSON that the demo writes."""
    headings = ("tok/s", f"to {baseline}", "bits: chat", "text", "MB/step", "KL, nats/token")
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    made.add_column("policy", no_wrap=True)
    for heading in (*headings, "top-1"):
        made.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        text = row["text"]
        made.add_row(
            name,
            f"{row['chat']['tokens_per_second']:.0f}",
            f"{row['speed_to_baseline']:.2f} x",
            f"{row['chat_steps']['mean_bits']:.2f}",
            f"{row['text_steps']['mean_bits']:.2f}",
            f"{row['chat_steps']['bytes_per_step'] / 1e6:.0f}",
            f"{text['kl']:.4f} ± {text['kl_standard_error']:.4f}",
            f"{100 * text['top1']:.1f}%",
            end_section=name == baseline,
        )
    return made


def notes(
    baseline: str,
    dequantized_gguf: bool,
    tokens: int,
    rounds: int,
    flags: list[str],
    calibrated: bool = False,
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
        baseline_reason(baseline),
        f"KL(reference || served) ± standard error over {tokens} teacher-forced tokens. The "
        f"reference is the unquantized checkpoint in fp32{origin}.",
        "Bits and MB are means over decoding steps, each layer by its size; MB are planes and "
        f"scales of the linear layers, for {baseline} {BITS[baseline] // 8} bytes per weight.",
        f"Speeds are medians of {rounds} chat run(s), all in turn. On a shared machine they are "
        "noisy: only large ratios mean anything.",
        "Bits and KL belong together only for the text: its KL is that of the bits under 'text'.",
        "Served from a calibrated checkpoint."
        if calibrated
        else "The weights are rounded to nearest without calibration, layers lowered by weight "
        "error. For calibrated ones: flexquant quantize MODEL MODEL-flexquant, then again.",
    ]
    if "amx_bf16" in flags:
        lines.append("This CPU multiplies bf16 in hardware (AMX), which favours bf16.")
    return "\n".join(f"- {line}" for line in lines)


def show(console: Console, rows: dict[str, dict[str, Any]], baseline: str, remarks: str) -> None:
    """Print table and remarks."""
    console.print(table(rows, baseline))
    console.print(remarks, highlight=False)
