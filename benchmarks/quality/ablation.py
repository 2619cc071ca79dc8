# SPDX-License-Identifier: Apache-2.0
"""What each signal of policy budget is worth: none, entropy, probe, both, random and oracle.

    python -m benchmarks.quality.ablation --model FOLDER --checkpoint FOLDER
        --text prose=FILE --text code=FILE --text chat=FILE.jsonl [--rows 1 4 16]

The policy as it is served (`policy.budget.Budget`) decides about real tokens: their KL and entropy
at eight levels of the ladder are measured first, by plain transformers in fp32, as are the scores
of the probe. Between two measured levels, log KL and entropy are taken for linear in mean bits; of
a step whose first layers ran at another level than the rest, these count for their share by
calibration. *Random* shuffles the scores of the probe among the tokens. *Oracle* is told what
nobody can know: the token's own KL over the mean, averaged over the eight levels; what a score for
a token can bring at most. Sequences run side by side, `--rows` at a time, token by token.

A signal is compared with a static level of the same KL, and of the same mean bits. Reference: the
checkpoint as given (for the demo's model, the dequantized GGUF).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.provenance import write_json
from benchmarks.quality.budget import ASKED, LEVEL_KL, kl_at, nearest_level
from benchmarks.quality.calibrated import RESULTS, Comparison, StoredCheckpoint
from benchmarks.quality.probe import bits_at, scores
from benchmarks.quality.texts import add_options, facts_of, text_files
from vllm_flexquant.format.checkpoint import OUTPUT_LAYER
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner.figures import listen, read_figures
from vllm_flexquant.planner.ladder import Ladder, calibrated_ladder
from vllm_flexquant.planner.ledger import Ledger
from vllm_flexquant.planner.state import empty_state, fill
from vllm_flexquant.planner.table import LayerRecord, WeightError
from vllm_flexquant.policy.arrays import Array
from vllm_flexquant.policy.budget import Budget
from vllm_flexquant.policy.choose import parameters
from vllm_flexquant.policy.entropy import averaged
from vllm_flexquant.policy.protocol import FIRST, LATER, StepFacts
from vllm_flexquant.quantize import evaluate
from vllm_flexquant.quantize.blocks import BlockModel
from vllm_flexquant.quantize.calibration import cut_tokens, load_tokenizer, read_text
from vllm_flexquant.requests.accounts import asked as asked_by_account

SIGNALS = ("none", "entropy", "probe", "both", "random", "oracle")
LENGTH = 256
SCORED_AT = 0.03
"""Nats of the level at which the layers before the probe run when it is asked."""


@dataclass(frozen=True)
class Text:
    """Measured tokens. kl, entropy: fp64 [levels, sequences, length], nats, of `levels` ascending,
    which have mean `bits`. score: fp32 [sequences, length], of the probe."""

    levels: np.ndarray
    bits: np.ndarray
    kl: np.ndarray
    entropy: np.ndarray
    score: np.ndarray

    def at(self, values: np.ndarray, bits: float, tokens: Array) -> np.ndarray:
        """`values` of `tokens`, a pair of index arrays, at a level of so many mean bits."""
        above = int(np.clip(np.searchsorted(self.bits, bits), 1, len(self.bits) - 1))
        low, high = self.bits[above - 1], self.bits[above]
        share = np.clip((bits - low) / (high - low), 0.0, 1.0)
        found: np.ndarray = (1 - share) * values[(above - 1, *tokens)]
        found += share * values[(above, *tokens)]
        return found


def layer_records(comparison: Comparison) -> list[LayerRecord]:
    """The checkpoint's layers, as the runtime would have them if none were fused."""
    stored, model = comparison.checkpoint.stored, comparison.model
    known = {name for unit in comparison.checkpoint.record.units for name in unit.layers}
    linears = [pair for index in range(len(model)) for pair in model.linears(index)]
    linears.append((OUTPUT_LAYER, model.model.get_output_embeddings()))
    layout = comparison.layout
    nothing = WeightError(0, 0.0, {})
    return [
        LayerRecord(
            name, m.out_features, m.in_features, stored.group_size, layout, layout.widths,
            "plain", "simulated", nothing,
        )
        for name, m in linears
        if name in known
    ]  # fmt: skip


