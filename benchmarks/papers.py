# SPDX-License-Identifier: Apache-2.0
"""What papers report beside what we measure: our side of each experiment, at the size that fits.

    python -m benchmarks.papers --results FOLDER --model FOLDER --calibrated FOLDER [--quick]

Reads what the other stages wrote into FOLDER, measures what none of them does (the footprints of
elastic FlexQuant and the storage of AnyBCQ, from the calibrated checkpoint, and a checkpoint pruned
to disk), and writes `papers.json` there. Every cell says whether it is quoted, and from where, or
measured, and in which file under which keys.

Their models are of 7 to 9 billion weights on GPUs, ours is what the folder was measured on: the
columns stand beside each other to show what was claimed, not to be divided by each other.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.provenance import provenance, write_json
from benchmarks.quality.calibrated import Comparison, StoredCheckpoint, read_tokens, storage
from benchmarks.quality.sequences import TEXT, mean_and_error
from benchmarks.serving.configurations import unquantized
from benchmarks.serving.summary import over
from vllm_flexquant.quantize.blocks import BlockModel
from vllm_flexquant.quantize.prune import prune_checkpoint

STAGES = ("speed", "quality", "replay", "policies", "tasks")
ELASTIC = "elastic"
FOOTPRINTS = 7
PRUNED_BITS = 6.5
BILLIONS = 7e9


@dataclass(frozen=True)
class Row:
    """One claim. ours: in words with figures; source: file and keys of these, or what to run."""

    system: str
    paper: str
    claim: str
    quoted_from: str
    ours: str
    source: str
    comparable: str


def missing(stage: str) -> tuple[str, str]:
    """Of a row whose stage was not run."""
    return "not measured", f"`make bench ARGS='--stages {stage}'`"


def elastic(model: Path, calibrated: Path, tokens: int) -> dict[str, Any]:
    """Footprints of one checkpoint, KL of the weights alone at some of them, and one on disk.

    Args:
        tokens: of the shipped text, for KL in nats per token in plain transformers.
    """
    checkpoint = StoredCheckpoint(calibrated)
    ladder = checkpoint.record.ladder
    assert ladder is not None
    comparison = Comparison(BlockModel(model), read_tokens(TEXT, model, tokens), checkpoint)
    rungs = ladder.rungs
    chosen = sorted({round(i * (len(rungs) - 1) / (FOOTPRINTS - 1)) for i in range(FOOTPRINTS)})
    kl = comparison.kl(checkpoint.layer, [checkpoint.record.widths_after(n) for n in chosen])
    with tempfile.TemporaryDirectory(dir=calibrated.parent) as temporary:
        out = Path(temporary) / "pruned"
        pruned = prune_checkpoint(calibrated, out, PRUNED_BITS, lambda share: None)
        on_disk = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        assert pruned.ladder is not None
        said = pruned.ladder.rungs[0].bytes_stored
    reads = [rung.bytes_read for rung in rungs]
    gaps = [above - below for above, below in pairwise(reads)]
    weights = sum(unit.weights for unit in checkpoint.record.units)
    points = []
    for n, row in zip(chosen, kl, strict=True):
        mean, error = mean_and_error(row.tolist())
        points.append(
            {
                "mean_bits": rungs[n].mean_bits,
                "bytes_stored": rungs[n].bytes_stored,
                "bytes_read": rungs[n].bytes_read,
                "kl": mean,
                "kl_standard_error": error,
            }
        )
    return {
        "footprints": len(rungs),
        "largest_step_bytes": max(gaps),
        "median_step_bytes": median(gaps),
        "weights": weights,
        "points": points,
        "pruned": {"top_bits": PRUNED_BITS, "bytes_said": said, "bytes_on_disk": on_disk},
        "storage": storage(comparison, model),
    }


def flexquant(results: Mapping[str, Any]) -> Row:
    """Speed over static 8 bit."""
    ours, source = missing("policies")
    if "policies" in results:
        steps = results["policies"]["steps"]
        parts = []
        for asked in ("0.01", "0.03", "0.1"):
            times = [1 / found[f"probe {asked}"]["time_over_8_bit"] for found in steps.values()]
            parts.append(f"{' / '.join(f'{t:.2f}' for t in times)} at {asked} nats")
        ours = f"{'; '.join(parts)} ({' / '.join(steps)} requests at a time)"
        source = "policies.json: steps.*.probe *.time_over_8_bit"
    return Row(
        "FlexQuant",
        "arXiv 2506.12024",
        "1.3 times as fast end to end, negligible loss; INT8 to INT4 for each token",
        "abstract (first party)",
        ours,
        source,
        "Both over static 8 bit. Theirs keeps two copies of the weights, ours one; its models and "
        "tasks could not be read. On our small model weights are a minor part of a step.",
    )


def elastic_rows(found: Mapping[str, Any] | None) -> list[Row]:
    """Footprint steps, storage factor, KL against footprint; nested store against separate ones."""
    steps, factor, kl, store = ("not measured",) * 4
    source = "`python -m benchmarks.papers` with a calibrated checkpoint"
    if found is not None:
        scaled = found["largest_step_bytes"] / found["weights"] * BILLIONS
        steps = (
            f"{found['footprints']} footprints; largest step "
            f"{found['largest_step_bytes'] / 1e6:.1f} MB, median "
            f"{found['median_step_bytes'] / 1e6:.2f} MB. By arithmetic, the largest is "
            f"{scaled / 1e6:.0f} MB on 7 billion weights in as many layers, less in more"
        )
        storages = found["storage"]
        factor = f"{storages['per_level_over_checkpoint']:.0f} times less than one for each"
        points = [f"{p['kl']:.4f} at {p['bytes_stored'] / 1e6:.0f}" for p in found["points"]]
        kl = f"KL at MB stored: {', '.join(points)}"
        store = (
            f"{storages['checkpoint_bytes'] / 1e6:.0f} MB for 4, 6 and 8 bits; three static ones "
            f"are {storages['per_uniform_width_over_checkpoint']:.2f} times that"
        )
        source = "papers.json: elastic"
    paper, from_abstract = "arXiv 2501.07139", "abstract (first party)"
    return [
        Row(
            "FlexQuant, elastic",
            paper,
            "15 times finer steps: about 100 MB instead of 1.5 GB, Llama-2 7B",
            from_abstract,
            steps,
            source,
            "Steps of one layer's plane in both.",
        ),
        Row(
            "FlexQuant, elastic",
            paper,
            "10 times less storage than many static models",
            from_abstract,
            factor,
            source,
            "Ours is nested by construction, so the factor grows with the number of levels; theirs "
            "keeps modules of several widths.",
        ),
        Row(
            "FlexQuant, elastic",
            paper,
            "quality against footprint (curves; values could not be read)",
            from_abstract,
            kl,
            source,
            "Weights alone, in plain transformers, nats per token.",
        ),
        Row(
            "AnyBCQ",
            "arXiv 2510.10467",
            "4.99 GB for 2 to 4 bits nested, 9.85 GB for three models, Llama-3.1-8B",
            "full text, noted by a third party",
            store,
            source,
            "Bytes on disk. The embedding, which stays unquantized, is counted once in each.",
        ),
    ]


def widths(results: Mapping[str, Any]) -> Row:
    """Speed by width."""
    ours, source = missing("speed")
    base = "the unquantized model"
    if "speed" in results:
        base = unquantized(results["speed"]["flags"])
        entries = results["speed"]["configurations"]
        parts = []
        for width in (8, 6, 4):
            if entry := entries.get(f"calibrated-{width}"):
                speed = over(entry, entries[base], "1") or {"median": nan}
                parts.append(
                    f"{speed['median']:.2f} at {width} bits, KL {entry['quality']['kl']:.4f}"
                )
        ours = "; ".join(parts) or ours
        source = "speed.json: configurations.calibrated-*" if parts else source
    return Row(
        "AnyBCQ, Any-Precision",
        "arXiv 2510.10467, 2402.10517",
        "2.33 / 2.02 / 1.77 times FP16 at 2 / 3 / 4 bits, one request, A100, Llama-3.1-8B "
        "(AnyBCQ); 2.17 / 1.87 / 1.61 (Any-Precision)",
        "tokens per second of AnyBCQ's table, divided here",
        ours,
        source,
        f"One request. Theirs: a GPU limited by memory. Ours: tokens per second over {base}'s on a "
        "CPU.",
    )


def pmpd(results: Mapping[str, Any]) -> Row:
    """Bits saved without loss."""
    ours, source = missing("quality")
    if (
        entry := results.get("quality", {}).get("configurations", {}).get("progressive")
    ) is not None:
        parts = [
            f"{text}: {q['mean_bits']:.2f} of 8 bits, KL {q['kl']:.4f}"
            for text, q in entry["texts"].items()
        ]
        ours, source = "; ".join(parts), "quality.json: configurations.progressive"
        for task, entries in results.get("tasks", {}).get("tasks", {}).items():
            if found := entries.get("progressive", {}).get("accuracy"):
                ours += f"; {task} {found['share']:.1%}"
                if "p" in found:
                    ours += f" (p {found['p']:.2f} to fp32)"
    return Row(
        "PMPD",
        "arXiv 2410.13461",
        "up to 33 % fewer bits without loss on CNN/DM and DialogSum",
        "abstract (first party)",
        ours,
        source,
        "Precision falls as the answer grows in both. Ours falls to all layers at the lowest width "
        "unless `progressive_bits` says otherwise, so it is no setting without loss.",
    )


def flexiq(results: Mapping[str, Any]) -> Row:
    """Latency when the rate changes."""
    ours, source = missing("replay")
    if "burst" in results.get("replay", {}).get("loads", {}):
        parts = []
        for entry in results["replay"]["loads"]["burst"].values():
            parts.append(
                f"{entry['label']}: median {entry['request_seconds']['p50']:.2f} s, p90 "
                f"{entry['request_seconds']['p90']:.2f} s, KL {entry['quality']['kl']:.4f}"
            )
        ours, source = "; ".join(parts), "replay.json: loads.burst.*.request_seconds"
    return Row(
        "FlexiQ",
        "arXiv 2510.02822",
        "median 100 to 150 ms where INT8 has up to 660 ms, accuracy 84.64 against 84.72 %, rate "
        "from 500 to 1500 requests a second; 1.57 times the rate at a similar p90",
        "full text, noted by a third party",
        ours,
        source,
        "Theirs: vision transformers. Ours: whole requests of a language model, with a burst of "
        "three times capacity.",
    )


def dp_llm(results: Mapping[str, Any]) -> Row:
    """Quality at equal bits."""
    ours, source = missing("quality")
    entries = results.get("quality", {}).get("configurations", {})
    parts = []
    for name, entry in entries.items():
        if name.startswith("budget-"):
            over = [
                f"{q['static_level']['kl_over_it']:.2f} ({text})"
                for text, q in entry["texts"].items()
                if q.get("static_level")
            ]
            if over:
                parts.append(f"{entry['label']}: {', '.join(over)}")
    if parts:
        ours = "KL over a static level's of equal mean bits. " + "; ".join(parts)
        source = "quality.json: configurations.budget-*.texts.*.static_level.kl_over_it"
    return Row(
        "DP-LLM",
        "arXiv 2508.06041",
        "perplexity 6.59 against 6.83 (HAWQ-V2) at 4.0 bits, WikiText, Llama-3-8B",
        "paper, noted by a third party",
        ours,
        source,
        "Theirs decides each layer by its own input's error; ours decides once a step, by a probe. "
        "Below 1 the dynamic choice is better.",
    )


def static_in_vllm(results: Mapping[str, Any]) -> Row:
    """A nested checkpoint in vLLM."""
    row = widths(results)
    return Row(
        "MatGPTQ",
        "arXiv 2602.03537",
        "1.5 to 3.5 times as fast as unquantized in vLLM, Llama-3.1-8B-Instruct, RTX A6000",
        "its repository (first party)",
        row.ours,
        row.source,
        "Theirs slices once, when it loads; ours can run any width at any step.",
    )


def rows_of(results: Mapping[str, Any], found: Mapping[str, Any] | None) -> list[Row]:
    """The whole table."""
    return [
        flexquant(results),
        *elastic_rows(found),
        widths(results),
        pmpd(results),
        flexiq(results),
        dp_llm(results),
        static_in_vllm(results),
    ]


def main() -> None:
    """Measure what is missing, read the rest, write."""
    parser = argparse.ArgumentParser(description="What papers report beside what we measure.")
    parser.add_argument("--results", type=Path, required=True, help="what stages wrote")
    parser.add_argument("--model", type=Path, required=True, help="unquantized checkpoint folder")
    parser.add_argument("--calibrated", type=Path, help="calibrated checkpoint of it")
    parser.add_argument("--quick", action="store_true", help="little text for the footprints")
    options = parser.parse_args()
    files = {stage: options.results / f"{stage}.json" for stage in STAGES}
    written = {
        stage: json.loads(file.read_text(encoding="utf-8"))
        for stage, file in files.items()
        if file.is_file()
    }
    results = {
        stage: content["results"] | {"flags": content["provenance"]["machine"]["flags"]}
        for stage, content in written.items()
    }
    facts = provenance(options.model, TEXT)
    found = None
    if options.calibrated is not None:
        found = elastic(options.model, options.calibrated, 512 if options.quick else 1536)
    rows = rows_of(results, found)
    out = options.results / "papers.json"
    write_json(out, {"rows": [asdict(row) for row in rows], ELASTIC: found}, facts)
    console = Console()
    for row in rows:
        console.print(f"{row.system}: {row.claim}", style="bold", highlight=False)
        console.print(f"  ours: {row.ours}", highlight=False)
    console.print(f"written to {out}", soft_wrap=True)


if __name__ == "__main__":
    main()
