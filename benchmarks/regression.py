# SPDX-License-Identifier: Apache-2.0
"""The cheap ratios that CI watches: fails where one is clearly lost.

    make bench-gate    # python -m benchmarks.regression [--model FOLDER] [--tokens N] [--out FILE]

One engine, weights rounded to nearest. KL at each width on 4,000 teacher-forced tokens, in the
engine while it decodes; the time of a decode step at 4 bits over one at 8, in turns; the share of a
step that the plugin takes besides its kernels. Limits are wide enough for shared machines and for
every instruction set that the kernels have: they catch what went wrong, not what got slower by a
few per cent.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.provenance import ROOT, provenance, write_json
from benchmarks.quality.budget import FORCED, sequences_of
from benchmarks.quality.engine import compute_references
from benchmarks.quality.sequences import read_records, scored, summarise
from benchmarks.serving import owners
from benchmarks.serving.configurations import FLEX_ENGINE, engine_specs
from benchmarks.serving.engine import ENVIRON, MAX_SEQS, Engine
from demo.get_model import ModelError, get_model
from vllm_flexquant.quantize.calibration import BUILT_IN, load_tokenizer

WIDTHS = (4, 6, 8)
TURNS, STEPS = 25, 8
"""Turns of each width, and decode steps in a turn."""

PROFILED, TRACED = 24, 8
TOKENS = 36 * FORCED


@dataclass(frozen=True)
class Limit:
    """The most that a figure may be. found: what it was on the machines that were tried."""

    most: float
    found: str
    remedy: str


KERNELS = "compare `python -m benchmarks.kernels.run --device cpu` on this commit and the last good"
ROUNDING = "see tests/kernels, then the rounding in quantize/rtn.py"
LIMITS: Mapping[str, Limit] = {
    "kl at 4 bits": Limit(0.45, "0.379 in fp32 with AVX2", ROUNDING),
    "kl at 6 bits": Limit(0.045, "0.032 in fp32 with AVX2", ROUNDING),
    "kl at 8 bits": Limit(0.014, "0.0080 in fp32 with AVX2", ROUNDING),
    "time at 4 bits over 8": Limit(
        0.97, "0.80 with AVX2, 0.89 with AVX512-VNNI, 0.79 with AMX", KERNELS
    ),
    "machinery share": Limit(
        0.05,
        "0.020 with AVX2, 0.022 with AVX512-VNNI, 0.013 with AMX",
        "see `python -m benchmarks.serving.profile_step`",
    ),
}


def judge(figures: Mapping[str, float]) -> list[str]:
    """A line for each figure that is above its limit, is missing, or is no number."""
    wrong = []
    for name, limit in LIMITS.items():
        value = figures.get(name)
        if value is None or not value <= limit.most:  # NaN is not either
            wrong.append(
                f"{name} is {value if value is None else format(value, '.4f')}, the most is "
                f"{limit.most:g} (found before: {limit.found}); {limit.remedy}"
            )
    return wrong


def measure_kl(engine: Engine, model: Path, folder: Path, tokens: int) -> dict[str, float]:
    """KL in nats per token at each width, on the built-in calibration text: the weights are rounded
    to nearest, so they have not seen it."""
    tokenizer = load_tokenizer(model)
    sequences = sequences_of(Path(BUILT_IN), tokenizer, tokens // FORCED, BUILT_IN)
    compute_references(str(model), sequences, folder, [], "float32")
    found = {}
    for width in WIDTHS:
        engine.force(
            f"{width}",
            str(folder / "sequences.json"),
            str(folder / "reference.npy"),
            str(folder / "records.jsonl"),
            MAX_SEQS,
            {"policy": "static", "width": width},
        )
        records = scored(read_records(folder / "records.jsonl", f"{width}"), sequences)
        found[f"kl at {width} bits"] = summarise(records)["kl"]
    return found


def measure_times(engine: Engine) -> dict[str, Any]:
    """Time of a decode step at 4 bits over one at 8 of the same turn, one request."""
    prompt = [list(range(100, 116))]
    seconds: dict[int, list[float]] = {4: [], 8: []}
    for turn in range(TURNS + 1):
        for width in sorted(seconds, reverse=bool(turn % 2)):
            engine.adopt({"policy": "static", "width": width})
            steps = list(engine.steps(prompt, STEPS + 2))[2:]
            if turn:  # the first one warms
                seconds[width].append(min(steps))
    ratios = [four / eight for four, eight in zip(seconds[4], seconds[8], strict=True)]
    return {"time at 4 bits over 8": median(ratios), "ratios": ratios}


def measure_share(engine: Engine) -> dict[str, float]:
    """Of a decode step of one request under policy entropy, what takes neither vLLM nor a layer."""
    engine.adopt({"policy": "entropy"})
    found = owners.profile(engine, [list(range(100, 116))], PROFILED, TRACED)
    ours = [e["share"] for name, e in found["owners"].items() if name.startswith(owners.OURS)]
    return {"machinery share": sum(ours)}


def main() -> None:
    """Measure, judge, write; exit status 1 where a limit is passed."""
    parser = argparse.ArgumentParser(description="The cheap ratios that CI watches.")
    parser.add_argument("--model", type=Path, help="unquantized checkpoint (default: the demo's)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="for the KL of each width")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out" / "regression.json")
    options = parser.parse_args()
    console = Console()
    os.environ |= ENVIRON
    try:
        model = options.model or get_model()
    except ModelError as error:
        raise SystemExit(str(error)) from None
    facts = provenance(model)
    with tempfile.TemporaryDirectory(prefix="flexquant-bench-") as temporary:
        spec = engine_specs(str(model), [FLEX_ENGINE + "-8"], Path(temporary), False)[FLEX_ENGINE]
        engine = Engine(spec)
        figures: dict[str, Any] = measure_kl(engine, model, Path(temporary), options.tokens)
        figures |= measure_times(engine) | measure_share(engine)
    wrong = judge(figures)
    write_json(options.out, {"figures": figures, "wrong": wrong}, facts)
    for name, limit in LIMITS.items():
        console.print(f"{name}: {figures[name]:.4f}, the most is {limit.most:g}", highlight=False)
    for line in wrong:
        console.print(f"LOST: {line}", style="red", highlight=False, soft_wrap=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
