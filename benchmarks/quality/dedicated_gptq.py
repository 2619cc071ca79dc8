# SPDX-License-Identifier: Apache-2.0
"""A checkpoint for one width alone, by GPTQ as an outside tool does it, to compare ours with.

    python -m benchmarks.quality.dedicated_gptq --model FOLDER --out FOLDER [--width 4]
        [--group-size 64] [--observer NAME] [--symmetric] [--venv FOLDER]

The tool is llm-compressor, in an environment of its own that is built when it is missing. It gets
the tokens that `flexquant quantize` calibrates on by default. Only the layers of the blocks are
quantized. What is not given here is as the tool has it: order of columns, damping, ranges.

Leaves in OUT: `weights.safetensors`, the dequantized weights, fp32 [N, K] each, and
`dedicated.json`, which says how they were made and which `calibrated.py --dedicated` reads.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from benchmarks.environment import ToolError, build_environment, run_logged
from benchmarks.provenance import ROOT, hash_file, hash_model
from vllm_flexquant.quantize.calibration import BUILT_IN, cut_tokens, load_tokenizer, read_text

WORKER = Path(__file__).with_name("gptq_worker.py")
WEIGHTS, FACTS, LOG = "weights.safetensors", "dedicated.json", "worker.log"
STAMP = "flexquant-gptq.json"
SEQUENCES, LENGTH = 96, 512

TORCH = "torch==2.13.0+cpu"
PACKAGES = (
    "llmcompressor==0.14.0.1",
    "compressed-tensors==0.19.0",
    "transformers==5.17.0",
    "accelerate==1.15.0",
    "auto-round==0.15.1",
    "datasets==5.2.0",
)


@dataclass(frozen=True)
class Dedicated:
    """Dequantized weights in a folder. facts: as `dedicated.json` has them."""

    folder: Path
    facts: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Dedicated:
        """A folder that this script has filled.

        Raises:
            SystemExit: it is not complete.
        """
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            with safe_open(folder / WEIGHTS, framework="pt"):
                pass
            facts["tool"], facts["versions"][facts["tool"]], facts["width"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise SystemExit(
                f"{folder} holds no complete dedicated checkpoint ({error}); "
                "make it with benchmarks.quality.dedicated_gptq"
            ) from None
        return cls(folder, facts)

    @property
    def width(self) -> int:
        return int(self.facts["width"])

    @property
    def label(self) -> str:
        """Width, tool and version, and what is not the tool's default."""
        tool = self.facts["tool"]
        notes = [f"{tool} {self.facts['versions'][tool]}"]
        if self.facts["symmetric"]:
            notes.append("symmetric")
        if self.facts["observer"]:
            notes.append(self.facts["observer"])
        return f"dedicated GPTQ {self.width} ({', '.join(notes)})"

    def check(self, **wanted: Any) -> None:
        """Facts that must be these for a comparison to be fair.

        Raises:
            SystemExit: one of them is another.
        """
        for name, value in wanted.items():
            if self.facts.get(name) != value:
                raise SystemExit(
                    f"{self.folder} was made with {name} {self.facts.get(name)}, and what it is "
                    f"compared with has {value}; make one for these"
                )

    def weight(self, name: str, shape: Iterable[int]) -> torch.Tensor:
        """fp32 [N, K] of a layer.

        Raises:
            SystemExit: it is missing, has another shape, or is not finite.
        """
        try:
            with safe_open(self.folder / WEIGHTS, framework="pt") as reader:
                weight = reader.get_tensor(f"{name}.weight").float()
        except SafetensorError:
            raise SystemExit(f"{self.folder} lacks {name}; {self._again}") from None
        if tuple(weight.shape) != tuple(shape) or not torch.isfinite(weight).all():
            raise SystemExit(
                f"{self.folder}: {name} is {list(weight.shape)}, expected finite values "
                f"{list(shape)}; {self._again}"
            )
        return weight

    @property
    def _again(self) -> str:
        return f"remove {FACTS} there and make it again"


