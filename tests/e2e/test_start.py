# SPDX-License-Identifier: Apache-2.0
"""Engines that each need a start of their own: compiled, saved, tensor-parallel, unsupported."""

import itertools
import json
import shutil

import pytest
import workers
from conftest import running_engine
from models import PROMPTS, SHAPE, first_blocks, pin, small_checkpoint, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def saved(smollm2, tmp_path_factory):
    """The model as a saved flexquant checkpoint, in bfloat16 as the engine would load it."""
    from typer.testing import CliRunner

    from vllm_flexquant.cli import app

    out = tmp_path_factory.mktemp("saved") / "smollm2-flexquant"
    result = CliRunner().invoke(app, ["quantize", str(smollm2), str(out), "--method", "rtn"])
    assert result.exit_code == 0, result.output
    return out


def test_saved_checkpoint_is_recognised_and_speaks_as_the_one_quantized_at_load(
    saved, smollm2, greedy_tokens
):
    """In fp16, the dtype of the checkpoint, so that both see the same weights."""
    found = {}
    for model, method in ((saved, None), (smollm2, "flexquant")):
        with running_engine(model, quantization=method, dtype="float16") as llm:
            assert llm.llm_engine.model_config.quantization == "flexquant"
            found[model] = []
            for width in (4, 8):
                pin(llm, width=width)
                found[model].append(tokens(llm.generate(PROMPTS, greedy_tokens)))
            found[model].append(llm.collective_rpc("flexquant_snapshot", args=(True,))[0]["ladder"])
    assert found[saved] == found[smollm2]


def test_compiled_engine_never_recompiles_and_restarts_to_the_same_tokens(
    smollm2, greedy_tokens, tmp_path, monkeypatch
):
    """On six of the model's thirty blocks; compiling all of them takes minutes."""
    model = first_blocks(tmp_path / "six", smollm2, blocks=6)
    with running_engine(model, quantization="flexquant", dtype="bfloat16") as llm:
        eager = []
        for width in (4, 8):
            pin(llm, width=width)
            eager.append(tokens(llm.generate(PROMPTS, greedy_tokens)))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    runs = []
    for start in range(2):  # cold, then with the cache warm
        with running_engine(
            model, quantization="flexquant", dtype="bfloat16", enforce_eager=False
        ) as llm:
            llm.generate(PROMPTS, greedy_tokens)
            before = llm.collective_rpc(workers.compile_counters)
            assert before[0]["stats"]["unique_graphs"] == 1
            run = []
            for width in (4, 8):
                pin(llm, width=width)
                run.append(tokens(llm.generate(PROMPTS, greedy_tokens)))
            runs.append(run)
            if start == 0:
                switch_often(llm, greedy_tokens)
                assert llm.collective_rpc(workers.compile_counters) == before
    assert runs[0] == runs[1]
    # inductor fuses elementwise operations and rounds them elsewhere than eager code
    for compiled, plain in zip(runs[0], eager, strict=True):
        assert [t[:2] for t in compiled] == [t[:2] for t in plain]


def switch_often(llm, params):
    """At least 200 changes of the widths, step by step."""
    changes = 0
    for _ in range(20):
        pin(
            llm,
            policy="entropy",
            entropy_low=0.0,
            entropy_high=6.0,
            hysteresis=0.0,
            up_for_free=False,  # else it depends on the processor whether widths change
        )
        llm.collective_rpc("flexquant_records", args=(True,))
        longer = params.clone()
        longer.max_tokens = 64
        llm.generate(PROMPTS, longer)
        steps = llm.collective_rpc("flexquant_records")[0]
        changes += sum(a["widths"] != b["widths"] for a, b in itertools.pairwise(steps))
        if changes >= 200:
            return
    raise AssertionError(f"only {changes} changes of width")


