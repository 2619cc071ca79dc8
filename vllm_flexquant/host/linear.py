# SPDX-License-Identifier: Apache-2.0
"""vLLM linear methods over planes, and the embedding that a quantized output layer is tied to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import GroupQuantScaleParameter, ModelWeightParameter

from flexquant_kernels import ops, pack, reference
from vllm_flexquant.format.layout import (
    PARENT_BITS,
    ScaleMode,
    choose_group_size,
    width_at_least,
)
from vllm_flexquant.host.heap import trim_heap
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner.table import LayerRecord, PrecisionTable, WeightError
from vllm_flexquant.quantize.rtn import quantize_rtn

logger = init_logger(f"vllm.{__name__}")

_LINEAR = torch.ops.flexquant.linear.default
_LINEAR_RELAID = torch.ops.flexquant.linear_relaid.default

_SAMPLED_ROWS = 256
"""Rows per layer from which the weight error at each width is taken."""


class LayerSource(Protocol):
    """What a layer asks of the engine's quantization config."""

    @property
    def options(self) -> FlexQuantOptions:
        """The options in force when the model is loaded."""

    @property
    def table(self) -> PrecisionTable:
        """Where its entry is."""

    def widths_of(self, prefix: str) -> tuple[int, ...]:
        """The widths in bits at which it can run, ascending."""


