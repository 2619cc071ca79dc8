# SPDX-License-Identifier: Apache-2.0
"""Self-speculation in a real engine: nothing is lost, nothing is held twice."""

import json

import pytest
import torch
import workers
from conftest import running_engine
from models import pin, tokens

from benchmarks.quality.sequences import TEXT

FIXED = {"speculate": 4, "draft_gate": "fixed"}
PLAIN = {"speculate": 0}

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QUESTIONS = [
    "Name three colours.",
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Give a Python function that adds two numbers.",
]


@pytest.fixture(scope="module")
def engine(smollm2):
    """Few blocks, so that sequences preempt each other; prompts in chunks; prefixes cached."""
    with running_engine(
        smollm2,
        quantization="flexquant",
        # bf16 has logits that are equal
        dtype="float32",
        worker_cls="workers.MeasuringWorker",
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=10,
        enable_prefix_caching=True,
        disable_log_stats=False,
        additional_config={"flexquant": {"policy": "static", **FIXED}},
    ) as llm:
        yield llm


def speculation(llm):
    return llm.collective_rpc("flexquant_snapshot", args=(True,))[0]["speculation"]


def prompts():
    text = TEXT.read_text(encoding="utf-8")
    return [text[i * 300 : i * 300 + 200] for i in range(4)] + [CHAT.format(q) for q in QUESTIONS]


def both(llm, prompts, params):
    """Answers of plain steps, and of drafts that are verified."""
    pin(llm, **PLAIN)
    plain = llm.generate(prompts, params)
    before = speculation(llm)
    pin(llm, **FIXED)
    drafted = llm.generate(prompts, params)
    after = speculation(llm)
    assert sum(before["drafted"]) < sum(after["drafted"])
    assert sum(before["accepted"]) < sum(after["accepted"])
    return plain, drafted


def differ_by_noise(plain, other):
    """Whether two answers are equal up to where the two best logits of the first are."""
    found = plain.outputs[0]
    for i, (a, b) in enumerate(zip(found.token_ids, other.outputs[0].token_ids, strict=True)):
        if a != b:
            best, second = sorted((p.logprob for p in found.logprobs[i].values()), reverse=True)[:2]
            return best - second < 0.01 and b in found.logprobs[i]
    return True


def test_greedy_answers_are_those_of_plain_steps(engine, greedy):
    """With preemption, prompts in chunks and cached prefixes; all 200 prompts are in
    `benchmarks.serving.speculation`."""
    asked = prompts()
    plain, drafted = both(engine, asked, greedy(24, ignore_eos=True, logprobs=2))
    assert all(map(differ_by_noise, plain, drafted))
    assert tokens(plain)[4:] == tokens(drafted)[4:]
    counts = speculation(engine)
    assert counts["accepted"][0] > 0.6 * counts["drafted"][0]
    assert len(counts["drafted"]) == 4
    # a prefix whose blocks drafts have written to is read again
    again = engine.generate(asked, greedy(24, ignore_eos=True, logprobs=2))
    assert all(map(differ_by_noise, plain, again))


def preemptions(llm):
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def test_sequences_that_preempt_each_other_lose_nothing(engine, greedy):
    """With plain steps, and with drafts."""
    text = TEXT.read_text(encoding="utf-8")
    asked = [text[i * 1200 : (i + 1) * 1200] for i in range(4)]
    answers = []
    for changes in (PLAIN, FIXED):
        pin(engine, **changes)
        before = preemptions(engine)
        answers.append(engine.generate(asked, greedy(64, ignore_eos=True, logprobs=2)))
        assert preemptions(engine) > before
        assert [len(t) for t in tokens(answers[-1])] == [64] * 4
        assert len(engine.collective_rpc(workers.remembered_requests)[0]) <= 4
    assert all(map(differ_by_noise, *answers))


def test_stop_strings_structured_output_and_several_answers(engine, greedy):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    chosen = StructuredOutputsParams(
        json={
            "type": "object",
            "properties": {"name": {"type": "string"}, "legs": {"type": "integer"}},
            "required": ["name", "legs"],
        }
    )
    asked = [CHAT.format("Describe a spider as JSON with name and legs.")]
    plain, drafted = both(engine, asked, greedy(64, structured_outputs=chosen))
    assert tokens(plain) == tokens(drafted)
    assert set(json.loads(drafted[0].outputs[0].text)) == {"name", "legs"}
    plain, drafted = both(engine, [CHAT.format(QUESTIONS[0])], greedy(64, stop=["\n", "."]))
    assert plain[0].outputs[0].text == drafted[0].outputs[0].text
    assert drafted[0].outputs[0].finish_reason == "stop"
    several = SamplingParams(n=3, temperature=1.0, max_tokens=24, ignore_eos=True)
    answers = engine.generate([CHAT.format(QUESTIONS[2])], several)[0].outputs
    assert len({tuple(a.token_ids) for a in answers}) == 3


