# SPDX-License-Identifier: Apache-2.0
"""Entry point `vllm.general_plugins`: registers the quantization method in every vLLM process.

The only place that patches vLLM. The ledger of patches:

`EngineArgs.create_engine_config`
    Why: a quantization method cannot choose the worker class, add a logits processor or read
    `--additional-config`. How: wrapped; acts only when the method is flexquant. Upstream: the
    out-of-tree plugins for bitsandbytes and GGUF (vllm-project/vllm-bnb-plugin, vllm-gguf-plugin)
    wrap the same class. Can go when `QuantizationConfig` gets a hook that may change the engine
    config.

`EngineArgs.create_speculative_config`
    Why: the option `speculate` stands for a `--speculative-config` whose draft model is the served
    one, and vLLM derives the scheduler's look-ahead from it early. How: wrapped; fills that in when
    the method is flexquant and the option is set. Can go with the patch above.

`vllm.v1.sample.rejection_sampler.expand_batch_to_tokens`, on CPUs
    Why: in vLLM 0.32 what stands in for its Triton kernel there works on a copy and drops it
    (`_expand_kernel_impl` in `utils/cpu_triton_utils.py`), so temperature, top-k and top-p of
    drafted rows are whatever was in memory. How: replaced by torch operations, in workers that
    speculate. Upstream: vllm-project/vllm#55005 and #55006. Can go once `top_k` beside drafts is
    right without it; a test says so.
"""

from __future__ import annotations

import os
from functools import wraps
from typing import TYPE_CHECKING, Any

from vllm_flexquant import __version__
from vllm_flexquant.options import FORMAT_OPTIONS, METHOD, options_from_environment

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig

ADDITIONAL = f"--additional-config {METHOD}"


def register() -> None:
    """Make `--quantization flexquant` known. Idempotent, cheap, touches no device.

    The environment variable VLLM_FLEXQUANT_DISABLE=1 makes this do nothing.
    """
    if os.environ.get("VLLM_FLEXQUANT_DISABLE") == "1":
        return
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if METHOD not in QUANTIZATION_METHODS:
        import vllm_flexquant.host.quant_config  # noqa: F401 - registers itself
    _patch_engine_args()


def _patch_engine_args() -> None:
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs.create_engine_config, "_flexquant", False):
        return
    create_engine_config = EngineArgs.create_engine_config

    @wraps(create_engine_config)
    def create_flexquant_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        config = create_engine_config(self, *args, **kwargs)
        if config.model_config is not None and config.model_config.quantization == METHOD:
            prepare_engine_config(config)
        return config

    create_flexquant_engine_config._flexquant = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_flexquant_engine_config
    create_speculative_config = EngineArgs.create_speculative_config

    @wraps(create_speculative_config)
    def create_self_speculative_config(
        self: EngineArgs, target_model_config: ModelConfig, *args: Any, **kwargs: Any
    ) -> SpeculativeConfig | None:
        if target_model_config is not None and target_model_config.quantization == METHOD:
            from vllm_flexquant.host import draft_setup

            options = options_from_environment().updated(
                given_options(self.additional_config), ADDITIONAL
            )
            self.speculative_config = draft_setup.speculative_config(
                options, target_model_config, self.speculative_config
            )
        return create_speculative_config(self, target_model_config, *args, **kwargs)

    EngineArgs.create_speculative_config = create_self_speculative_config


def given_options(additional: object) -> dict[str, Any]:
    """The options in `--additional-config`.

    Raises:
        ValueError: they are no object.
    """
    given = additional.get(METHOD, {}) if isinstance(additional, dict) else {}
    if not isinstance(given, dict):
        raise ValueError(
            f"--additional-config: '{METHOD}' is {given!r}; give an object of options, "
            f'as in {{"{METHOD}": {{"policy": "static"}}}}'
        )
    return given


def prepare_engine_config(config: VllmConfig) -> None:
    """Set what an engine with flexquant weights needs, before it is handed to the workers.

    Raises:
        ValueError: bad options, or a worker class that lacks `FlexWorkerMixin`.
    """
    from vllm.logger import init_logger

    from flexquant_kernels import ops
    from vllm_flexquant.host import draft_setup
    from vllm_flexquant.host import sampling as logits_processor
    from vllm_flexquant.host.worker import WORKERS, FlexWorkerMixin
    from vllm_flexquant.requests import grant as promise

    logger = init_logger(f"vllm.{__name__}")
    quant_config = config.quant_config
    additional = config.additional_config if isinstance(config.additional_config, dict) else {}
    quant_config.apply_options(given_options(additional), ADDITIONAL)
    speculates = draft_setup.drafts_itself(config)
    if speculates:
        draft_setup.check_engine(config)
        length = config.speculative_config.num_speculative_tokens
        quant_config.apply_options({"speculate": length}, "--speculative-config")
    promise.announce(quant_config.options.classes)
    # vLLM's compile cache knows nothing of plugins; this puts what shapes the graph into its key
    options = quant_config.options
    graph = {
        name: str(getattr(options, name)) for name in (*FORMAT_OPTIONS, "output_layer", "ignore")
    }
    config.additional_config = additional | {f"{METHOD}_graph": {"version": __version__, **graph}}

    worker = config.parallel_config.worker_cls
    if worker in WORKERS:
        config.parallel_config.worker_cls = WORKERS[worker]
    else:
        from vllm.utils.import_utils import resolve_obj_by_qualname

        if not issubclass(resolve_obj_by_qualname(worker), FlexWorkerMixin):
            raise ValueError(
                f"--worker-cls {worker} cannot serve --quantization {METHOD}; derive it from "
                "vllm_flexquant.host.worker.FlexWorkerMixin or drop the option"
            )

    processors = list(config.model_config.logits_processors or ())
    if config.model_config.runner_type == "pooling":
        logger.warning(
            "flexquant: a pooling model has no next token, so no entropies are seen and policy "
            "entropy stays at the best level"
        )
    elif (
        config.speculative_config is not None
        and not config.use_v2_model_runner
        and not speculates  # our drafter sees the logits itself
    ):
        logger.warning(
            "flexquant: vLLM's V1 model runner allows no logits processor beside speculative "
            "decoding, so entropies are not seen and policy entropy stays at the best level"
        )
    elif logits_processor.NAME not in processors:
        config.model_config.logits_processors = [logits_processor.NAME, *processors]

    if config.device_config.device_type == "cpu":
        ops.load_native()  # once here, so that workers find the kernels built


def mend_rejection_sampler() -> None:
    """Give drafted rows the sampling parameters of their requests (CPU). Idempotent."""
    from vllm.v1.sample import rejection_sampler

    rejection_sampler.expand_batch_to_tokens = _expanded


def _expanded(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """[num_tokens] of x [requests], each as often as it has drafts; as vLLM's.

    Args:
        cu_num_tokens: [requests], drafts up to and with each request.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    values = x if replace_from == replace_to else x.masked_fill(x == replace_from, replace_to)
    return values.repeat_interleave(counts, output_size=num_tokens)
