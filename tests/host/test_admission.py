# SPDX-License-Identifier: Apache-2.0
"""Requests at the front end of vLLM, without an engine behind it."""

import asyncio
import pickle
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from vllm_flexquant.plugin import register

PROMPT = {"type": "token", "prompt_token_ids": [1, 2, 3], "prompt": "abc"}


def config_of(model, speculative=None, quantization="flexquant", **options):
    from vllm.engine.arg_utils import EngineArgs

    register()
    return EngineArgs(
        model=str(model),
        quantization=quantization,
        enforce_eager=True,
        speculative_config=speculative,
        additional_config={"flexquant": options},
    ).create_engine_config()


def admitted(processor, params):
    return processor.process_inputs("r", PROMPT, params, ("generate",)).sampling_params


@pytest.fixture(scope="module")
def processor(smollm2):
    return InputProcessor(config_of(smollm2))


def asking(**args):
    return SamplingParams(extra_args={f"flexquant_{key}": value for key, value in args.items()})


def test_a_request_at_all_bits_does_not_read_the_prefix_cache(processor):
    assert not admitted(processor, SamplingParams()).skip_reading_prefix_cache
    assert not admitted(processor, asking(min_bits=6)).skip_reading_prefix_cache
    for params in (asking(min_bits=8), asking(min_bits=7), asking(**{"class": "exact"})):
        given = dict(params.extra_args)
        assert admitted(processor, params).skip_reading_prefix_cache
        # the caller may use them again for another request
        assert not params.skip_reading_prefix_cache
        assert params.extra_args == given


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"min_bits": 60}, "flexquant_min_bits is 60; give an integer from 2 to 8"),
        ({"class": "golden"}, "flexquant_class is 'golden'"),
        ({"speed": 1}, "unknown key 'flexquant_speed'"),
        ({"budget": 0.1}, "this server keeps none: its checkpoint is not calibrated"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_it_is_queued(processor, args, message):
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    with pytest.raises(VLLMValidationError) as refused:
        admitted(processor, asking(**args))
    assert message in str(refused.value)
    assert create_error_response(refused.value).error.code == 400


def test_each_engine_of_a_process_goes_by_its_own_terms(smollm2, processor):
    gold = config_of(smollm2, classes={"gold": {"min_bits": 8}, "base": {}}, default_class="base")
    other = InputProcessor(gold)
    assert admitted(other, asking(**{"class": "gold"})).skip_reading_prefix_cache
    assert admitted(processor, asking(**{"class": "exact"})).skip_reading_prefix_cache
    with pytest.raises(
        VLLMValidationError, match="flexquant_class is 'exact'; this server has gold, base"
    ):
        admitted(other, asking(**{"class": "exact"}))


def test_a_default_class_at_all_bits_holds_for_requests_that_say_nothing(smollm2):
    config = config_of(smollm2, default_class="exact")
    assert admitted(InputProcessor(config), SamplingParams()).skip_reading_prefix_cache
    # in a process that was only handed the config
    there = pickle.loads(pickle.dumps(config))
    assert admitted(InputProcessor(there), SamplingParams()).skip_reading_prefix_cache


def test_beside_other_speculation_it_is_the_same(smollm2):
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    processor = InputProcessor(config_of(smollm2, ngram))
    assert admitted(processor, asking(min_bits=8)).skip_reading_prefix_cache
    with pytest.raises(VLLMValidationError, match="flexquant_min_bits is 60"):
        admitted(processor, asking(min_bits=60))


def test_engines_without_flexquant_take_what_they_are_given(smollm2, processor):
    other = InputProcessor(config_of(smollm2, quantization=None))
    assert not admitted(other, asking(min_bits=60)).skip_reading_prefix_cache


class Client(BeamSearchOnlineMixin):
    """An API server's beam search before an engine that only takes requests in."""

    def __init__(self, processor):
        self.input_processor = processor
        self.engine_client = self
        self.renderer = processor.renderer
        self.seen = []

    async def generate(self, prompt, params, request_id, **_):
        self.seen.append(
            self.input_processor.process_inputs(request_id, prompt, params, ("generate",))
        )
        await asyncio.sleep(0)
        found = {5: SimpleNamespace(logprob=-1.0), 6: SimpleNamespace(logprob=-2.0)}
        output = SimpleNamespace(logprobs=[found], finish_reason="length")
        yield SimpleNamespace(outputs=[output])


def search(client, request):
    params = request.to_beam_search_params(2, {})

    async def all_outputs():
        return [output async for output in client.beam_search(PROMPT, "r", params)]

    (output,) = asyncio.run(all_outputs())
    assert len(output.outputs) == 2
    return [request.sampling_params for request in client.seen]


@pytest.mark.parametrize("kind", [ChatCompletionRequest, CompletionRequest])
def test_beam_search_keeps_what_was_asked_for(processor, kind):
    prompt = {"messages": []} if kind is ChatCompletionRequest else {"prompt": "abc"}
    values = {"n": 2, "use_beam_search": True, **prompt}
    asked = {"flexquant_class": "exact"}
    client = Client(processor)
    for params in search(client, kind(**values, vllm_xargs=asked)):
        assert params.skip_reading_prefix_cache
        assert params.extra_args == asked  # for the worker
    assert len(client.seen) == 3
    plain = search(Client(processor), kind(**values))
    assert [params.extra_args for params in plain] == [None] * 3
    with pytest.raises(VLLMValidationError, match="flexquant_min_bits is 60"):
        search(Client(processor), kind(**values, vllm_xargs={"flexquant_min_bits": 60}))