def test_tensor_parallel_ranks_agree(smollm2, tmp_path, greedy_tokens, monkeypatch):
    """Quantized at load, for SmolLM2's nine heads cannot be split in two; saved planes are in
    test_budget.py."""
    model = small_checkpoint(tmp_path / "llama", smollm2, {"model_type": "llama", **SHAPE})
    with running_engine(model, quantization="flexquant", max_model_len=256) as llm:
        pin(llm, width=8)
        alone = tokens(llm.generate(PROMPTS, greedy_tokens))
        whole = llm.collective_rpc("flexquant_snapshot", args=(True,))[0]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with running_engine(
        model, quantization="flexquant", max_model_len=256, tensor_parallel_size=2
    ) as llm:
        pin(llm, width=8)
        found = tokens(llm.generate(PROMPTS, greedy_tokens))
        pin(llm, policy="entropy", entropy_low=0.0, entropy_high=20.0)
        llm.collective_rpc("flexquant_records", args=(True,))
        llm.generate(PROMPTS, greedy_tokens)
        first, second = llm.collective_rpc("flexquant_records")
        assert first == second
        assert len({record["level"] for record in first}) > 1
        part = llm.collective_rpc("flexquant_snapshot", args=(True,))[1]
    assert [t[0] for t in found] == [t[0] for t in alone]
    assert part["levels"] == whole["levels"]
    shapes = {layer["name"]: layer["shape"] for layer in part["layers"]}
    assert shapes["lm_head"] == [49152 // 2, 128]
    assert shapes["model.layers.0.mlp.down_proj"] == [128, 256 // 2]


def test_untied_output_layer_and_biases(smollm2, tmp_path, greedy_tokens):
    model = small_checkpoint(
        tmp_path / "qwen2",
        smollm2,
        {"model_type": "qwen2", "tie_word_embeddings": False, **SHAPE},
    )
    found = {}
    with running_engine(
        model,
        quantization="flexquant",
        max_model_len=256,
        additional_config={"flexquant": {"policy": "static", "layout": "2|1|1|2|2"}},
    ) as llm:
        view = llm.collective_rpc("flexquant_snapshot", args=(True,))[0]
        assert [layer["name"] for layer in view["layers"]][-1] == "lm_head"
        assert view["layers"][0]["widths"] == [2, 3, 4, 6, 8]
        found["flexquant"] = tokens(llm.generate(PROMPTS, greedy_tokens))
    with running_engine(model, max_model_len=256) as llm:
        found["plain"] = tokens(llm.generate(PROMPTS, greedy_tokens))
    assert [t[0] for t in found["flexquant"]] == [t[0] for t in found["plain"]]


def test_experts_and_routers_stay_unquantized_and_are_named(smollm2, tmp_path, greedy_tokens):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    model = small_checkpoint(
        tmp_path / "moe",
        smollm2,
        {"model_type": "qwen3_moe", "head_dim": 32, "tie_word_embeddings": False} | SHAPE | experts,
    )
    with running_engine(model, quantization="flexquant", max_model_len=256) as llm:
        view = llm.collective_rpc("flexquant_snapshot", args=(True,))[0]
        assert len(tokens(llm.generate(PROMPTS, greedy_tokens))[0]) == 16
    left = " ".join(view["unquantized"])
    assert "experts are not supported yet" in left
    assert "router model.layers.0.mlp.gate: routers keep their precision" in left
    assert "model.layers.0.self_attn.qkv_proj" in [layer["name"] for layer in view["layers"]]


def test_a_model_without_a_layer_that_fits_is_refused(smollm2, tmp_path, capfd):
    odd = {"hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 2, "head_dim": 20}
    model = small_checkpoint(
        tmp_path / "odd",
        smollm2,
        {"model_type": "llama", "tie_word_embeddings": True} | SHAPE | odd,
    )
    with (
        pytest.raises(RuntimeError, match="Engine core initialization failed"),
        running_engine(model, quantization="flexquant", max_model_len=256),
    ):
        pass
    said = capfd.readouterr()
    assert "flexquant found no layer that it can quantize" in said.out + said.err
    assert "no group size of 64, 32 divides its 40 inputs" in said.out + said.err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncate", "model.safetensors has .* bytes where its header promises|is truncated"),
        ("flip", "model.safetensors is corrupted: its hash is not the one in flexquant.json"),
        ("drop", "the checkpoint has no model.layers.3.mlp.down_proj.plane1"),
        ("version", "format_version is '2.0', this release of vllm-flexquant reads 1.x"),
    ],
)
def test_damaged_checkpoints_are_refused_before_anything_starts(saved, tmp_path, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    weights = copy / "model.safetensors"
    if damage == "truncate":
        with weights.open("r+b") as stream:
            stream.truncate(weights.stat().st_size - 1000)
    elif damage == "flip":
        with weights.open("r+b") as stream:
            stream.seek(-5000, 2)
            byte = stream.read(1)
            stream.seek(-1, 1)
            stream.write(bytes([byte[0] ^ 1]))
    elif damage == "drop":
        kept = load_file(weights)
        del kept["model.layers.3.mlp.down_proj.plane1"]
        with safe_open(weights, "pt") as reader:
            save_file(kept, weights, metadata=reader.metadata())
        (copy / "flexquant.json").unlink()
    else:
        config = json.loads((copy / "config.json").read_text())
        config["quantization_config"]["format_version"] = "2.0"
        (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message), running_engine(copy):
        pass


def test_beside_other_drafts_entropies_are_seen_and_grants_kept(smollm2, greedy):
    """vLLM's V1 runner takes no logits processors there."""
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    repeated = ["one two three one two three one two three one"]
    with running_engine(
        smollm2, quantization="flexquant", dtype="float32", speculative_config=ngram
    ) as llm:
        pin(llm, policy="entropy", prefill="policy", entropy_low=50.0, entropy_high=99.0)
        found = {}
        for name in ("balanced", "exact"):
            llm.collective_rpc("flexquant_records", args=(True,))
            params = greedy(24, ignore_eos=True, extra_args={"flexquant_class": name})
            llm.generate(repeated, params)
            found[name] = llm.collective_rpc("flexquant_records")[0]
        assert len(found["exact"]) < 24, "nothing was drafted"
        for steps in found.values():
            assert all(nats is not None for step in steps for nats in step["entropy"])
        assert {width for step in found["exact"] for width in step["widths"]} == {8}
        assert {width for step in found["balanced"][2:] for width in step["widths"]} == {4}