def tool_environment(venv: Path) -> Path:
    """The environment's Python; installs what is pinned above unless it is there.

    Raises:
        SystemExit: an environment that is not ours, or pip failed.
    """
    index = os.environ.get("TORCH_INDEX")
    where = ["--index-url", index, "--no-deps"] if index else []
    remedy = (
        "see that pip can reach its index; set TORCH_INDEX to PyTorch's index of CPU wheels if pip "
        f"finds no {TORCH}"
    )
    try:
        return build_environment(venv, STAMP, [[*where, TORCH], [TORCH, *PACKAGES]], remedy)
    except ToolError as error:
        raise SystemExit(str(error)) from None


def settings_of(options: argparse.Namespace, text_sha256: str) -> dict[str, Any]:
    """What decides the weights, as `dedicated.json` has it."""
    return {
        "width": options.width,
        "group_size": options.group_size,
        "symmetric": options.symmetric,
        "observer": options.observer,
        "model": options.model.resolve().name,
        "model_sha256": hash_model(options.model),
        "text": BUILT_IN,
        "text_sha256": text_sha256,
        "requirements": [TORCH, *PACKAGES],
    }


def is_complete(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` holds weights made with these settings.

    Raises:
        SystemExit: it holds others.
    """
    if not (out / FACTS).is_file():
        return False
    Dedicated.read(out).check(**settings)
    return True


def main() -> None:
    """Build the environment, run the tool in it, write."""
    parser = argparse.ArgumentParser(description="Dedicated GPTQ checkpoint by llm-compressor.")
    parser.add_argument("--model", type=Path, required=True, help="unquantized checkpoint folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=4, choices=range(2, 9))
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--observer", help="how the tool finds ranges, such as memoryless_mse")
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--venv", type=Path, default=ROOT / ".cache" / "gptq-env")
    options = parser.parse_args()
    if not any(options.model.glob("*.safetensors")):
        raise SystemExit(f"{options.model} has no .safetensors file; give a checkpoint folder")
    try:
        text = read_text(BUILT_IN)
        tokens = cut_tokens(text, load_tokenizer(options.model), SEQUENCES, LENGTH).fit
    except ValueError as error:
        raise SystemExit(str(error)) from None
    settings = settings_of(options, text.sha256)
    if is_complete(options.out, settings):
        print(f"{options.out} is complete")
        return
    python = tool_environment(options.venv.absolute())
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out) as scratch:
        given, weights, facts = (Path(scratch) / n for n in ("tokens", WEIGHTS, "facts.json"))
        save_file({"tokens": tokens.contiguous()}, given)
        paths = {"model": str(options.model.absolute()), "tokens": str(given)}
        paths |= {"weights": str(weights), "facts": str(facts)}
        order = Path(scratch) / "settings.json"
        order.write_text(json.dumps(settings | paths), encoding="utf-8")
        log = options.out / LOG
        print(f"{PACKAGES[0]} on {tokens.numel()} tokens; its log is {log}")
        log.unlink(missing_ok=True)
        try:
            run_logged([str(python), str(WORKER), str(order)], log, "see its log")
        except ToolError as error:
            raise SystemExit(str(error)) from None
        write(options.out, weights, settings, json.loads(facts.read_text()), tokens)
    print(f"written to {options.out}")


def write(
    out: Path, weights: Path, settings: dict[str, Any], facts: dict[str, Any], tokens: torch.Tensor
) -> None:
    """Take the worker's weights into `out`, and then say so; `facts` are the worker's."""
    calibration = {"tokens": tokens.numel(), "sequence_tokens": tokens.shape[1]}
    content = settings | calibration | facts | {"weights_sha256": hash_file(weights)}
    weights.replace(out / WEIGHTS)
    temporary = out / f".{FACTS}"
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(out / FACTS)


if __name__ == "__main__":
    main()
