# SPDX-License-Identifier: Apache-2.0
"""Setting up self-speculation: what vLLM is told, what is refused, where the drafter goes in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_flexquant.host import contract, rejection
from vllm_flexquant.options import METHOD, FlexQuantOptions

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

    from vllm_flexquant.planner.planner import Planner
    from vllm_flexquant.speculation.control import SelfSpeculation

DRAFT_MODEL = "draft_model"
"""vLLM's name of the method by which a second model drafts."""

_READ = (
    "drafter",
    "attn_groups",
    "discard_request_mask.np",
    "input_batch.num_reqs",
    "input_batch.req_ids",
    "input_batch.spec_token_ids",
    "input_batch.block_table.block_tables",
)
"""What the drafter reads of a runner."""


def speculative_config(
    options: FlexQuantOptions, target: ModelConfig, given: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """`--speculative-config` as it must be for `options`, None for no speculation.

    Args:
        given: what the user wrote.

    Raises:
        ValueError: `speculate` beside another draft model, method or length.
    """
    if not options.speculate:
        return dict(given) if given is not None else None
    wanted = {
        "method": DRAFT_MODEL,
        "model": target.model,
        "num_speculative_tokens": options.speculate,
        # what costs acceptance where requests sample, if drafts do not
        "draft_sample_method": "probabilistic",
    }
    for name, value in (given or {}).items():
        own = wanted.get(name.replace("-", "_"))
        if own is None or own == value or name.replace("-", "_") == "draft_sample_method":
            continue
        if name == "model" and _same_model(value, target.model):
            continue
        raise ValueError(
            f"--speculative-config: {name} is {value!r}, but option speculate "
            f"{options.speculate} drafts with the served model's own planes, for which it is "
            f"{own!r}; drop one of the two"
        )
    return wanted | dict(given or {})


def drafts_itself(config: VllmConfig) -> bool:
    """Whether the draft model of an engine is the model that it serves."""
    speculative = config.speculative_config
    return (
        speculative is not None
        and speculative.method == DRAFT_MODEL
        and _same_model(speculative.draft_model_config.model, config.model_config.model)
    )


def _same_model(one: str, other: str) -> bool:
    return one == other or (
        os.path.exists(one) and os.path.realpath(one) == os.path.realpath(other)
    )


def check_engine(config: VllmConfig) -> None:
    """Refuse what self-speculation cannot do.

    Raises:
        ValueError: with the setting that stands in the way and what to do.
    """
    model, parallel = config.model_config, config.parallel_config
    reasons = (
        (
            config.use_v2_model_runner,
            "needs vLLM's V1 model runner",
            "set VLLM_USE_V2_MODEL_RUNNER=0",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            f"needs the whole model in each worker, and --pipeline-parallel-size is "
            f"{parallel.pipeline_parallel_size}",
            "set it to 1",
        ),
        (
            parallel.data_parallel_size > 1,
            "is not built for ranks that wait for each other's drafts, and --data-parallel-size "
            f"is {parallel.data_parallel_size}",
            "run a server for each",
        ),
        (
            parallel.decode_context_parallel_size > 1,
            "writes the cache of one rank, and --decode-context-parallel-size is "
            f"{parallel.decode_context_parallel_size}",
            "set it to 1",
        ),
        (
            bool(config.scheduler_config.async_scheduling),
            "drafts by host decisions, which asynchronous scheduling does not wait for",
            "give --no-async-scheduling",
        ),
        (
            config.speculative_config.disable_padded_drafter_batch,
            "counts the drafts that were kept by vLLM's padded batches, and "
            "disable_padded_drafter_batch is set in --speculative-config",
            "drop it",
        ),
        (
            config.kv_transfer_config is not None,
            "would hand keys and values of drafts to the KV connector",
            "drop --kv-transfer-config",
        ),
        (config.lora_config is not None, "does not draft with adapters", "drop --enable-lora"),
        (
            model.is_multimodal_model,
            f"drafts text only, and {model.model} takes other input",
            "serve it without",
        ),
        (
            model.is_hybrid or model.is_attention_free,
            f"would overwrite the recurrent state of {model.model}",
            "serve it without",
        ),
        (model.uses_mrope, f"does not do the positions of {model.model}", "serve it without"),
    )
    for stands, why, remedy in reasons:
        if stands:
            raise ValueError(f"{METHOD}: self-speculation {why}; {remedy}, or drop speculation")


def put_drafter(runner: Any, vllm_config: VllmConfig) -> None:
    """Give a model runner, made but not loaded, the drafter that shares its model.

    Raises:
        ContractError: this vLLM's runner is not as the drafter knows it.
    """
    why = "draft with the served model; drop speculation"
    contract.require(runner, _READ, why)
    for table in runner.input_batch.block_table.block_tables:
        contract.require(table, ("num_blocks_per_row", "block_size", "block_table.gpu"), why)
    from vllm_flexquant.host.drafter import SelfDrafter

    if runner.device.type == "cpu":
        rejection.mend()
    contract.put(runner, "drafter", SelfDrafter(vllm_config, runner.device, runner), why)


def start(runner: Any, planner: Planner, ranks: int) -> SelfSpeculation | None:
    """Let the runner's drafter go by `planner`, once that has started; None if it has none of ours.

    Raises:
        ValueError: as `SelfSpeculation`.
    """
    from vllm_flexquant.host.drafter import SelfDrafter
    from vllm_flexquant.speculation.control import SelfSpeculation

    drafter = getattr(runner, "drafter", None)
    if not isinstance(drafter, SelfDrafter):
        return None
    calibration = planner.model.calibration
    drafts = None if calibration is None else calibration.drafts
    drafter.speculation = SelfSpeculation(planner, planner.options, drafts, clocked=ranks == 1)
    return drafter.speculation
