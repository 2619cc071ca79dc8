# SPDX-License-Identifier: Apache-2.0
"""One answer with self-speculation, draft by draft: how many, and their entropies.

    python -m benchmarks.serving.speculation_answer --model CHECKPOINT

Gate gain, by the times that it measured just before, but kept from switching off, so that there is
something to see where drafts do not pay. `speculation_plot` makes the picture.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.provenance import write_json
from benchmarks.quality.texts import facts_of
from benchmarks.serving import speculation_parts as parts
from benchmarks.serving.engine import ENVIRON
from benchmarks.serving.kinds import FILES, make_prompts
from benchmarks.serving.run import PROMPT, RESULTS
from benchmarks.serving.speculating import SpeculatingEngine
from vllm_flexquant.quantize.calibration import load_tokenizer
from vllm_flexquant.speculation import gate as speculate

KIND = "chat"


def main() -> None:
    """Measure and write."""
    options = read_options()
    os.environ |= ENVIRON
    facts = facts_of(options.model, {KIND: FILES[KIND]})
    if options.alias:
        facts["model"]["name"] = options.alias
    prompts = make_prompts({KIND: FILES[KIND]}, load_tokenizer(options.model), 2, PROMPT)
    asked, warm = (prompt.ids for prompt in prompts[KIND])
    engine = SpeculatingEngine(str(options.model), options.most, options.dtype)
    gain = parts.gates_of(options.most)["gain"]
    engine.run(gain, [warm], 3 * parts.WARM_TOKENS, 0.0, 0, "answer")
    speculate._FIRST_DRAFTED = sys.maxsize
    results: dict[str, Any] = {
        "settings": {"most": options.most, "tokens": options.tokens, "prompt_tokens": len(asked)},
        "engine": engine.facts(),
        "draft": engine.usual | {"mean_bits": engine.speculation.mean_bits},
        "trace": {"gain": engine.trace_answer(gain, asked, options.tokens, "answer")},
        "cost": engine.cost(1),
    }
    write_json(options.out, results, facts)
    steps = results["trace"]["gain"]
    drafted, kept = sum(len(s["nats"]) for s in steps), sum(s["kept"] for s in steps)
    Console().print(f"{len(steps)} steps, {drafted} drafts, {kept} kept; written to {options.out}")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="One answer, draft by draft.")
    parser.add_argument("--model", type=Path, required=True, help="flexquant checkpoint")
    parser.add_argument("--alias", help="the model's name in the results")
    parser.add_argument("--most", type=int, default=4, help="tokens of a draft")
    parser.add_argument("--tokens", type=int, default=128, help="of the answer")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=RESULTS / "speculation-answer-cpu.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