def test_an_aborted_request_leaves_the_others_as_they_are(engine, greedy):
    pin(engine, **FIXED)
    asked, params = prompts()[4:7], greedy(32, ignore_eos=True)
    wanted = tokens(engine.generate(asked, params))
    core, answers = engine.llm_engine, {}
    for name, prompt in zip(("first", "aborted", "third"), asked, strict=True):
        core.add_request(name, prompt, params)
    steps = 0
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == 6:
            core.abort_request(["aborted"])
    assert answers.keys() == {"first", "third"}
    assert [answers["first"], answers["third"]] == [wanted[0], wanted[2]]
    assert len(engine.collective_rpc(workers.remembered_requests)[0]) <= 4


def test_sampled_answers_have_the_distribution_of_plain_steps(engine):
    """The second and third token of many answers, of three candidates each, by a chi-square test of
    homogeneity; the rejection sampler is vLLM's."""
    from vllm import SamplingParams

    params = SamplingParams(
        n=100, temperature=1.0, top_k=3, max_tokens=3, detokenize=False, ignore_eos=True
    )
    plain, drafted = both(engine, ["The colour of the"], params)
    seen = {}
    for which, outputs in enumerate((plain, drafted)):
        for answer in outputs[0].outputs:
            seen.setdefault(tuple(answer.token_ids)[1:], [0, 0])[which] += 1
    rare = [sum(counts) < 10 for counts in seen.values()]
    rows = [c for c, is_rare in zip(seen.values(), rare, strict=True) if not is_rare]
    rows.append([sum(c[i] for c, r in zip(seen.values(), rare, strict=True) if r) for i in (0, 1)])
    assert len(rows) > 4
    found = torch.tensor([row for row in rows if sum(row)], dtype=torch.float64)
    expected = found.sum(1, keepdim=True) * found.sum(0) / found.sum()
    statistic = ((found - expected) ** 2 / expected).sum()
    chance = torch.special.gammaincc(torch.tensor((len(found) - 1) / 2), statistic / 2)
    assert chance > 1e-3, found


def test_the_draft_is_the_target(engine):
    """By pointer and by memory: no weights, and no cache, beside the target's."""
    found = engine.collective_rpc(workers.what_drafts_hold)[0]
    assert found["same_model"]
    assert found["own_parameters"] == 0
    assert found["cache_layers"] == found["layers"]
    # vLLM's proposer has input buffers
    assert found["own_bytes"] < 0.02 * found["weight_bytes"]
    _, kept = engine.collective_rpc("memory")[0]
    assert kept < 1.1 * found["weight_bytes"] + 16e6


def test_policies_and_metrics_go_on(engine, greedy):
    """Entropies are those of the verifying step; a policy may choose its level."""
    # what is decided must not depend on what low widths save on this processor
    pin(engine, **FIXED, policy="entropy", draft_level=0, up_for_free=False)
    engine.collective_rpc("flexquant_records", args=(True,))
    engine.generate(prompts()[:2], greedy(32, ignore_eos=True))
    steps = engine.collective_rpc("flexquant_records", args=(True,))[0]
    decoding = [step for step in steps if not any(step["prompt"])]
    assert all(step["entropy"] and min(step["entropy"]) >= 0 for step in decoding)
    assert len({step["level"] for step in decoding}) > 1
    found = engine.collective_rpc("flexquant_snapshot", args=(True,))[0]
    assert 1 < found["gauges"]["accepted_length"] <= 5
    assert found["counters"]["speculated_steps"] > 0
    assert found["counters"]["draft_seconds"] > 0
    assert found["gauges"]["draft_mean_bits"] == pytest.approx(4)
    drafts = engine.collective_rpc("flexquant_drafts")[0]
    assert all(len(draft["nats"]) >= draft["kept"] for draft in drafts)
    pin(engine, policy="static", up_for_free=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculate": 5}, "speculate is 5, but the engine was started with 4"),
        ({"width": 4, "draft_width": 4}, "pinned to 4.0 bits, and drafts would run at 4.0"),
        ({"draft_level": 999}, "draft_level 999 is not on the ladder, which has levels 0 to"),
        ({"draft_width": 5}, "draft_width 5 is not in layout 4|2|2; it has 4, 6, 8"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(engine, changes, message):
    before = engine.collective_rpc("flexquant_snapshot", args=(True,))[0]["options"]
    assert message in engine.collective_rpc("flexquant_change", args=(changes,))[0]
    assert engine.collective_rpc("flexquant_snapshot", args=(True,))[0]["options"] == before


def test_gain_decides_by_itself(engine, greedy):
    """It tries both kinds of step, and then keeps to the one that was measured to be faster."""
    pin(engine, speculate=4, draft_gate="gain", draft_width=4)
    engine.generate(prompts()[4:5], greedy(90, ignore_eos=True))
    table = {row["sequences"]: row for row in speculation(engine)["cost_table"]}
    assert table[1]["speedup"] > 0
    assert not table[1]["sampled"]
    assert table[1]["draft_seconds"] > 0
