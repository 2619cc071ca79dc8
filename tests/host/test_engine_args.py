# SPDX-License-Identifier: Apache-2.0
"""Registration, and the config of an engine. Starts no engine."""

import json
import os
import pickle
import subprocess
import sys
import textwrap

import pytest

from vllm_flexquant.format.record import CalibrationRecord
from vllm_flexquant.host import engine_args

ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR"}


def run(code, **environment):
    """Run Python code in a fresh process; returns what it printed last, as JSON."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT | environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1]) | {"said": result.stderr}


@pytest.mark.parametrize(
    "process",
    [
        "vllm.engine.arg_utils",  # front end
        "vllm.v1.engine.core",
        "vllm.v1.worker.worker_base",
        "vllm.model_executor.models.registry",  # model inspection
    ],
)
def test_where_vllm_loads_plugins_registering_imports_nothing_of_vllm(process):
    found = run(
        f"""
        import importlib, json, sys
        importlib.import_module({process!r})
        import vllm_flexquant.plugin as plugin
        before = set(sys.modules)
        plugin.register()
        new = sorted(set(sys.modules) - before)
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
        import torch
        print(json.dumps({{
            "vllm": [m for m in new if m.split(".")[0] == "vllm"],
            "kernels": [m for m in new if m.startswith("flexquant_kernels")],
            "count": len(new),
            "known": "flexquant" in QUANTIZATION_METHODS,
            "device": torch.cuda.is_initialized(),
        }}))
        """
    )
    assert (found["vllm"], found["kernels"]) == ([], [])
    assert found["count"] < 30
    assert found["known"]
    assert not found["device"]


def test_registering_is_idempotent_and_light_also_before_vllm_is_there(smollm2):
    found = run(
        f"""
        import json, sys
        import vllm_flexquant.plugin as plugin
        light = sorted(m for m in ("torch", "vllm") if m in sys.modules)
        plugin.register()
        early = "vllm.engine.arg_utils" in sys.modules
        from vllm.engine.arg_utils import EngineArgs
        args = EngineArgs({str(smollm2)!r}, quantization="flexquant", enforce_eager=True)
        first = EngineArgs.create_engine_config
        plugin.register()
        print(json.dumps({{
            "light": light,
            "early": early,
            "same": EngineArgs.create_engine_config is first,
            "heavy": sorted(m for m in sys.modules if m.startswith((
                "flexquant_kernels.cpu.native", "vllm_flexquant.host.linear",
                "vllm_flexquant.host.worker", "vllm_flexquant.server",
                "vllm.model_executor.models.llama", "vllm.v1.worker.gpu_model_runner"))),
            "worker": args.create_engine_config().parallel_config.worker_cls,
        }}))
        """
    )
    assert found["light"] == found["heavy"] == []
    assert not found["early"]
    assert found["same"]
    assert found["worker"].endswith("FlexCPUWorker")


@pytest.mark.parametrize("loses", ["create_engine_config", "create_speculative_config"])
def test_a_vllm_that_we_do_not_know_serves_other_models(smollm2, loses):
    found = run(
        f"""
        import json
        from vllm.engine.arg_utils import EngineArgs
        lost = EngineArgs.{loses}
        del EngineArgs.{loses}
        from vllm.plugins import load_general_plugins
        load_general_plugins()
        import vllm_flexquant.plugin as plugin
        plugin.register()
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
        EngineArgs.{loses} = lost
        config = EngineArgs({str(smollm2)!r}, enforce_eager=True).create_engine_config()
        print(json.dumps({{
            "known": "flexquant" in QUANTIZATION_METHODS,
            "worker": config.parallel_config.worker_cls,
        }}))
        """,
        VLLM_LOGGING_LEVEL="WARNING",
    )
    assert found["known"] is False
    assert found["worker"] == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert found["said"].count("flexquant is not available: ") == 1
    assert f"has no EngineArgs.{loses}, which flexquant needs to" in found["said"]


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
        "graph": getattr(config.model_config.hf_config, "flexquant_graph", None),
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


def test_used_it_sets_the_worker_and_leaves_the_rest_as_given(smollm2):
    forcing = ["benchmarks.quality.teacher_forcing:TeacherForcing"]
    found = engine_config(smollm2, quantization="flexquant", logits_processors=forcing)
    assert found["worker"] == "vllm_flexquant.host.worker.FlexCPUWorker"
    assert found["processors"] == forcing
    assert found["additional"] == {}


def created(model, **arguments):
    from vllm.engine.arg_utils import EngineArgs

    from vllm_flexquant.plugin import register

    register()
    values = {"quantization": "flexquant", "enforce_eager": True} | arguments
    return EngineArgs(model=str(model), **values).create_engine_config()


def test_what_shapes_the_graph_is_in_the_compile_cache_key(smollm2, monkeypatch):
    from flexquant_kernels import ops

    plain = created(smollm2)
    assert created(smollm2).compute_hash() == plain.compute_hash()
    assert pickle.loads(pickle.dumps(plain)).compute_hash() == plain.compute_hash()
    monkeypatch.setenv("VLLM_FLEXQUANT_BUDGET", "0.03")
    assert created(smollm2).compute_hash() == plain.compute_hash()
    monkeypatch.setenv("VLLM_FLEXQUANT_LAYOUT", "2|2|4")
    other = created(smollm2)
    assert other.compute_hash() != plain.compute_hash()
    monkeypatch.setattr(ops, "load_native", lambda: None)
    monkeypatch.setattr(ops, "native_status", lambda: ops.NativeStatus(False, "no compiler"))
    assert created(smollm2).compute_hash() != other.compute_hash()


def calibration(probe_layer):
    unit = {"layers": ["model.layers.0.mlp.down_proj"], "weights": 64}
    rung = {"mean_bits": 8.0, "bytes_read": 64, "kl_nats": 0.01, "measured": True}
    found = {
        "units": [unit],
        "ladder": {
            "search": "greedy",
            "steps": [{"unit": 0, "width": 4}],
            "rungs": [rung | {"steps": 0}, rung | {"steps": 1, "kl_nats": 0.5}],
        },
    }
    if probe_layer is not None:
        found["probe"] = {
            "layer": f"model.layers.{probe_layer}.self_attn.qkv_proj",
            "weight": [0.0],
            "bias": 0.0,
            "levels": [0, 1],
            "relative_kl": 1.0,
            "correlation": 0.0,
        }
    return CalibrationRecord.model_validate(found)


def test_the_layer_that_probes_is_in_the_compile_cache_key(smollm2):
    config = created(smollm2)
    found = []
    for probe_layer in (None, 0, 1, 1):
        config.quant_config.calibration = calibration(probe_layer)
        engine_args.prepare_engine_config(config)
        found.append(config.compute_hash())
    assert len(set(found)) == 3
    assert found[2] == found[3]


class Platform:
    """An additional config that is no dict, as vLLM allows."""

    def compute_hash(self) -> str:
        return "platform"


def test_an_additional_config_that_is_no_dict_stays(smollm2, monkeypatch):
    given = Platform()
    config = created(smollm2, additional_config=given)
    assert config.additional_config is given
    monkeypatch.setenv("VLLM_FLEXQUANT_LAYOUT", "2|2|4")
    assert created(smollm2, additional_config=given).compute_hash() != config.compute_hash()


def test_a_second_plugin_that_patches_the_same_places_lives_beside_it(smollm2, tmp_path):
    (tmp_path / "neighbour.py").write_text(
        textwrap.dedent(
            """
            def register():
                from vllm.engine.arg_utils import EngineArgs
                from vllm.v1.engine.input_processor import InputProcessor
                import vllm_flexquant.plugin as plugin
                from vllm_flexquant.host import admission, contract

                plugin.register()
                admission.install()
                create, process = EngineArgs.create_engine_config, InputProcessor.process_inputs

                def patched(self, *args, **kwargs):  # not with functools.wraps
                    config = create(self, *args, **kwargs)
                    config.additional_config = {"neighbour": contract.installed()[0].name}
                    return config

                EngineArgs.create_engine_config = patched
                InputProcessor.process_inputs = lambda *a, **k: process(*a, **k)
                mine = patched, InputProcessor.process_inputs
                plugin.register()
                admission.install()
                assert (EngineArgs.create_engine_config, InputProcessor.process_inputs) == mine
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
    assert found["additional"]["neighbour"] == "create_speculative_config"
    assert found["worker"].endswith("FlexCPUWorker")


