# SPDX-License-Identifier: Apache-2.0
"""Real vLLM engines on the small real model, shared between tests: a start takes half a minute."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.engine import compute_references
from benchmarks.quality.sequences import TEXT, cut_text

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

ENGINE_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # lets tests send functions to the worker
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_FLEXQUANT_TRACE_STEPS": "4096",
    # workers import helpers of this folder and of benchmarks/
    "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "HF_HUB_OFFLINE": "1",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.engine)


@contextmanager
def running_engine(model: Path, **arguments: Any) -> Iterator[Any]:
    """`vllm.LLM` on `model`, shut down at the end."""
    from vllm import LLM

    values = {"max_model_len": 1024, "enforce_eager": True, "seed": 0, "max_num_seqs": 16}
    llm = LLM(str(model), **values | arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def engine_environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in ENGINE_ENV}
    os.environ.update(ENGINE_ENV)
    yield
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@dataclass(frozen=True)
class ForcedText:
    """Sequences to decode, the folder of their references, and the plain implementation's KL."""

    sequences: list[Any]
    folder: Path
    planes: dict[str, Any]


@pytest.fixture(scope="session")
def forced_text(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> ForcedText:
    """A short text, and what the plain implementation makes of it at each width."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("references")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    sequences = cut_text(tokenizer, TEXT.read_text(encoding="utf-8"), 8, prompt=16, forced=48)
    planes = compute_references(str(smollm2), sequences, folder, [4, 6, 8], "float32")
    return ForcedText(sequences, folder, planes)


@pytest.fixture(scope="module")
def engine(smollm2: Path, forced_text: ForcedText) -> Iterator[Any]:
    """flexquant engine, eager, chunked prefill in small chunks, prefix caching on."""
    os.environ["BENCH_REFERENCE"] = str(forced_text.folder / "reference.npy")
    os.environ["BENCH_RECORD"] = str(forced_text.folder / "records.jsonl")
    with running_engine(
        smollm2,
        quantization="flexquant",
        # bf16 rounding alone would be a share of the KL at 8 bits
        dtype="float32",
        worker_cls="workers.MeasuringWorker",
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        max_num_batched_tokens=64,
        # forces only requests that ask for it; flexquant's own processor goes first
        logits_processors=["benchmarks.quality.teacher_forcing:TeacherForcing"],
    ) as llm:
        yield llm


@pytest.fixture
def fresh(engine: Any) -> Any:
    """The shared engine as it was started, its trace empty."""
    defaults = {
        "policy": "entropy",
        "min_bits": 2,
        "max_bits": 8,
        "prefill": "full",
        "aggregate": "mean",
        "entropy_decay": 0.5,
        "hysteresis": 0.05,
        "dwell": 1,
    }
    assert engine.collective_rpc("flexquant_change", args=(defaults,)) == [""]
    engine.reset_prefix_cache()
    engine.collective_rpc("flexquant_records", args=(True,))
    return engine


@pytest.fixture
def greedy() -> Callable[..., Any]:
    from vllm import SamplingParams

    def make(tokens: int = 24, **arguments: Any) -> Any:
        return SamplingParams(temperature=0.0, max_tokens=tokens, **arguments)

    return make


@pytest.fixture(scope="module")
def greedy_tokens():
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
