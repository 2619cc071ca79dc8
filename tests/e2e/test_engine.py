# SPDX-License-Identifier: Apache-2.0
"""One eager engine: decisions, kernels, promises, memory."""

import itertools
import math

import numpy as np
import pytest
import torch
import workers

from benchmarks.quality.engine import agreement, decode
from benchmarks.quality.sequences import read_records, scored
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner.figures import without_calibration
from vllm_flexquant.planner.state import empty_state, fill
from vllm_flexquant.policy.choose import parameters
from vllm_flexquant.policy.entropy import Entropy
from vllm_flexquant.policy.protocol import LATER, StepFacts

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea,",
    "Q: What is 12 times 12?\nA:",
]
WATCHED = ["model.layers.0.self_attn.qkv_proj", "model.layers.14.mlp.down_proj"]


def status(engine):
    return engine.collective_rpc("flexquant_snapshot", args=(True,))[0]


def trace(engine):
    return engine.collective_rpc("flexquant_records")[0]


def tokens(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def decode_records(engine):
    return [record for record in trace(engine) if not any(record["prompt"])]


def test_every_linear_layer_and_the_tied_output_layer_are_in_planes(fresh):
    view = status(fresh)
    assert len(view["layers"]) == 30 * 4 + 1
    assert view["layers"][0]["name"] == "model.layers.0.self_attn.qkv_proj"
    assert view["layers"][-1]["name"] == "lm_head"
    assert view["unquantized"] == []
    assert view["levels"] == 121 * 2 + 1
    assert view["ladder"]["mean_bits"][0] == 4
    assert view["ladder"]["mean_bits"][-1] == 8


def test_greedy_text_makes_sense_and_repeats(fresh, greedy):
    fresh.collective_rpc("flexquant_change", args=({"width": 8},))
    first = fresh.generate(PROMPTS, greedy())
    assert "Paris" in first[0].outputs[0].text
    assert tokens(fresh.generate(PROMPTS, greedy())) == tokens(first)


def test_sampling_repeats_by_seed_at_a_pinned_width_and_moves_the_level_otherwise(fresh):
    from vllm import SamplingParams

    def draw(seed):
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=16)
        return tokens(fresh.generate(PROMPTS, params))

    fresh.collective_rpc("flexquant_change", args=({"width": 8},))
    assert draw(1) == draw(1) != draw(2)
    fresh.collective_rpc("flexquant_change", args=({"policy": "entropy"},))
    fresh.collective_rpc("flexquant_records", args=(True,))
    draw(1)
    assert len({record["level"] for record in decode_records(fresh)}) > 3


def test_kernels_use_at_each_step_the_widths_decided_after_the_step_before(fresh, greedy):
    """The outputs of real layers tell at which width their kernels ran."""
    fresh.collective_rpc(workers.watch_layers, args=(WATCHED,))
    fresh.generate([PROMPTS[2]], greedy(40))
    used = fresh.collective_rpc(workers.widths_by_output)[0]
    steps, view = trace(fresh), status(fresh)
    position = {layer["name"]: i for i, layer in enumerate(view["layers"])}
    for name, found in used.items():
        assert [record["widths"][position[name]] for record in steps] == [w for [w] in found]
    assert len({tuple(record["widths"]) for record in steps}) > 5

    options = FlexQuantOptions()
    figures = without_calibration([1.0] * view["levels"])
    state = empty_state(torch.zeros(0, dtype=torch.int32), figures, slots=1, rows=1)
    fill(state, **parameters(options, view["ladder"]["mean_bits"]))
    state.decisions[:, 0] = steps[0]["level"]
    decay, average = options.entropy_decay, None
    for before, now in itertools.pairwise(steps):
        newest = before["entropy"][0]
        average = newest if average is None else decay * average + (1 - decay) * newest
        assert now["average"][0] == pytest.approx(average, rel=1e-5)
        state.average[0], state.seen[0] = now["average"][0], True
        Entropy().begin(state, StepFacts(np.zeros((4, 1), dtype=np.int64), 1))
        assert now["level"] == state.decisions[LATER, 0]


def test_entropy_is_that_of_the_logits(fresh, greedy):
    """Against the log-probabilities that vLLM itself reports."""
    vocabulary = 49152
    outputs = fresh.generate(PROMPTS[:1], greedy(3, logprobs=20))
    for record, shown in zip(trace(fresh), outputs[0].outputs[0].logprobs, strict=True):
        top = [entry.logprob for entry in shown.values()]
        partial = -sum(math.exp(p) * p for p in top)
        rest = max(1 - sum(map(math.exp, top)), 0)
        most = partial + (rest * math.log(vocabulary / rest) if rest > 1e-6 else 1e-4)
        assert partial - 1e-3 <= record["entropy"][0] <= most + 1e-3


