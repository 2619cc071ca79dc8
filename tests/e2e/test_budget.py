# SPDX-License-Identifier: Apache-2.0
"""Engines with a calibrated checkpoint: its ladder on all ranks, promises, policy budget."""

import pytest
import workers
from conftest import running_engine
from models import PROMPTS, SHAPE, pin, small_checkpoint, tokens

from benchmarks.quality.sequences import TEXT
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.quantize.calibrate import CalibrationOptions, calibrate_checkpoint
from vllm_flexquant.quantize.prune import prune_checkpoint
from vllm_flexquant.telemetry.replay import replay
from vllm_flexquant.telemetry.steps import Trace


def ranks_draft_the_same(llm, greedy_tokens):
    """Answers are those of plain steps, and both ranks drafted and kept as many."""
    pin(llm, speculate=0, width=8)
    plain = tokens(llm.generate(PROMPTS, greedy_tokens))
    pin(llm, speculate=3, draft_gate="fixed")
    drafted = tokens(llm.generate(PROMPTS, greedy_tokens))
    first, second = (
        s["speculation"] for s in llm.collective_rpc("flexquant_snapshot", args=(True,))
    )
    assert drafted == plain
    assert first["drafted"][0] > 0
    assert (first["drafted"], first["accepted"]) == (second["drafted"], second["accepted"])
    # with clocks of their own they go by costs that are the same
    pin(llm, draft_gate="gain")
    assert tokens(llm.generate(PROMPTS, greedy_tokens)) == plain
    assert not any(
        s["speculation"]["cost_table"]
        for s in llm.collective_rpc("flexquant_snapshot", args=(True,))
    )
    pin(llm, speculate=0)


