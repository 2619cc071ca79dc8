# SPDX-License-Identifier: Apache-2.0
"""One stock vLLM engine on a quantized checkpoint, driven as the benchmark does."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.serving.configurations import engine_specs, no_w4a16
from benchmarks.serving.owners import OURS, OWNERS
from benchmarks.serving.process import EngineError, EngineProcess, running

SCHEME, KERNEL = ("w8a8", "ScaledMM") if no_w4a16() else ("w4a16", "CPUWNA16LinearKernel")
PROMPTS = [[1, *range(100 + 50 * i, 131 + 50 * i)] for i in range(3)]


@pytest.fixture(scope="module")
def engine(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    folder = tmp_path_factory.mktemp("serving")
    specs = engine_specs(str(smollm2), [SCHEME], folder, compiled=False)
    with running(list(specs.values()), folder) as engines:
        yield engines[SCHEME]


@pytest.mark.engine
def test_stock_vllm_serves_the_checkpoint_and_is_profiled(engine):
    kernels = engine.facts["kernels"]
    (linear,) = [name for name in kernels if KERNEL in name]
    (output,) = [name for name in kernels if name.startswith("output layer")]
    assert (kernels[linear], kernels[output]) == (120, 1)
    assert "Unquantized" in output
    assert engine.facts["compilation"] == "NONE"

    steps = engine.ask("decode", prompts=PROMPTS, tokens=6, change=None)["steps"]
    assert len(steps) == 5
    assert all(second > 0 for second in steps)
    prefill = engine.ask("prefill", prompt=PROMPTS[0] * 8, change=None)["seconds"]
    assert [second > 0 for second in prefill] == [True] * 3

    used = engine.cpu_seconds()
    time.sleep(1)
    assert engine.cpu_seconds() - used < 0.05  # an engine that waits leaves the cores alone

    profile = engine.ask("profile", prompts=PROMPTS, tokens=12, trace_tokens=2, change=None)
    owners = profile["owners"]
    assert set(owners) == {owner for owner in OWNERS if not owner.startswith(OURS)}
    assert sum(entry["share"] for entry in owners.values()) == pytest.approx(1)
    assert owners["linear"]["calls"] == 4 * 30
    assert owners["output layer"]["calls"] == 1
    assert ("attention", 30) in {(o["owner"], o["calls"]) for o in profile["operators"]}

    with pytest.raises(EngineError, match=rf"(?s)engine {SCHEME} ended with status 1.*KeyError"):
        engine.ask("sing")
