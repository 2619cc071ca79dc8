# SPDX-License-Identifier: Apache-2.0
"""vLLM's `QuantizationConfig` for flexquant: what an engine carries, and which layer gets which
method.

Imported in every vLLM process, so layers, kernels and the planner are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from vllm_flexquant.format.checkpoint import (
    OUTPUT_LAYER,
    SIDECAR,
    OutputLayer,
    StoredConfig,
    parts_of,
)
from vllm_flexquant.format.layout import GROUP_SIZES, choose_group_size
from vllm_flexquant.format.record import CalibrationRecord, read_calibration
from vllm_flexquant.options import METHOD, FlexQuantOptions, Sources

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from vllm_flexquant.host.linear import FlexLinearMethod
    from vllm_flexquant.planner.planner import Planner
    from vllm_flexquant.planner.table import PrecisionTable
    from vllm_flexquant.requests.grant import Terms

_ROUTERS = ("gate", "router", "shared_expert_gate")
"""Names of the small layers that choose experts; a wrong choice costs more than their bytes."""


@register_quantization_config(METHOD)
class FlexQuantConfig(QuantizationConfig):
    """What one engine goes by, in each of its processes.

    sources: of its options. stored: what a saved flexquant checkpoint says of itself, None for an
    unquantized one. calibration: of that checkpoint, None without. tied: the output layer is the
    embedding. model: its name or folder. rounds_activations: the kernels of the layers do, to int8.
    left_alone: layers that stay unquantized, with the reason.
    """

    def __init__(self, sources: Sources | None = None, stored: StoredConfig | None = None) -> None:
        super().__init__()
        self.sources = Sources.from_environment() if sources is None else sources
        self.stored = stored
        self.tied = False
        self.model = ""
        self.calibration: CalibrationRecord | None = None
        self.rounds_activations = False
        self.left_alone: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one process."""
        kept = dict(self.__dict__)
        for name in ("planner", "terms"):
            kept.pop(name, None)
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The config came from another process, which may have made it for a front end here."""
        self.__dict__.update(state)
        from vllm_flexquant.host import admission

        admission.install()

    # ---- vLLM's interface

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: any unquantized checkpoint will do."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FlexQuantConfig:
        """From `config.json` of a saved checkpoint, or from `--hf-overrides`."""
        if "format_version" in config:
            stored = StoredConfig.read(config)
            return cls(Sources.from_environment(stored=stored.options()), stored)
        given = {k: v for k, v in config.items() if k != "quant_method"}
        return cls(Sources.from_environment(overrides=given))

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: PretrainedConfig | None = None,
        revision: str | None = None,
    ) -> None:
        """Learn what the model ties, and what calibration found of a saved checkpoint."""
        from vllm_flexquant.host import admission

        admission.install()
        text_config = hf_config.get_text_config() if hf_config is not None else None
        self.tied = bool(getattr(text_config, "tie_word_embeddings", False))
        self.model = model_name
        if self.stored is not None:
            sidecar = get_hf_file_to_dict(SIDECAR, model_name, revision or "main")
            self.calibration = read_calibration(sidecar or {})
        elif (Path(model_name) / SIDECAR).exists():
            raise ValueError(
                f"{model_name} is a saved flexquant checkpoint, and --hf-overrides replaces the "
                "quantization_config that says how to read it; give options by "
                "--additional-config instead"
            )

    # ---- options

    @cached_property
    def options(self) -> FlexQuantOptions:
        """The options in force when the engine starts.

        Raises:
            ValueError: as `Sources.resolve`.
        """
        return self.sources.resolve()

    def give(self, additional: Mapping[str, Any]) -> None:
        """Options beside the checkpoint and the overrides, which win over them.

        Raises:
            ValueError: as `Sources.resolve`.
        """
        sources = replace(self.sources, additional={**self.sources.additional, **additional})
        options = sources.resolve()
        self.sources, self.options = sources, options
        self.__dict__.pop("terms", None)

    @cached_property
    def terms(self) -> Terms:
        """What requests of this engine get, the same in each of its processes."""
        from vllm_flexquant.host.terms import terms_of

        return terms_of(self.options, self.stored, self.calibration, self.rounds_activations)

    # ---- layers

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        from vllm_flexquant.host.linear import LookupEmbeddingMethod

        if isinstance(layer, ParallelLMHead):
            return self._output_method(layer, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return LookupEmbeddingMethod() if self.tied and self.options.output_layer else None
        if isinstance(layer, LinearBase):
            return self._linear_method(layer, prefix) or UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts):
            self.left_alone.add(f"routed experts {prefix}: experts are not supported yet")
        return None

    @cached_property
    def planner(self) -> Planner:
        """The planner of this worker process, made at first use, after options are final."""
        from vllm_flexquant.planner.planner import Planner

        return Planner(self.options, self.terms)

    @property
    def table(self) -> PrecisionTable:
        """The precision table, allocated on the default device if no worker did so before."""
        if self.planner.table is None:
            self.planner.allocate(torch.get_default_device(), slots=1)
        assert self.planner.table is not None
        return self.planner.table

    def widths_of(self, prefix: str) -> tuple[int, ...]:
        """The widths in bits at which a layer can run, ascending.

        Raises:
            ValueError: the checkpoint pruned parts of a fused layer differently.
        """
        if self.stored is None:
            return self.options.layout.widths
        parts = parts_of(prefix, self.packed_modules_mapping)
        found = {self.stored.widths_of(part) for part in parts}
        if len(found) > 1:
            raise ValueError(
                f"vLLM fuses {', '.join(parts)} into {prefix}, but the checkpoint has them at "
                "different widths; quantize again"
            )
        return found.pop()

    def _linear_method(self, layer: torch.nn.Module, prefix: str) -> FlexLinearMethod | None:
        from vllm_flexquant.host.linear import OnlineFlexLinearMethod, StoredFlexLinearMethod

        if self._ignored(prefix):
            return None
        if prefix.rpartition(".")[2] in _ROUTERS:
            self.left_alone.add(f"router {prefix}: routers keep their precision")
            return None
        if self.stored is not None:
            return StoredFlexLinearMethod(self, prefix)
        columns = getattr(layer, "input_size_per_partition", layer.input_size)
        return (
            OnlineFlexLinearMethod(self, prefix) if self._fits("layer", prefix, columns) else None
        )

    def _output_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm_flexquant.host.linear import OnlineFlexLinearMethod, StoredFlexLinearMethod

        prefix = prefix or OUTPUT_LAYER
        if self.stored is not None and self.stored.output_layer is OutputLayer.PLANES:
            if not self.options.output_layer:
                raise ValueError(
                    "output_layer is false, but the saved checkpoint holds the output layer only "
                    "as planes; drop the option or quantize again with --no-output-layer"
                )
            return StoredFlexLinearMethod(self, prefix)
        if not self.options.output_layer or self._ignored(prefix):
            return None
        fits = self._fits("output layer", prefix, layer.input_size_per_partition)
        return OnlineFlexLinearMethod(self, prefix) if fits else None

    def _fits(self, kind: str, prefix: str, columns: int) -> bool:
        """Whether a group size divides `columns`; a layer that none does is noted."""
        if choose_group_size(columns, self.options.group_size) is not None:
            return True
        sizes = ", ".join(str(g) for g in GROUP_SIZES if g <= self.options.group_size)
        self.left_alone.add(
            f"{kind} {prefix}: no group size of {sizes} divides its {columns} inputs"
        )
        return False

    def _ignored(self, prefix: str) -> bool:
        """Whether a layer, or all parts of a fused one, are to be left unquantized."""
        ignore = (*self.options.ignore, *(self.stored.ignore if self.stored else ()))
        if not ignore:
            return False
        parts = parts_of(prefix, self.packed_modules_mapping)

        def named(name: str) -> bool:
            return any(name.strip(".") == i or name.endswith(f".{i}") for i in ignore)

        found = [named(part) for part in parts]
        if named(prefix) or all(found):
            return True
        if any(found):
            inside = parts[found.index(True)].strip(".")
            raise ValueError(
                f"option 'ignore' names {inside}, which vLLM fuses into {prefix}; "
                f"name all of {', '.join(part.rpartition('.')[2] for part in parts)} or none"
            )
        return False