def measure(comparison: Comparison, ladder: Ladder) -> Text:
    """KL, entropy and scores of the tokens of one text."""
    record = comparison.checkpoint.record
    assert ladder.kl_nats is not None
    assert record.probe is not None
    levels = np.unique([nearest_level(ladder.kl_nats, kl) for kl in LEVEL_KL])
    top = len(ladder) - 1
    choices = [record.widths_after(int(top - level)) for level in levels]
    nested = comparison.nested(comparison.checkpoint.layer)
    kl, entropy = evaluate.divergence(nested, comparison.tokens, choices, with_entropy=True)
    before = record.widths_after(top - nearest_level(ladder.kl_nats, SCORED_AT))
    shape = tuple(comparison.tokens.shape)
    return Text(
        levels,
        np.array(ladder.mean_bits)[levels],
        kl.double().numpy().reshape(-1, *shape),
        entropy.double().numpy().reshape(-1, *shape),
        scores(comparison, record.probe, before).numpy().reshape(shape),
    )


def needs(text: Text, signal: str) -> np.ndarray:
    """What the policy is told of each token, fp32 [sequences, length]."""
    if signal == "oracle":
        over_mean = text.kl / text.kl.mean((1, 2), keepdims=True)
        return over_mean.mean(0).astype(np.float32)
    if signal == "random":
        shuffled = np.random.default_rng(0).permutation(text.score.ravel())
        return shuffled.reshape(text.score.shape)
    return text.score


class Simulation:
    """The served policy on measured tokens."""

    def __init__(self, layers: Sequence[LayerRecord], ladder: Ladder, record: Any) -> None:
        self.ladder = ladder
        cpu = torch.device("cpu")
        self.listening = listen(cpu, layers, record, {})
        assert self.listening is not None
        self.figures = read_figures(layers, ladder, record, self.listening.layer, {})
        sizes = np.array([layer.rows * layer.columns for layer in layers], dtype=np.float64)
        bits = ladder.widths.numpy() * (sizes / sizes.sum())
        probe_layer = self.listening.layer
        self.early_bits = bits[:, :probe_layer].sum(1)
        self.late_bits = bits[:, probe_layer:].sum(1)
        self.bits = bits.sum(1)

    def run(self, text: Text, signal: str, asked: float, rows: int) -> dict[str, Any]:
        """Spend `asked` nats per token on a text, `rows` sequences at a time."""
        served = signal if signal in ("none", "entropy", "both") else "probe"
        options = FlexQuantOptions(policy="budget", budget=asked, signal=served)
        table = torch.zeros(0, dtype=torch.int32)
        state = empty_state(table, self.figures, rows, rows)
        fill(state, **parameters(options, self.ladder.mean_bits), bounds=[2, 8])
        fill(state, probes=served in ("probe", "both"))
        Ledger(state).ask(asked_by_account(options.classes, asked))
        policy, account = Budget(0), list(options.classes).index(options.default_class)
        told = needs(text, signal)
        share = np.array(self.figures["early_kl"]) / np.array(self.figures["kl"])
        places = np.arange(rows)
        facts = np.stack([places, places, np.full_like(places, account), places])
        spent: list[np.ndarray] = []
        bits, switches, last = [], 0, -1
        for start in range(0, len(told), rows):
            state.seen[places] = False
            for position in range(told.shape[1]):
                tokens = start + places, np.full(rows, position)
                policy.begin(state, StepFacts(facts, rows))
                if served in ("probe", "both"):
                    policy.decide(state, told[tokens])
                first, later = state.decisions[[FIRST, LATER], 0].tolist()
                log_kl = np.log(np.maximum(text.kl, 1e-9))
                early = np.exp(text.at(log_kl, self.bits[first], tokens))
                late = np.exp(text.at(log_kl, self.bits[later], tokens))
                spent.append(share[first] * early + (1 - share[later]) * late)
                bits.append(self.early_bits[first] + self.late_bits[later])
                switches += later != last
                last = later
                entropy = text.at(text.entropy, self.bits[later], tokens).astype(np.float32)
                average, seen = state.average[places], state.seen[places]
                state.average[places] = averaged(average, seen, entropy, options.entropy_decay)
                state.seen[places] = True
                policy.book(state, entropy)
        kl = np.concatenate(spent)
        return {
            "kl": float(kl.mean()),
            "kl_99": float(np.quantile(kl, 0.99)),
            "mean_bits": float(np.mean(bits)),
            "spent_over_asked": float(kl.mean() / asked),
            "switches_per_step": switches / len(bits),
        }