def exact_beside_others_is_as_if_pinned(llm, record):
    """Also: both ranks decide the same, by the scores of each step, as a replay does."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    def asking(count, **wishes):
        return SamplingParams(
            temperature=0.0,
            max_tokens=count,
            ignore_eos=True,
            extra_args={f"flexquant_{name}": value for name, value in wishes.items()},
        )

    exact = asking(24, **{"class": "exact"})
    rungs = record.ladder.rungs
    budget = rungs[len(rungs) // 2].kl_nats + record.int8_activations[0]
    llm.collective_rpc("flexquant_records", args=(True,))
    beside = llm.generate([*PROMPTS, *PROMPTS], [exact] * 2 + [asking(48, budget=budget)] * 2)
    traces = llm.collective_rpc("flexquant_records", args=(True,))
    assert traces[0] == traces[1]
    together, alone = traces[0][5:20], traces[0][-20:]
    assert [set(step["widths"]) for step in together] == [{8}] * 15
    assert all(min(step["widths"]) < 8 for step in alone)
    assert len({tuple(step["scores"]) for step in alone}) > 10
    recorded = Trace.load(llm.collective_rpc("flexquant_trace")[0])
    assert any(step.probed for step in recorded.steps)
    assert replay(recorded).same == len(recorded.steps) >= len(traces[0])
    for status in llm.collective_rpc("flexquant_snapshot", args=(True,)):
        accounts = status["budget"]["classes"]
        [own] = status["budget"]["own"]
        assert 0.86 * budget < own["asked_nats"] <= budget
        assert (accounts["exact"]["tokens"], own["tokens"]) == (2 * 23, 2 * 47)
        assert accounts["exact"]["booked_nats"] < own["booked_nats"] < 2 * budget
    with pytest.raises(VLLMValidationError, match=r"flexquant_class is 'golden'; .* has exact"):
        llm.generate(PROMPTS[:1], asking(1, **{"class": "golden"}))
    pin(llm, width=8)
    assert tokens(llm.generate(PROMPTS, exact)) == tokens(beside[:2])


@pytest.fixture(scope="module")
def calibrated(smollm2, tmp_path_factory):
    """(folder, record) of a small calibrated model."""
    folder = tmp_path_factory.mktemp("calibrated")
    model = small_checkpoint(folder / "llama", smollm2, {"model_type": "llama", **SHAPE})
    settings = CalibrationOptions(
        text=str(TEXT), sequences=12, length=128, measured_rungs=3, measured_units=4
    )
    record = calibrate_checkpoint(model, folder / "saved", FlexQuantOptions(), settings)
    return folder / "saved", record


@pytest.fixture(autouse=True)
def a_core_for_each_rank(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")


def test_a_calibrated_checkpoint_brings_its_ladder_to_all_ranks(
    calibrated, tmp_path, greedy_tokens
):
    folder, record = calibrated
    rungs = record.ladder.rungs[::-1]
    with running_engine(
        folder,
        max_model_len=256,
        tensor_parallel_size=2,
        additional_config={"flexquant": {"policy": "budget", "speculate": 3}},
    ) as llm:
        pin(llm, speculate=0)
        for status in llm.collective_rpc("flexquant_snapshot", args=(True,)):
            assert status["ladder"]["source"] == "KL on text.txt (greedy)"
            assert status["ladder"]["kl_nats"] == [rung.kl_nats for rung in rungs]
            assert status["ladder"]["mean_bits"] == pytest.approx([r.mean_bits for r in rungs])
            assert status["options"]["policy"] == "budget"
            assert status["budget"]["probe"] == record.probe.layer
        exact_beside_others_is_as_if_pinned(llm, record)
        ranks_draft_the_same(llm, greedy_tokens)
        level = len(rungs) // 2
        pin(llm, level=level)
        llm.generate(PROMPTS, greedy_tokens)
        widths = record.widths_after(rungs[level].steps)
        for status in llm.collective_rpc("flexquant_snapshot", args=(True,)):
            found = {layer["name"]: layer["width"] for layer in status["layers"]}
            assert (
                found["model.layers.1.self_attn.qkv_proj"]
                == (widths["model.layers.1.self_attn.q_proj"])
            )
            assert (
                found["model.layers.0.mlp.gate_up_proj"] == (widths["model.layers.0.mlp.gate_proj"])
            )
            assert len(set(found.values())) > 1
            assert sorted(found.values()) == sorted(widths.values())
        answers = tokens(llm.generate(PROMPTS, greedy_tokens))
    # the same level of the same weights, with nothing stored for levels above
    pruned = tmp_path / "pruned"
    prune_checkpoint(folder, pruned, rungs[level].mean_bits)
    with running_engine(
        pruned,
        max_model_len=256,
        tensor_parallel_size=2,
        additional_config={"flexquant": {"policy": "static"}},
    ) as llm:
        for status in llm.collective_rpc("flexquant_snapshot", args=(True,)):
            assert status["levels"] == level + 1
            assert status["ladder"]["kl_nats"] == [rung.kl_nats for rung in rungs[: level + 1]]
            assert sorted(layer["width"] for layer in status["layers"]) == sorted(widths.values())
        assert tokens(llm.generate(PROMPTS, greedy_tokens)) == answers


def serve(llm, prompts, params, abort_after=None):
    """Tokens of each answer by request and index; the request "aborted" ends before its time."""
    engine, answers, steps = llm.llm_engine, {}, 0
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                answers[output.request_id] = [list(o.token_ids) for o in output.outputs]
        steps += 1
        if steps == abort_after:
            engine.abort_request(["aborted"])
    return answers


def test_stages_of_a_pipeline_lose_no_request_under_a_budget(calibrated):
    """Several answers to a prompt, an aborted request, preemption, prompts in chunks, a prefix that
    is cached: every request ends, and every account is that of the tokens decoded."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    folder, record = calibrated
    rungs = record.ladder.rungs
    budget = rungs[len(rungs) // 2].kl_nats + record.int8_activations[0]
    with running_engine(
        folder,
        max_model_len=512,
        pipeline_parallel_size=2,
        # vLLM 0.32 on CPU has buffers for a second stage only after its warm-up, which eager skips
        enforce_eager=False,
        compilation_config={"mode": 2, "backend": "eager"},
        max_num_seqs=3,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=6,
        enable_prefix_caching=True,
        disable_log_stats=False,
        additional_config={"flexquant": {"budget": budget}},
    ) as llm:
        params = SamplingParams(
            n=2,
            temperature=0.8,
            max_tokens=280,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        text = TEXT.read_text(encoding="utf-8")
        prompts = {"one": text[:400], "two": text[:400] + PROMPTS[0], "aborted": PROMPTS[1]}
        answers = serve(llm, prompts, params, abort_after=20)
        for name in ("one", "two"):
            first, second = answers[name]
            assert len(first) == len(second) == 280
            assert first != second
        counted = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
        preempted = counted["vllm:num_preemptions"]
        assert preempted > 0
        stages = llm.collective_rpc("flexquant_snapshot", args=(True,))
        assert len(stages) == 2
        names = [{layer["name"] for layer in stage["layers"]} for stage in stages]
        assert all(names)
        assert not names[0] & names[1]
        # one stage has the layer that the probe listens to; each decides its own layers
        assert [stage["budget"]["probe"] for stage in stages].count(record.probe.layer) == 1
        for steps in llm.collective_rpc("flexquant_records"):
            decoding = [s for s in steps if s["request_ids"] and not any(s["prompt"])]
            assert len(decoding) > 300
            assert min(min(s["widths"]) for s in decoding) < 8
        account = stages[1]["budget"]["classes"]["balanced"]
        # the first token of an answer comes of its prompt, as does one after each preemption
        assert 4 * 279 - preempted <= account["tokens"] <= 4 * 279 + 2 * 20
        assert account["booked_nats"] < 2 * budget
        assert len(llm.collective_rpc(workers.remembered_requests)[0]) <= 3
