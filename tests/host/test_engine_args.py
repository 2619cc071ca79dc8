# SPDX-License-Identifier: Apache-2.0
"""Registration, and that a model without flexquant never notices it. Starts no engine."""

import json
import subprocess
import sys
import textwrap

import pytest


def run(code, **environment):
    """Run Python code in a fresh process; returns what it printed last, as JSON."""
    import os

    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"} | environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def test_register_is_idempotent_and_imports_no_layers_kernels_or_models():
    found = run(
        """
        import json, sys
        import vllm_flexquant.plugin as plugin
        light = sorted(m for m in ("torch", "vllm") if m in sys.modules)
        plugin.register()
        from vllm.engine.arg_utils import EngineArgs
        first = EngineArgs.create_engine_config
        plugin.register()
        import torch
        print(json.dumps({
            "light": light,
            "same": EngineArgs.create_engine_config is first,
            "heavy": sorted(m for m in sys.modules if m.startswith((
                "flexquant_kernels.cpu.native", "vllm_flexquant.host.linear",
                "vllm_flexquant.host.worker", "vllm_flexquant.server",
                "vllm.model_executor.models.llama", "vllm.v1.worker.gpu_model_runner"))),
            "device": torch.cuda.is_initialized(),
        }))
        """
    )
    assert found == {"light": [], "same": True, "heavy": [], "device": False}


CONFIG = """
    import json
    from vllm.engine.arg_utils import EngineArgs
    config = EngineArgs(model={model!r}, enforce_eager=True, **{arguments}).create_engine_config()
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    print(json.dumps({{
        "known": "flexquant" in QUANTIZATION_METHODS,
        "worker": config.parallel_config.worker_cls,
        "processors": config.model_config.logits_processors,
        "additional": config.additional_config,
        "quantization": config.model_config.quantization,
        "config": type(config.quant_config).__name__,
        "hash": config.compute_hash(),
    }}))
"""


def engine_config(model, environment=None, **arguments):
    return run(CONFIG.format(model=str(model), arguments=arguments), **environment or {})


def test_installed_but_not_used_it_changes_nothing(smollm2):
    quantization = "int8_per_channel_weight_only"
    present = engine_config(smollm2, quantization=quantization)
    absent = engine_config(smollm2, {"VLLM_FLEXQUANT_DISABLE": "1"}, quantization=quantization)
    assert present.pop("known") is True
    assert absent.pop("known") is False
    assert present == absent
    assert present["processors"] is None


def test_used_it_sets_worker_processor_and_cache_key(smollm2):
    found = engine_config(
        smollm2,
        quantization="flexquant",
        logits_processors=["benchmarks.quality.teacher_forcing:TeacherForcing"],
    )
    assert found["worker"] == "vllm_flexquant.host.worker.FlexCPUWorker"
    assert found["processors"] == [
        "vllm_flexquant.host.sampling:EntropyProcessor",
        "benchmarks.quality.teacher_forcing:TeacherForcing",
    ]
    assert found["additional"]["flexquant_graph"]["layout"] == "4|2|2"
    other = engine_config(smollm2, {"VLLM_FLEXQUANT_LAYOUT": "2|2|4"}, quantization="flexquant")
    assert other["hash"] != found["hash"]
    assert other["additional"]["flexquant_graph"]["layout"] == "2|2|4"


def test_a_second_plugin_that_patches_the_same_place_lives_beside_it(smollm2, tmp_path):
    (tmp_path / "neighbour.py").write_text(
        textwrap.dedent(
            """
            from functools import wraps

            def register():
                from vllm.engine.arg_utils import EngineArgs
                from vllm.model_executor.layers.quantization import register_quantization_config
                from vllm_flexquant.host.quant_config import FlexQuantConfig

                original = EngineArgs.create_engine_config

                @wraps(original)
                def patched(self, *args, **kwargs):
                    config = original(self, *args, **kwargs)
                    config.additional_config = config.additional_config | {"neighbour": 1}
                    return config

                EngineArgs.create_engine_config = patched
            """
        )
    )
    info = tmp_path / "neighbour-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: neighbour\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nneighbour = neighbour:register\n"
    )
    found = engine_config(smollm2, {"PYTHONPATH": str(tmp_path)}, quantization="flexquant")
    assert found["additional"]["neighbour"] == 1
    assert "flexquant_graph" in found["additional"]
    assert found["worker"].endswith("FlexCPUWorker")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"additional_config": {"flexquant": {"layout": "3|5"}}},
            "--additional-config flexquant: option 'layout' is '3|5'",
        ),
        (
            {"additional_config": {"flexquant": "4|2|2"}},
            "--additional-config: 'flexquant' is '4|2|2'; give an object of options",
        ),
        (
            {
                "hf_overrides": {
                    "quantization_config": {"quant_method": "flexquant", "strategy": "static"}
                }
            },
            "--hf-overrides quantization_config: unknown option 'strategy'",
        ),
        ({"worker_cls": "vllm.v1.worker.gpu_worker.Worker"}, None),
        (
            {"worker_cls": "vllm.v1.worker.worker_base.WorkerBase"},
            "--worker-cls vllm.v1.worker.worker_base.WorkerBase cannot serve",
        ),
    ],
)
def test_bad_options_end_the_start_in_one_sentence(smollm2, arguments, message):
    from vllm.engine.arg_utils import EngineArgs

    from vllm_flexquant.plugin import register

    register()
    engine = EngineArgs(
        model=str(smollm2), quantization="flexquant", enforce_eager=True, **arguments
    )
    if message is None:
        assert engine.create_engine_config().parallel_config.worker_cls.endswith("FlexGPUWorker")
        return
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        engine.create_engine_config()
    assert message in str(error.value)


def test_options_by_hf_overrides_environment_and_additional_config(smollm2, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    from vllm_flexquant.plugin import register

    register()
    monkeypatch.setenv("VLLM_FLEXQUANT_GROUP_SIZE", "32")
    monkeypatch.setenv("VLLM_FLEXQUANT_MIN_BITS", "4")
    config = EngineArgs(
        model=str(smollm2),
        enforce_eager=True,
        hf_overrides={"quantization_config": {"quant_method": "flexquant", "layout": "2|2|4"}},
        additional_config={"flexquant": {"min_bits": 3}},
    ).create_engine_config()
    options = config.quant_config.options
    assert config.model_config.quantization == "flexquant"
    assert (options.group_size, options.min_bits, str(options.layout)) == (32, 3, "2|2|4")


def test_both_interfaces_of_logits_processors_take_the_class():
    from vllm.v1.sample.logits_processor import LogitsProcessor as First
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as Second

    from vllm_flexquant.host.sampling import NAME, EntropyProcessor

    assert issubclass(EntropyProcessor, First)
    assert issubclass(EntropyProcessor, Second)
    assert not EntropyProcessor.__abstractmethods__
    assert f"{EntropyProcessor.__module__}:EntropyProcessor" == NAME
