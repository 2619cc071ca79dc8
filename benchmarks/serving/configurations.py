# SPDX-License-Identifier: Apache-2.0
"""What is measured: configurations, and the engines that they run in."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import ToolError
from benchmarks.peers import llama
from benchmarks.provenance import machine
from benchmarks.serving.checkpoints import SCHEMES, make_checkpoint
from benchmarks.serving.engine import EngineSpec

FLEX_ENGINE, FLEX_HEAD_ENGINE = "flexquant", "flexquant-bf16-output"
CALIBRATED_ENGINE = "calibrated"
LLAMA = "llama-"
"""What names of configurations and engines of llama.cpp begin with."""

BUDGETS = (0.01, 0.03, 0.1)
"""Nats per token, asked of policy budget."""


@dataclass(frozen=True)
class Configuration:
    """One line of the results.

    width: bits of every layer, in a flexquant engine. change: what such an engine is told. exact:
    whether it should compute what planes rounded to nearest compute at that width, the output layer
    among them; otherwise no worse. limit: KL in nats per token above which the engine must be
    computing something else. asked: of policy budget, nats per token.
    """

    name: str
    label: str
    engine: str
    width: int | None = None
    change: dict[str, Any] | None = None
    exact: bool = False
    limit: float = 2.0
    asked: float | None = None


def _static(engine: str, width: int, label: str, exact: bool = False) -> Configuration:
    change = {"policy": "static", "width": width}
    return Configuration(f"{engine}-{width}", label, engine, width, change, exact)


def _llama(kind: str) -> Configuration:
    limit = 0.05 if kind == llama.F16 else 2.0
    return Configuration(LLAMA + kind, f"llama.cpp {kind.upper()}", LLAMA + kind, limit=limit)


def _budget(nats: float) -> Configuration:
    change = {"policy": "budget", "signal": "probe", "budget": nats}
    label = f"flexquant budget {nats:g}"
    return Configuration(f"budget-{nats:g}", label, CALIBRATED_ENGINE, change=change, asked=nats)


CONFIGURATIONS = {
    configuration.name: configuration
    for configuration in (
        Configuration("bf16", "bf16", "bf16", limit=0.05),
        Configuration("fp32", "fp32", "fp32", limit=0.001),
        Configuration("w8a8", "W8A8", "w8a8", limit=0.5),
        Configuration("w4a16", "W4A16", "w4a16"),
        Configuration("w4a16-weights-only", "W4A16, weights only", "w4a16-weights-only"),
        *(_static(FLEX_ENGINE, w, f"flexquant {w} bit", exact=True) for w in (4, 6, 8)),
        *(_static(FLEX_HEAD_ENGINE, w, f"flexquant {w} bit, bf16 output") for w in (4, 8)),
        *(_static(CALIBRATED_ENGINE, w, f"flexquant {w} bit, calibrated") for w in (4, 6, 8)),
        *map(_budget, BUDGETS),
        *map(_llama, llama.TYPES),
    )
}

UNQUANTIZED = {"bf16": "bfloat16", "fp32": "float32"}

QUICK = (
    *("bf16", "w8a8", "w4a16"),
    *("calibrated-8", "calibrated-6", "calibrated-4", "budget-0.03"),
    *("llama-q8_0", "llama-q4_0"),
)

NOTES = (
    "Engines run eagerly unless settings.compiled is true, each in a process of its own with the "
    "engine core in it, on the cores and threads under engines.",
    "So an engine computes on as many threads as it has cores, while `vllm serve` would bind its "
    "worker to all but one.",
    "Activations of quantized engines are in bf16, but in fp32 on CPUs without instructions for "
    "bf16 (engines.*.dtype); llama.cpp has its own.",
    "flexquant quantizes the output layer too; W8A8 and W4A16 leave it unquantized, which is the "
    "default of llm-compressor. The configurations named '... bf16 output' leave it too "
    "(option output_layer=false).",
    "All three widths of flexquant run in one engine, from one copy of the weights; so do those of "
    "the calibrated checkpoint and policy budget.",
    "llama.cpp's engines are processes of their own too, on the same cores, with its defaults: "
    "sequences at a time are one batch.",
    "With AMX, vLLM computes W4A16 checkpoints with int8 activations (VLLM_CPU_INT4_W4A8, on by "
    "default); 'W4A16, weights only' turns that off. engines.*.kernels says what ran.",
)


def no_w4a16() -> str:
    """Why vLLM's CPU backend has no kernel for W4A16 here; empty where it has."""
    if platform.machine() != "x86_64" or "avx512f" in machine()["flags"]:
        return ""
    return "vLLM compiles its W4A16 kernel for AVX512 only (no cpu_gemm_wna16 on AVX2)"


