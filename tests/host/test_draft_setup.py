# SPDX-License-Identifier: Apache-2.0
"""What self-speculation asks of vLLM's configuration, and what it refuses. Starts no engine."""

import shutil

import pytest
import torch

from vllm_flexquant import plugin
from vllm_flexquant.host import draft_setup, rejection
from vllm_flexquant.host.contract import ContractError


def created(model, speculative=None, speculate=0, **arguments):
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    return EngineArgs(
        model=str(model),
        quantization="flexquant",
        enforce_eager=True,
        speculative_config=speculative,
        additional_config={"flexquant": {"speculate": speculate}} if speculate else {},
        **arguments,
    ).create_engine_config()


def of_vllm(model, **values):
    return {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3} | values


def test_the_short_form_fills_in_what_vllm_needs(smollm2, monkeypatch):
    config = created(smollm2, speculate=4)
    found = config.speculative_config
    assert (found.method, found.num_speculative_tokens) == ("draft_model", 4)
    assert found.draft_model_config.model == str(smollm2)
    assert found.draft_sample_method == "probabilistic"
    assert config.num_lookahead_tokens == 4
    monkeypatch.setenv("VLLM_FLEXQUANT_SPECULATE", "2")
    assert created(smollm2).speculative_config.num_speculative_tokens == 2


def test_hf_overrides_say_how_far_to_draft_and_nothing_else_does(smollm2):
    overrides = {"quant_method": "flexquant", "speculate": 4}
    config = created(smollm2, speculate=2, hf_overrides={"quantization_config": overrides})
    assert config.speculative_config.num_speculative_tokens == 4
    assert config.quant_config.options.speculate == 4


def test_the_long_form_is_as_good(smollm2):
    config = created(smollm2, of_vllm(smollm2))
    assert config.quant_config.options.speculate == 3
    assert created(smollm2, of_vllm(smollm2), speculate=3).speculative_config is not None


def test_other_speculation_is_vllms_own(smollm2):
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    assert created(smollm2, ngram).quant_config.options.speculate == 0


@pytest.fixture(scope="module")
def another(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("another")
    for file in smollm2.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, folder)
    return folder


def test_a_model_of_its_own_may_draft_where_nothing_is_to_be_shared(smollm2, another):
    config = created(smollm2, of_vllm(another))
    assert config.quant_config.options.speculate == 0


def test_another_model_is_refused_where_planes_are_to_be_shared(smollm2, another):
    with pytest.raises(ValueError, match="own planes") as error:
        created(smollm2, of_vllm(another), speculate=3)
    assert str(another) in str(error.value)
    assert str(smollm2) in str(error.value)
    with pytest.raises(ValueError, match="num_speculative_tokens is 3, but option speculate 4"):
        created(smollm2, of_vllm(smollm2), speculate=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size is 2; set it to 1"),
        ({"enable_lora": True}, "does not draft with adapters; drop --enable-lora"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "keys and values of drafts to the KV connector; drop --kv-transfer-config",
        ),
        (
            {"speculative": {"disable_padded_drafter_batch": True}},
            "disable_padded_drafter_batch is set in --speculative-config; drop it",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_sentence(smollm2, arguments, message):
    arguments = dict(arguments)
    speculative = arguments.pop("speculative", None)
    if speculative:
        speculative |= of_vllm(smollm2, num_speculative_tokens=2)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        created(smollm2, speculative, speculate=0 if speculative else 2, **arguments)
    assert message in str(error.value)


def test_the_v2_runner_is_refused(smollm2):
    config = created(smollm2, speculate=2)

    class OnV2:
        use_v2_model_runner = True

        def __getattr__(self, name):
            return getattr(config, name)

    with pytest.raises(ValueError, match="V1 model runner; set VLLM_USE_V2_MODEL_RUNNER=0"):
        draft_setup.check_engine(OnV2())


def test_a_runner_that_is_not_as_expected_is_refused():
    with pytest.raises(ContractError, match=r"has no object.drafter, .* drop speculation"):
        draft_setup.put_drafter(object(), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_drafted_rows_get_the_parameters_of_their_requests(dtype):
    x, ends = torch.tensor([3, 0, 7], dtype=dtype), torch.tensor([2, 3, 3])
    found = rejection.expanded(x, ends, 3, replace_from=0, replace_to=1)
    assert found.tolist() == [3, 3, 1]
    assert found.dtype == dtype


def test_vllm_still_drops_what_it_computes_for_drafted_rows():
    """When this fails, `rejection.mend` can go."""
    from vllm.platforms import current_platform
    from vllm.utils.cpu_triton_utils import _expand_kernel_impl

    if current_platform.device_type != "cpu":
        pytest.skip("vLLM's kernels for CPUs are not loaded")
    current_platform.import_kernels()
    output = torch.full((3,), -5, dtype=torch.int32)
    counts = torch.tensor([2, 3], dtype=torch.int32)
    _expand_kernel_impl(output, torch.tensor([3, 7], dtype=torch.int32), counts, 0, 0)
    assert output.tolist() == [-5] * 3
