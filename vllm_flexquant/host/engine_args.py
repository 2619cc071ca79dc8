# SPDX-License-Identifier: Apache-2.0
"""From what the user gave to the config of an engine: registration, and the two wraps of
`EngineArgs`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_flexquant import __version__
from vllm_flexquant.environment import injected
from vllm_flexquant.host import contract
from vllm_flexquant.options import FORMAT_OPTIONS, METHOD, FlexQuantOptions, environment_names
from vllm_flexquant.values import shown

if TYPE_CHECKING:
    from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_flexquant.host.quant_config import FlexQuantConfig

logger = logging.getLogger(f"vllm.{__name__}")

GRAPH = "flexquant_graph"
"""Attribute of the model's Hugging Face config, which is part of vLLM's compile-cache key."""


def install(again: Callable[[], None]) -> None:
    """Register the quantization method and wrap `EngineArgs`, where that is imported.

    Where it is not, as in workers, nothing of it is imported: `EngineArgs` loads plugins when it is
    used, and `again` is called then.

    Raises:
        ImportError, AttributeError, ContractError: this vLLM is not as we know it.
    """
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    engine_args = getattr(arg_utils, "EngineArgs", None)
    if engine_args is not None:
        _wrap(engine_args)
    else:
        import vllm.plugins

        contract.wrap(
            vllm.plugins,
            "load_general_plugins",
            lambda load: _then(load, again),
            why="come back once EngineArgs is there",
        )
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if METHOD not in QUANTIZATION_METHODS:
        import vllm_flexquant.host.quant_config  # noqa: F401 - registers itself


def _then(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        first()
        second()

    return both


def _wrap(engine_args: type[EngineArgs]) -> None:
    from vllm import envs

    contract.require(engine_args, ["create_engine_config"], "prepare an engine's config")
    contract.require(envs, ["environment_variables"], "let vLLM know our variables")
    contract.wrap(
        engine_args,
        "create_speculative_config",
        _self_speculating,
        why="let the served model draft for itself",
        parameters=("target_model_config",),
    )
    contract.wrap(engine_args, "create_engine_config", _preparing, why="prepare an engine's config")


def _preparing(create_engine_config: Callable[..., VllmConfig]) -> Callable[..., VllmConfig]:
    def create_flexquant_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        with _known_environment():
            config = create_engine_config(self, *args, **kwargs)
        if getattr(config.model_config, "quantization", None) == METHOD:
            prepare_engine_config(config)
        return config

    return create_flexquant_engine_config


def _self_speculating(
    create_speculative_config: Callable[..., SpeculativeConfig | None],
) -> Callable[..., SpeculativeConfig | None]:
    def create_self_speculative_config(
        self: EngineArgs, target_model_config: ModelConfig, *args: Any, **kwargs: Any
    ) -> SpeculativeConfig | None:
        if getattr(target_model_config, "quantization", None) == METHOD:
            from vllm_flexquant.host import draft_setup

            self.speculative_config = draft_setup.speculative_config(
                options_of(target_model_config, self.additional_config),
                target_model_config,
                self.speculative_config,
            )
        return create_speculative_config(self, target_model_config, *args, **kwargs)

    return create_self_speculative_config


@contextmanager
def _known_environment() -> Iterator[None]:
    """Let vLLM know our environment variables while it checks for unknown ones.

    No longer: what it knows is part of its compile-cache key, and is written beside the cache.
    """
    from vllm import envs

    ours = {*environment_names(), *injected(os.environ)}
    names = [name for name in ours if name not in envs.environment_variables]
    envs.environment_variables.update(dict.fromkeys(names, lambda: None))
    try:
        yield
    finally:
        for name in names:
            envs.environment_variables.pop(name, None)


def given_options(additional: object) -> Mapping[str, Any]:
    """The options in `--additional-config`.

    Raises:
        ValueError: they are no object.
    """
    given = additional.get(METHOD, {}) if isinstance(additional, Mapping) else {}
    if not isinstance(given, Mapping):
        raise ValueError(
            f"--additional-config: '{METHOD}' is {shown(given)}; give an object of options, "
            f'as in {{"{METHOD}": {{"policy": "static"}}}}'
        )
    return given


def options_of(model: ModelConfig, additional: object) -> FlexQuantOptions:
    """The options of an engine whose own config does not exist yet.

    Raises:
        ValueError: a bad option.
    """
    from vllm_flexquant.host.quant_config import FlexQuantConfig

    found = getattr(model.hf_config, "quantization_config", None)
    if found is None:
        found = getattr(model.hf_text_config, "quantization_config", None)
    config = FlexQuantConfig() if found is None else FlexQuantConfig.from_config(found)
    config.give(given_options(additional))
    return config.options


def prepare_engine_config(config: VllmConfig) -> None:
    """Set what an engine with flexquant weights needs, before it is handed to the workers.

    Raises:
        ValueError: bad options, what flexquant does not run with, or a worker class that lacks
            `FlexWorkerMixin`.
    """
    from flexquant_kernels import ops
    from vllm_flexquant.host import checkpoint_files, draft_setup

    quant_config: FlexQuantConfig = config.quant_config
    quant_config.give(given_options(config.additional_config))
    if quant_config.stored is not None and Path(quant_config.model).is_dir():
        checkpoint_files.check_folder(Path(quant_config.model), quant_config.options.verify)
    if draft_setup.drafts_itself(config):
        draft_setup.check_engine(config)
        quant_config.give({"speculate": config.speculative_config.num_speculative_tokens})
    if config.device_config.device_type == "cpu":
        # once here, so that workers find the kernels built
        ops.load_native()
        quant_config.rounds_activations = ops.native_status().loaded
    quant_config.terms  # noqa: B018 - what cannot be kept is refused now
    if getattr(config.parallel_config, "enable_batch_sharded_sampling", False):
        raise ValueError(
            f"{METHOD}: with --enable-batch-sharded-sampling each rank sees the logits of its own "
            "requests alone, and ranks would decide differently; drop the option"
        )
    if config.model_config.runner_type == "pooling":
        logger.warning(
            "flexquant: a pooling model has no next token, so no entropies are seen and policy "
            "entropy stays at the best level"
        )
    _set_worker(config)
    setattr(config.model_config.hf_config, GRAPH, _graph_key(config))


def _set_worker(config: VllmConfig) -> None:
    from vllm_flexquant.host.worker import WORKERS, FlexWorkerMixin

    worker = config.parallel_config.worker_cls
    if worker in WORKERS:
        config.parallel_config.worker_cls = WORKERS[worker]
        return
    from vllm.utils.import_utils import resolve_obj_by_qualname

    if not issubclass(resolve_obj_by_qualname(worker), FlexWorkerMixin):
        raise ValueError(
            f"--worker-cls {worker} cannot serve --quantization {METHOD}; derive it from "
            "vllm_flexquant.host.worker.FlexWorkerMixin or drop the option"
        )


def _graph_key(config: VllmConfig) -> dict[str, Any]:
    """What shapes the compiled graph beside what vLLM knows: which layers are in planes, how many,
    in which form their kernel wants them, and which one calls the probe."""
    from flexquant_kernels import ops

    quant_config: FlexQuantConfig = config.quant_config
    options, calibration = quant_config.options, quant_config.calibration
    probe = calibration and calibration.probe and calibration.ladder and calibration.probe
    named = (*FORMAT_OPTIONS, "output_layer", "ignore")
    return {
        "version": __version__,
        "native": ops.native_status().loaded,  # the instruction set is chosen within the kernel
        "stored": quant_config.stored and quant_config.stored.model_dump(mode="json"),
        "probe": probe and _digest(probe.model_dump(mode="json")),
        **{name: str(getattr(options, name)) for name in named},
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
