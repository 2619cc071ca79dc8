# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from benchmarks.serving import vllm_bench
from benchmarks.serving.engine import EngineSpec

SERVER = SimpleNamespace(url="http://127.0.0.1:1")


def rounds(*speeds: float) -> list[dict[str, float]]:
    return [dict.fromkeys(vllm_bench.KEPT, 1.0) | {"output_throughput": s} for s in speeds]


def test_speeds_are_over_those_of_the_same_round():
    found = vllm_bench.summarise_serve(
        {"fp32": {"4": rounds(10.0, 20.0)}, "w8a8": {"4": rounds(20.0, 20.0)}}, "fp32"
    )
    assert found["w8a8"]["4"]["against"]["fp32"]["rounds"] == [2.0, 1.0]
    assert found["fp32"]["4"]["against"]["fp32"]["median"] == 1.0
    assert found["w8a8"]["4"]["median_tpot_ms"]["median"] == 1.0


def test_vllm_takes_the_client_s_arguments():
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    options = parser.parse_args(vllm_bench.client_arguments(SERVER, "tokens", 4, 8, 1))
    assert (options.max_concurrency, options.num_prompts) == (4, 8)
    assert options.random_input_len == vllm_bench.INPUT
    assert options.ignore_eos


def test_vllm_takes_the_arguments_of_throughput(tmp_path):
    from vllm.benchmarks.throughput import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    spec = EngineSpec("flexquant", "model", "bfloat16", arguments={"quantization": "flexquant"})
    _, *words = vllm_bench.throughput_command(spec, tmp_path / "out.json")
    assert words[:2] == ["bench", "throughput"]
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    options = parser.parse_args(words[2:])
    assert options.quantization == "flexquant"
    assert options.random_output_len == vllm_bench.OUTPUT


def test_the_baseline_is_the_first_and_each_is_there_once():
    for calibrated in (True, False):
        names = [c.name for c in vllm_bench.configurations_of(calibrated)]
        assert names[0] in ("bf16", "fp32")
        assert len(names) == len(set(names))
        assert any(n.startswith("calibrated") for n in names) == calibrated