def unquantized(flags: Sequence[str]) -> str:
    """What one would serve unquantized: bf16, but fp32 on a CPU without instructions for bf16."""
    return "bf16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "fp32"


def dtype_of(engine: str) -> str:
    """Of an engine's activations: quantized ones run in what one would serve unquantized in."""
    return UNQUANTIZED[engine if engine in UNQUANTIZED else unquantized(machine()["flags"])]


def default_names(flags: Sequence[str], calibrated: bool, quick: bool = False) -> list[str]:
    """All configurations that differ on a CPU with these flags (`provenance.machine`), less those
    of an unquantized output layer, which are asked for by name.

    Args:
        calibrated: whether there is a calibrated checkpoint.
        quick: only those of `QUICK`, and what is compared with.
    """
    return [
        name
        for name, configuration in CONFIGURATIONS.items()
        if not quick or name in (*QUICK, unquantized(flags))
        if name != "w4a16-weights-only" or "amx_tile" in flags
        if configuration.engine != FLEX_HEAD_ENGINE
        if (calibrated or configuration.engine != CALIBRATED_ENGINE)
    ]


def engine_specs(
    model: str,
    names: Sequence[str],
    folder: Path,
    compiled: bool,
    calibrated: Path | None = None,
    unavailable: dict[str, str] | None = None,
    build: bool = False,
) -> dict[str, EngineSpec]:
    """The engines of the configurations `names`; checkpoints that they need are made in `folder`.

    Args:
        model: folder of an unquantized checkpoint.
        calibrated: one of it that `flexquant quantize` calibrated, for the configurations that
            need it.
        unavailable: gets the reason of each engine that cannot be had, which is then left out.
        build: whether llama.cpp is built where it is missing, which takes long.

    Raises:
        ValueError: a configuration needs a calibrated checkpoint and it is None.
    """
    specs = {}
    for engine in dict.fromkeys(CONFIGURATIONS[name].engine for name in names):
        served, dtype, arguments, environ = model, dtype_of(engine), {}, {}
        command: tuple[str, ...] = ()
        if engine.startswith(LLAMA):
            dtype = engine.removeprefix(LLAMA)
            try:
                tool = llama.python(build)
                served = str(llama.gguf_file(Path(model), dtype, tool))
            except ToolError as error:
                if unavailable is None:
                    raise
                unavailable[engine] = str(error)
                continue
            command = (str(tool), str(llama.WORKER))
        elif engine == CALIBRATED_ENGINE:
            if calibrated is None:
                raise ValueError(f"{names} need a calibrated checkpoint, and none is named")
            served = str(calibrated)
        elif engine.startswith("flexquant"):
            arguments["quantization"] = "flexquant"
            quantized = json.dumps(engine == FLEX_ENGINE)
            environ = {
                "VLLM_FLEXQUANT_POLICY": "static",
                "VLLM_FLEXQUANT_OUTPUT_LAYER": quantized,
            }
        elif engine.startswith("w4a16") and no_w4a16() and unavailable is not None:
            unavailable[engine] = no_w4a16()
            continue
        elif engine not in UNQUANTIZED:
            scheme = engine.removesuffix("-weights-only")
            served = str(folder / scheme)
            if not Path(served).exists():
                make_checkpoint(Path(model), folder / scheme, SCHEMES[scheme])
            if scheme != engine:
                environ["VLLM_CPU_INT4_W4A8"] = "0"
        specs[engine] = EngineSpec(engine, served, dtype, compiled, arguments, environ, command)
    return specs


def stored_bytes(spec: EngineSpec) -> int | None:
    """Of the files that a system serves from; None for one that quantizes while it loads."""
    path = Path(spec.model)
    if spec.arguments.get("quantization"):
        return None
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)