def test_our_environment_variables_are_known_to_vllm_while_it_checks(smollm2, monkeypatch):
    from vllm import envs

    monkeypatch.setenv("VLLM_FLEXQUANT_MIN_BITS", "4")
    config = created(smollm2, fail_on_environ_validation=True)
    assert config.quant_config.options.min_bits == 4
    # their values are no part of the compile-cache key, which is written to disk
    assert not [name for name in envs.compile_factors() if "FLEXQUANT" in name]
    monkeypatch.setenv("VLLM_NO_SUCH_THING", "1")
    with pytest.raises(ValueError, match="VLLM_NO_SUCH_THING"):
        created(smollm2, fail_on_environ_validation=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"additional_config": {"flexquant": {"layout": "3|5"}}}, "option 'layout' is '3|5'"),
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
        (
            {"worker_cls": "vllm.v1.worker.worker_base.WorkerBase"},
            "--worker-cls vllm.v1.worker.worker_base.WorkerBase cannot serve",
        ),
        (
            {"additional_config": {"flexquant": {"policy": "budget"}}},
            "policy budget needs a calibrated checkpoint",
        ),
    ],
)
def test_bad_options_end_the_start_in_one_sentence(smollm2, arguments, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        created(smollm2, **arguments)
    assert message in str(error.value)


def test_sampling_in_shards_is_refused(smollm2):
    config = created(smollm2)
    config.parallel_config.enable_batch_sharded_sampling = True  # V1 refuses it itself
    with pytest.raises(ValueError, match="--enable-batch-sharded-sampling each rank sees"):
        engine_args.prepare_engine_config(config)


def test_a_worker_of_another_platform_is_known(smollm2):
    config = created(smollm2, worker_cls="vllm.v1.worker.gpu_worker.Worker")
    assert config.parallel_config.worker_cls.endswith("FlexGPUWorker")


def test_of_several_sources_of_options_the_later_one_wins(smollm2, monkeypatch):
    monkeypatch.setenv("VLLM_FLEXQUANT_GROUP_SIZE", "32")
    monkeypatch.setenv("VLLM_FLEXQUANT_MIN_BITS", "2")
    monkeypatch.setenv("VLLM_FLEXQUANT_MAX_BITS", "6")
    overrides = {"quant_method": "flexquant", "layout": "2|2|4", "min_bits": 4}
    config = created(
        smollm2,
        quantization=None,
        hf_overrides={"quantization_config": overrides},
        additional_config={"flexquant": {"min_bits": 3, "max_bits": 7}},
    )
    options = config.quant_config.options
    assert config.model_config.quantization == "flexquant"
    found = options.group_size, options.min_bits, options.max_bits, str(options.layout)
    assert found == (32, 4, 7, "2|2|4")


def test_the_config_goes_to_other_processes_whole(smollm2):
    config = created(smollm2, additional_config={"flexquant": {"default_class": "exact"}})
    there = pickle.loads(pickle.dumps(config)).quant_config
    assert there.options == config.quant_config.options
    assert there.terms == config.quant_config.terms
    assert there.terms.grant(None).skip_cache