def compare(simulation: Simulation, text: Text, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Every signal and budget on one text."""
    static = [(float(bits), float(kl.mean())) for bits, kl in zip(text.bits, text.kl, strict=True)]
    found = []
    for count in rows:
        for signal in SIGNALS:
            for asked in ASKED:
                result = simulation.run(text, signal, asked, count)
                result["bits_saved_at_equal_kl"] = (
                    bits_at(result["kl"], static) - result["mean_bits"]
                )
                result["kl_over_level"] = result["kl"] / kl_at(result["mean_bits"], static)
                found.append({"rows": count, "signal": signal, "asked_nats": asked} | result)
    return found


def means(texts: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Of each signal, budget and number of rows over the texts."""
    found = []
    for entries in zip(*texts.values(), strict=True):
        key = {name: entries[0][name] for name in ("rows", "signal", "asked_nats")}
        values = {
            name: float(np.mean([entry[name] for entry in entries]))
            for name in ("mean_bits", "bits_saved_at_equal_kl", "kl_over_level", "kl_99")
        }
        found.append(key | values)
    return found


def plot(results: Sequence[Mapping[str, Any]], beside: Path) -> Path:
    """Bits saved by signal, a group of bars for each budget, a panel for each number of rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = sorted({entry["rows"] for entry in results})
    colours = dict(zip(SIGNALS, pyplot.get_cmap("tab10").colors, strict=False))
    figure, axes = pyplot.subplots(
        1, len(counts), figsize=(4.2 * len(counts), 3.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, rows in zip(axes[0], counts, strict=True):
        for i, signal in enumerate(SIGNALS):
            heights = [
                entry["bits_saved_at_equal_kl"]
                for entry in results
                if entry["rows"] == rows and entry["signal"] == signal
            ]
            axis.bar(
                np.arange(len(heights)) + (i - 2.5) * 0.14, heights, 0.13, label=signal,
                color=colours[signal],
            )  # fmt: skip
        axis.set_xticks(range(len(ASKED)), [f"{asked:g}" for asked in ASKED])
        axis.set_xlabel("nats per token asked")
        axis.set_title(f"{rows} at a time")
        axis.axhline(0.0, color="black", linewidth=0.8)
    axes[0][0].set_ylabel("mean bits saved over a static level of equal KL")
    axes[0][-1].legend(frameon=False, fontsize=8)
    path = beside.with_suffix(".png")
    figure.savefig(path, dpi=110)
    return path


def show(results: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print means over the texts."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="means over the texts")
    for heading in ("rows", "signal", "asked", "bits", "saved", "KL/level", "99 %"):
        table.add_column(heading, justify="left" if heading == "signal" else "right")
    for entry in results:
        table.add_row(
            str(entry["rows"]),
            entry["signal"],
            f"{entry['asked_nats']:g}",
            f"{entry['mean_bits']:.2f}",
            f"{entry['bits_saved_at_equal_kl']:+.3f}",
            f"{entry['kl_over_level']:.2f}",
            f"{entry['kl_99']:.3f}",
        )
    console.print(table)


def main() -> None:
    """Measure, print, write and plot."""
    parser = argparse.ArgumentParser(description="What each signal of policy budget is worth.")
    add_options(parser)
    parser.add_argument("--sequences", type=int, default=16, help=f"of {LENGTH} tokens each")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.json")
    options = parser.parse_args()
    if uneven := [rows for rows in options.rows if options.sequences % rows]:
        raise SystemExit(f"--rows {uneven[0]} does not divide --sequences {options.sequences}")
    files = text_files(options.text)
    facts = facts_of(options.model, files)
    tokenizer, console = load_tokenizer(options.model), Console()
    checkpoint, model = StoredCheckpoint(options.checkpoint), BlockModel(options.model)
    found, static = {}, {}
    with Progress(console=console) as progress:
        task = progress.add_task("texts", total=len(files))
        for name, file in files.items():
            tokens = cut_tokens(read_text(str(file)), tokenizer, options.sequences, LENGTH).fit
            comparison = Comparison(model, tokens[: options.sequences], checkpoint)
            layers = layer_records(comparison)
            ladder = calibrated_ladder(layers, checkpoint.record, {})
            simulation = Simulation(layers, ladder, checkpoint.record)
            text = measure(comparison, ladder)
            static[name] = [
                {
                    "level": int(level),
                    "mean_bits": ladder.mean_bits[level],
                    "kl": float(kl.mean()),
                    "kl_99": float(np.quantile(kl, 0.99)),
                }
                for level, kl in zip(text.levels, text.kl, strict=True)
            ]
            found[name] = compare(simulation, text, options.rows)
            progress.advance(task)
    overall = means(found)
    results = {
        "sequences": options.sequences,
        "length": LENGTH,
        "static": static,
        "texts": found,
        "means": overall,
    }
    write_json(options.out, results, facts)
    path = plot(overall, options.out)
    show(overall, console)
    console.print(f"written to {options.out} and {path}")


if __name__ == "__main__":
    main()
