# SPDX-License-Identifier: Apache-2.0
"""vLLM's `QuantizationConfig` for flexquant: which layer gets which method.

Imported by `plugin.register` in every vLLM process, so layers and kernels are imported where they
are used.
"""

from __future__ import annotations

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
    validate_checkpoint,
)
from vllm_flexquant.format.layout import GROUP_SIZES, choose_group_size
from vllm_flexquant.format.record import CalibrationRecord, read_calibration
from vllm_flexquant.options import (
    FORMAT_OPTIONS,
    METHOD,
    FlexQuantOptions,
    options_from_environment,
)
from vllm_flexquant.planner.planner import Controller

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from vllm_flexquant.host.linear import FlexLinearMethod
    from vllm_flexquant.planner.table import PrecisionTable

_ROUTERS = ("gate", "router", "shared_expert_gate")
"""Names of the small layers that choose experts; a wrong choice costs more than their bytes."""


@register_quantization_config(METHOD)
class FlexQuantConfig(QuantizationConfig):
    """Options in force, and the controller of the worker process that holds this object.

    `stored` is what a saved flexquant checkpoint says of itself, None for an unquantized one.
    """

    def __init__(
        self, options: FlexQuantOptions | None = None, stored: StoredConfig | None = None
    ) -> None:
        super().__init__()
        self.options = options_from_environment() if options is None else options
        self.stored = stored
        self.tied = False
        self.model = ""
        self.calibration: CalibrationRecord | None = None
        self._controller: Controller | None = None
        self._left_alone: set[str] = set()

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
        options = options_from_environment()
        if "format_version" in config:
            stored = StoredConfig.read(config)
            return cls(options.updated(stored.options(), "config.json"), stored)
        given = {k: v for k, v in config.items() if k != "quant_method"}
        return cls(options.updated(given, "--hf-overrides quantization_config"))

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: PretrainedConfig | None = None,
        revision: str | None = None,
    ) -> None:
        """Learn what the model ties, and check a checkpoint on disk before anything is loaded."""
        text_config = hf_config.get_text_config() if hf_config is not None else None
        self.tied = bool(getattr(text_config, "tie_word_embeddings", False))
        self.model = model_name
        if self.stored is None:
            return
        if Path(model_name).is_dir():
            validate_checkpoint(Path(model_name), verify=self.options.verify)
        # a folder or a name on the hub; None where there is no such file
        sidecar = get_hf_file_to_dict(SIDECAR, model_name, revision or "main")
        self.calibration = read_calibration(sidecar or {})

    def apply_options(self, changes: dict[str, Any], source: str) -> None:
        """Options given beside the checkpoint.

        Raises:
            ValueError: unknown or bad option, or one that the saved checkpoint fixes.
        """
        if self.stored is not None and (fixed := sorted(set(changes) & set(FORMAT_OPTIONS))):
            raise ValueError(
                f"{source}: option '{fixed[0]}' is fixed by the saved checkpoint "
                f"({getattr(self.options, fixed[0])}); drop it or quantize again"
            )
        self.options = self.options.updated(changes, source)

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
            self._note_left_alone("routed experts", prefix, "experts are not supported yet")
        return None

    # ---- the worker's side

    @property
    def controller(self) -> Controller:
        """The controller of this process, made at first use, after options are final."""
        if self._controller is None:
            self._controller = Controller(self.options)
        return self._controller

    @property
    def table(self) -> PrecisionTable:
        """The precision table, allocated on the default device if no worker did so before."""
        if self.controller.table is None:
            self.controller.allocate(torch.get_default_device(), slots=1)
        assert self.controller.table is not None
        return self.controller.table

    def widths_of(self, prefix: str) -> tuple[int, ...]:
        """The widths in bits at which a layer can run, ascending.

        Raises:
            ValueError: the checkpoint pruned parts of a fused layer differently.
        """
        if self.stored is None:
            return self.options.layout.widths
        parts = self._parts(prefix)
        found = {self.stored.widths_of(part) for part in parts}
        if len(found) > 1:
            raise ValueError(
                f"vLLM fuses {', '.join(parts)} into {prefix}, but the checkpoint has them at "
                "different widths; quantize again"
            )
        return found.pop()

    @property
    def left_alone(self) -> list[str]:
        """Layers that stay unquantized, with the reason."""
        return sorted(self._left_alone)

    def _linear_method(self, layer: torch.nn.Module, prefix: str) -> FlexLinearMethod | None:
        from vllm_flexquant.host.linear import OnlineFlexLinearMethod, StoredFlexLinearMethod

        if self._ignored(prefix):
            return None
        if prefix.rpartition(".")[2] in _ROUTERS:
            self._note_left_alone("router", prefix, "routers keep their precision")
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
        self._note_left_alone(
            kind, prefix, f"no group size of {sizes} divides its {columns} inputs"
        )
        return False

    def _ignored(self, prefix: str) -> bool:
        """Whether a layer, or all parts of a fused one, are to be left unquantized."""
        ignore = (*self.options.ignore, *(self.stored.ignore if self.stored else ()))
        if not ignore:
            return False
        parts = self._parts(prefix)

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

    def _parts(self, prefix: str) -> list[str]:
        """Names in the checkpoint of the layers that vLLM fuses into `prefix`, or its own."""
        path, _, last = prefix.rpartition(".")
        return [
            f"{path}.{part}".lstrip(".") for part in self.packed_modules_mapping.get(last, [last])
        ]

    def _note_left_alone(self, kind: str, prefix: str, why: str) -> None:
        self._left_alone.add(f"{kind} {prefix}: {why}")