def test_entropy_is_of_the_models_own_logits_whatever_a_request_does_to_them(fresh, greedy):
    """Else a client would set its entropy, and with it the precision of others."""
    found = []
    for wishes in ({}, {"allowed_token_ids": [10, 11, 12]}, {"logit_bias": {10: 100.0}}):
        fresh.collective_rpc("flexquant_records", args=(True,))
        fresh.generate(PROMPTS[:1], greedy(1, **wishes))
        found += [record["entropy"][0] for record in trace(fresh)]
    assert found == [found[0]] * 3
    assert found[0] > 1


def test_requests_get_the_floors_they_were_promised(fresh, greedy):
    fresh.collective_rpc("flexquant_change", args=({"width": 4},))
    floors = [None, 6, 8, None]
    lengths = [40, 20, 10, 40]
    params = [
        greedy(n, ignore_eos=True, extra_args={"flexquant_min_bits": f} if f else None)
        for n, f in zip(lengths, floors, strict=True)
    ]
    outputs = fresh.generate(PROMPTS, params)
    promised = {
        output.request_id: floor for output, floor in zip(outputs, floors, strict=True) if floor
    }
    seen = set()
    for record in trace(fresh):
        # the engine appends to the request's number
        floor = max((promised.get(r.split("-")[0], 0) for r in record["request_ids"]), default=0)
        assert set(record["widths"]) == {max(4, floor)}
        seen.add(floor)
    assert seen == {0, 6, 8}


def test_long_prompts_come_in_chunks_at_all_bits(fresh, greedy):
    long = " ".join(f"{i} bottles of beer on the wall." for i in range(60))
    fresh.generate([long, PROMPTS[0]], greedy(12))
    steps = trace(fresh)
    prompt_steps = [record for record in steps if any(record["prompt"])]
    assert len(prompt_steps) > 5
    assert all(set(record["widths"]) == {8} for record in prompt_steps)
    assert any(set(record["widths"]) != {8} for record in steps)
    again = fresh.generate([long], greedy(12))  # now from the prefix cache
    assert again[0].num_cached_tokens > 0
    prefill = {"prefill": "policy", "min_bits": 2, "max_bits": 4}
    assert fresh.collective_rpc("flexquant_change", args=(prefill,)) == [""]
    fresh.collective_rpc("flexquant_records", args=(True,))
    fresh.generate([long + " And then?"], greedy(2))
    assert all(set(record["widths"]) == {4} for record in trace(fresh))


def test_ended_requests_are_forgotten(fresh, greedy):
    fresh.generate(PROMPTS, greedy(5))
    assert fresh.collective_rpc(workers.remembered_requests) == [[]]


def test_a_token_does_not_depend_on_its_neighbours_at_a_pinned_width(fresh, greedy):
    fresh.collective_rpc("flexquant_change", args=({"width": 4},))
    together = tokens(fresh.generate(PROMPTS, greedy(8)))
    first = [t[0] for t in together]
    assert [tokens(fresh.generate([p], greedy(8)))[0][0] for p in PROMPTS] == first


@pytest.mark.parametrize("width", [4, 6, 8])
def test_kl_while_decoding_is_that_of_the_plain_implementation(fresh, forced_text, width):
    """Scheduler, KV cache and kernels add nothing to the KL of a width but noise."""
    assert fresh.collective_rpc("flexquant_change", args=({"width": width},)) == [""]
    run = f"static {width}"
    decode(fresh, run, forced_text.sequences, rows=8)
    records = scored(read_records(forced_text.folder / "records.jsonl", run), forced_text.sequences)
    assert len(records) == 8 * 47
    plain = forced_text.planes[str(width)]["int8"]
    found = agreement([r["kl"] for r in records], plain["kl"])
    assert found["agrees"], found
    top1 = sum(r["top1"] for r in records) / len(records)
    assert top1 == pytest.approx(sum(plain["top1"]) / len(plain["top1"]), abs=0.04)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": 60000}, "level 60000 is not on the ladder, which has levels 0 to 242"),
        ({"width": 5}, "width 5 is not in layout 4|2|2"),
        ({"min_bits": 8, "max_bits": 4}, "min_bits 8 is above max_bits 4"),
    ],
)
def test_a_refused_update_says_why_and_changes_nothing(fresh, changes, message):
    before = status(fresh)
    reply = fresh.collective_rpc("flexquant_change", args=(changes,))
    assert message in reply[0]
    assert status(fresh) == before


def test_a_request_with_a_bad_floor_is_refused_and_others_go_on(fresh, greedy):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="flexquant_min_bits is 11; give an integer"):
        fresh.generate(PROMPTS[:1], greedy(4, extra_args={"flexquant_min_bits": 11}))
    assert len(tokens(fresh.generate(PROMPTS[:1], greedy(4)))[0]) == 4


def test_loading_takes_less_than_the_unquantized_model(engine, smollm2):
    """Less even than the model alone, so with room for a layer."""
    peak, kept = engine.collective_rpc("memory")[0]
    in_fp16 = sum(f.stat().st_size for f in smollm2.glob("*.safetensors"))
    assert 0 < kept <= peak < 2 * in_fp16  # the engine computes in fp32