class FlexLinearMethod(LinearMethodBase):
    """What both sources of planes share: the end of loading, and the forward pass.

    After loading, a layer has the parameters `plane0`, `plane1`, ... (uint8, as its kernel wants
    them), `scales` (fp16), and `flexquant_width`, its int32 [1] view of the precision table; for
    the Triton kernels also `counters`.
    """

    def __init__(self, config: LayerSource, prefix: str) -> None:
        self.config = config
        self.prefix = prefix
        self.layout = config.options.layout
        self.widths = config.widths_of(prefix)
        self.planes = self.layout.planes[: self.layout.widths.index(self.widths[-1]) + 1]
        self.plane_names = [f"plane{i}" for i in range(len(self.planes))]
        self.group_size = 0
        self.tile = 0
        self.relaid = False
        self.index = -1
        self.probes = False
        self.activation_dtype = torch.get_default_dtype()

    def _declare(self, layer: torch.nn.Module, rows: int, columns: int, dtype: torch.dtype) -> None:
        layer.flexquant_rows, layer.flexquant_columns = rows, columns
        self.activation_dtype = dtype
        # taken here, where layers come in the order of the model, not in that of the files
        self.index, layer.flexquant_width = self.config.table.reserve()

    def _finish(
        self, layer: torch.nn.Module, planes: list[torch.Tensor], scales: torch.Tensor
    ) -> None:
        """Give the layer its kernel, its entry of the table and its planes.

        Args:
            planes: in storage form, uint8 [N, K * bits / 8]; the list is emptied on the way, so
                that no plane exists twice for longer than its own re-laying takes.
            scales: fp16 [N, K / group_size, S, 2].
        """
        rows, columns = layer.flexquant_rows, layer.flexquant_columns
        choice = ops.dispatch(
            scales.device,
            self.activation_dtype,
            columns,
            rows,
            self.group_size,
            self.layout.planes,
        )
        self.tile, self.relaid = choice.tile, choice.relaid
        self.config.table.describe(
            self.index,
            LayerRecord(
                name=self.prefix,
                rows=rows,
                columns=columns,
                group_size=self.group_size,
                layout=self.layout,
                widths=self.widths,
                kernel=choice.name,
                reason=choice.reason,
                error=self._weight_error(planes, scales, rows, columns),
            ),
        )
        for name, bits in zip(self.plane_names, self.planes, strict=True):
            _replace(layer, name, self._plane_as_wanted(planes.pop(0), bits, columns))
        if self.relaid:
            from flexquant_kernels.triton import layout

            _replace(layer, "counters", layout.make_counters(rows, scales.device))
            scales = layout.relay_scales(scales, columns)
        elif self.tile:
            scales = pack.tile_scales(scales, self.tile)
        _replace(layer, "scales", scales)

    def _plane_as_wanted(self, plane: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
        """A plane in the form of the layer's kernel, from storage form."""
        if self.relaid:
            from flexquant_kernels.triton import layout

            return layout.relay_plane(plane, bits, columns)
        return pack.tile_plane(plane, bits, columns, self.tile) if self.tile else plane

    def _weight_error(
        self, planes: list[torch.Tensor], scales: torch.Tensor, rows: int, columns: int
    ) -> WeightError:
        count = min(rows, _SAMPLED_ROWS)
        pick = torch.arange(count, device=scales.device) * rows // count
        sample, sample_scales = [plane[pick] for plane in planes], scales[pick]

        def at(width: int) -> torch.Tensor:
            return reference.dequantize(
                sample,
                sample_scales,
                self.layout.planes,
                width,
                self.group_size,
                count,
                tile=0,
            )

        best = at(self.widths[-1])
        return WeightError(
            weights=rows * columns,
            square_norm=float(best.square().sum()),
            square_error={w: float((at(w) - best).square().sum()) for w in self.widths},
        )

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.probes:
            torch.ops.flexquant.probe(x, layer.flexquant_width)
        # straight from the dict and by the overload: a third less time per call than by attributes
        parameters = layer._parameters
        if self.relaid:
            return _LINEAR_RELAID(
                x,
                [parameters[name] for name in self.plane_names],
                parameters["scales"],
                parameters["counters"],
                layer.flexquant_width,
                bias,
                self.layout.planes,
                self.group_size,
                layer.flexquant_rows,
            )
        return _LINEAR(
            x,
            [parameters[name] for name in self.plane_names],
            parameters["scales"],
            layer.flexquant_width,
            bias,
            self.layout.planes,
            self.group_size,
            layer.flexquant_rows,
            self.tile,
        )

    def triton_layers(self, layer: torch.nn.Module) -> list[Any]:
        """What `flexquant_kernels.triton.warm_up` takes; empty if no Triton kernel runs the layer.

        Once without and once with its bias, which vLLM adds on one tensor-parallel rank alone.
        """
        if not self.relaid:
            return []
        from flexquant_kernels import triton

        weight = triton.DeviceWeight(
            tuple(getattr(layer, name).data for name in self.plane_names),
            layer.scales.data,
            layer.counters.data,
            self.layout.planes,
            self.group_size,
            layer.flexquant_rows,
            layer.flexquant_columns,
        )
        biases = {None, getattr(layer, "bias", None)}
        return [triton.Layer(weight, self.activation_dtype, bias) for bias in biases]


@register_weight_loader_v2_supported_method
class OnlineFlexLinearMethod(FlexLinearMethod):
    """Quantizes an unquantized weight as soon as all of it has been loaded.

    The weight is created on the meta device, so that vLLM's layerwise loading materialises it just
    in time, layer by layer (`model_loader/reload/layerwise.py`).
    """

    uses_meta_device = True

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        rows = sum(output_partition_sizes)
        self._declare(layer, rows, input_size_per_partition, params_dtype)
        group_size = choose_group_size(input_size_per_partition, self.config.options.group_size)
        assert group_size is not None, "the config quantizes only layers that have a group size"
        self.group_size = group_size
        weight = ModelWeightParameter(
            data=torch.empty(rows, input_size_per_partition, device="meta", dtype=params_dtype),
            input_dim=1,
            output_dim=0,
            weight_loader=extra_weight_attrs["weight_loader"],
        )
        layer.register_parameter("weight", weight)
        initialize_online_processing(layer)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Quantize from the embedding, which itself stays as it is for looking up tokens."""
        del layer.weight
        # behind a tuple, or the embedding would become a submodule of the output layer
        layer.flexquant_tied = (embed_tokens,)
        return layer

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        layer._already_called_process_weights_after_loading = True
        tied = getattr(layer, "flexquant_tied", None)
        weight = tied[0].weight.data if tied else layer.weight.data
        options = self.config.options
        codes, scales = quantize_rtn(
            weight, options.layout, self.group_size, options.scales, name=self.prefix
        )
        if not tied:
            del layer.weight
        del weight
        planes = pack.pack_planes(codes, self.layout.planes)[: len(self.planes)]
        del codes
        self._finish(layer, planes, scales)
        trim_heap()


@register_weight_loader_v2_supported_method
class StoredFlexLinearMethod(FlexLinearMethod):
    """Loads the planes of a saved flexquant checkpoint."""

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        self._declare(layer, rows, columns, params_dtype)
        options = self.config.options
        # the writer knew the whole input dimension, not how it would be sharded
        group_size = choose_group_size(input_size, options.group_size)
        if group_size is None or columns % group_size:
            fitting = choose_group_size(columns)
            remedy = (
                f"quantize again with --group-size {fitting}"
                if fitting
                else "use fewer tensor-parallel ranks"
            )
            raise ValueError(
                f"{self.prefix}: groups of {group_size} do not divide the {columns} inputs that "
                f"each of {input_size // columns} tensor-parallel ranks holds; {remedy}"
            )
        self.group_size = group_size
        loader = extra_weight_attrs["weight_loader"]
        loaded: set[str] = set()
        layer.flexquant_loaded = loaded
        for name, bits in zip(self.plane_names, self.planes, strict=True):
            data = torch.empty(rows, columns * bits // PARENT_BITS, dtype=torch.uint8)
            layer.register_parameter(
                name,
                ModelWeightParameter(
                    data=data,
                    input_dim=1,
                    output_dim=0,
                    weight_loader=_noting(loader, name, loaded),
                ),
            )
        sets = len(self.widths) if options.scales is ScaleMode.PER_WIDTH else 1
        data = torch.empty(rows, columns // group_size, sets, 2, dtype=torch.float16)
        layer.register_parameter(
            "scales",
            GroupQuantScaleParameter(
                data=data,
                input_dim=1,
                output_dim=0,
                weight_loader=_noting(loader, "scales", loaded),
            ),
        )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        layer._already_called_process_weights_after_loading = True
        if missing := sorted({*self.plane_names, "scales"} - layer.flexquant_loaded):
            raise ValueError(
                f"the checkpoint has no {self.prefix}.{missing[0]}; copy it again or quantize again"
            )
        del layer.flexquant_loaded
        planes = [getattr(layer, name).data for name in self.plane_names]
        for name in self.plane_names:
            delattr(layer, name)
        self._finish(layer, planes, self._all_sets(layer.scales.data))

    def _all_sets(self, scales: torch.Tensor) -> torch.Tensor:
        """One set for each width of the layout, as kernels want them, [N, K / group_size, S, 2].

        Widths at which the layer cannot run get those of the next one up, and are never used.
        """
        if self.config.options.scales is ScaleMode.SHARED or self.widths == self.layout.widths:
            return scales
        used = [width_at_least(self.widths, width) for width in self.layout.widths]
        return scales[:, :, [self.widths.index(width) for width in used]]


class LookupEmbeddingMethod(UnquantizedEmbeddingMethod):
    """An embedding that is only looked up, because its tied output layer has planes of its own.

    vLLM on CPU would keep a second copy of it, packed for a matrix product that never comes.
    """

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        pass


def _replace(layer: torch.nn.Module, name: str, data: torch.Tensor) -> None:
    if hasattr(layer, name):
        delattr(layer, name)
    layer.register_parameter(name, Parameter(data.contiguous(), requires_grad=False))


def _noting(loader: Callable[..., Any], name: str, loaded: set[str]) -> Callable[..., Any]:
    """`loader`, which also notes that something was loaded for `name`."""

    def noting_loader(*args: Any, **kwargs: Any) -> Any:
        loaded.add(name)
        return loader(*args, **kwargs)

    return noting_loader
