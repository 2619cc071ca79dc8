# SPDX-License-Identifier: Apache-2.0
"""The rounding sweep: every block's layers become nested codes, one block in memory at a time.

Peak memory is one block in fp32, the Hessians of its units, its codes, and the hidden states of the
calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

from vllm_flexquant.format.layout import PlaneLayout, choose_group_size, width_at_least
from vllm_flexquant.quantize.batches import Batches
from vllm_flexquant.quantize.blocks import BlockModel, Unit
from vllm_flexquant.quantize.evaluate import OUTPUT_INDEX
from vllm_flexquant.quantize.gptq import GptqSettings, accumulate_hessian, nested_gptq
from vllm_flexquant.quantize.rtn import QuantizedWeight, quantize_rtn
from vllm_flexquant.quantize.workfolder import WorkFolder, from_tensors, to_tensors

Method = Literal["rtn", "gptq"]

PREFIX_BITS = 4
"""The inputs of a block come from the blocks before it at this width, or the next one up."""

Layer = tuple[str, torch.Tensor, torch.Tensor | None]
"""Name, weight float [N, K], and Hessian fp32 [K, K] or None for round to nearest."""

_HIDDEN = "hidden"
"""File of the hidden states after the last block: `N.B`, what block N is given in batch B."""


@dataclass(frozen=True)
class RoundingOptions:
    """How weights become codes; `chosen` names the layers that do."""

    layout: PlaneLayout
    group_size: int
    method: Method
    chosen: frozenset[str]
    gptq: GptqSettings = GptqSettings()  # noqa: RUF009 - frozen


def quantize_layers(layers: Sequence[Layer], options: RoundingOptions) -> list[QuantizedWeight]:
    """Codes and scales of each layer; layers do not depend on each other.

    On a CPU they are rounded at the same time, and torch's threads shared out among them: columns
    go one after another, in steps too small for many threads.
    """

    def quantize(layer: Layer) -> QuantizedWeight:
        name, weight, hessian = layer
        with torch.inference_mode():
            return _quantize(weight, hessian, options, name)

    threads = torch.get_num_threads()
    if len(layers) == 1 or threads == 1 or layers[0][1].device.type != "cpu":
        return [quantize(layer) for layer in layers]
    share = threads_of_layer(threads, len(layers))
    longest_first = sorted(layers, key=lambda layer: -layer[1].shape[1])
    try:
        with ThreadPoolExecutor(threads // share, "rounding", torch.set_num_threads, (share,)) as p:
            running = {layer[0]: p.submit(quantize, layer) for layer in longest_first}
            return [running[name].result() for name, _, _ in layers]
    finally:
        torch.set_num_threads(threads)  # what threads to come begin with was changed too


def threads_of_layer(threads: int, layers: int) -> int:
    """Of so many threads, what each of some layers gets that are rounded at the same time."""
    return max(1, threads // layers)


def round_blocks(
    model: BlockModel,
    tokens: torch.Tensor,
    options: RoundingOptions,
    work: WorkFolder,
    advance: Callable[[int], None] | None = None,
    quantize: Callable[[Sequence[Layer], RoundingOptions], list[QuantizedWeight]] = quantize_layers,
) -> list[list[Unit]]:
    """Quantize the layers of all blocks, into files `block-N` of `work`.

    Args:
        tokens: int64 [sequences, length], the calibration text.
        quantize: does what `quantize_layers` does with the layers of a block.

    Returns:
        The units of each block that were quantized.
    """
    found: list[list[Unit]] = []
    sweep = _Sweep(model, tokens, options, work, quantize)
    hidden: list[torch.Tensor] | None = None
    with torch.inference_mode():
        for index in range(len(model)):
            done = work.has_tensors(block_file(index))
            if not done and hidden is None:
                hidden = sweep.hidden_before(index)
            with model.loaded(index):
                found.append(sweep.chosen_units(index))
                if hidden is not None:
                    weights = sweep.round_block(index, found[-1], hidden)
                    work.write_tensors(block_file(index), to_tensors(weights))
                    sweep.use(index, weights)
                    hidden = sweep.forward(index, hidden)
            if hidden is not None:
                work.write_tensors(_HIDDEN, {f"{index + 1}.{b}": h for b, h in enumerate(hidden)})
            if advance:
                advance(index + 1)
    return found


def round_output(
    model: BlockModel, tokens: torch.Tensor, options: RoundingOptions, work: WorkFolder, name: str
) -> QuantizedWeight:
    """The output layer, by what the rounded blocks give it; `round_blocks` must have been run."""
    layer = model.model.get_output_embeddings()
    weight = layer.weight.data
    if options.method == "rtn":
        return _quantize(weight, None, options, name)
    columns = weight.shape[1]
    hessian = torch.zeros(columns, columns, device=model.device)
    seen = 0

    def note(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal seen
        seen = accumulate_hessian(hessian, args[0], seen)

    sweep = _Sweep(model, tokens, options, work)
    handle = layer.register_forward_pre_hook(note)
    nothing = torch.zeros(1, columns)  # only the input is wanted, not the logits
    with torch.inference_mode():
        for batch, given in zip(sweep.tokens, sweep.hidden_before(len(model)), strict=True):
            model.logits(batch, given, nothing)
    handle.remove()
    return _quantize(weight, hessian, options, name)


def block_file(index: int) -> str:
    """Name in the work folder of a block's codes; `OUTPUT_INDEX` is the output layer."""
    return "output" if index == OUTPUT_INDEX else f"block-{index:05d}"


def read_block(work: WorkFolder, index: int) -> dict[str, QuantizedWeight]:
    """Codes and scales of a block's layers, as `NestedModel.read` wants them."""
    return from_tensors(work.read_tensors(block_file(index)) or {})


class _Sweep(Batches):
    """The calibration tokens on their way through the blocks, which are rounded on the way."""

    def __init__(
        self,
        model: BlockModel,
        tokens: torch.Tensor,
        options: RoundingOptions,
        work: WorkFolder,
        quantize: Callable[..., list[QuantizedWeight]] = quantize_layers,
    ) -> None:
        super().__init__(model, tokens)
        self.options, self.work, self.quantize = options, work, quantize

    def chosen_units(self, index: int) -> list[Unit]:
        """Units of block `index`, which must be loaded, with the members to be quantized."""
        kept = []
        for unit in self.units(index):
            members = [
                (name, rows)
                for name, rows in zip(unit.members, unit.rows, strict=True)
                if name in self.options.chosen
            ]
            if members:
                names, rows = zip(*members, strict=True)
                kept.append(Unit(names, rows, unit.columns))
        return kept

    def hidden_before(self, index: int) -> list[torch.Tensor]:
        """What block `index` is given, from what an interrupted run stored last, or from the start.

        Blocks before it must have been rounded.
        """
        stored = self.work.read_tensors(_HIDDEN) or {}
        reached = {int(name.partition(".")[0]) for name in stored}
        start = reached.pop() if len(reached) == 1 else 0
        count = len(self.tokens)
        if 0 < start <= index and len(stored) == count:
            hidden = [stored[f"{start}.{b}"].to(self.model.device) for b in range(count)]
        else:
            start, hidden = 0, self.embed()
        for done in range(start, index):
            with self.model.loaded(done):
                self.use(done, read_block(self.work, done))
                hidden = self.forward(done, hidden)
        return hidden

    def round_block(
        self, index: int, units: Sequence[Unit], hidden: Sequence[torch.Tensor]
    ) -> dict[str, QuantizedWeight]:
        """Codes and scales of the layers of block `index`, which must be loaded, by name."""
        layers = dict(self.model.linears(index))
        gptq = self.options.method == "gptq"
        hessians = self.hessians(index, units, hidden) if gptq else {}
        given = [
            (name, layers[name].weight.data, hessians.get(unit.name))
            for unit in units
            for name in unit.members
        ]
        found = self.quantize(given, self.options)
        return {name: weight for (name, _, _), weight in zip(given, found, strict=True)}

    def use(self, index: int, weights: Mapping[str, QuantizedWeight]) -> None:
        """Put weights of the prefix's width into the layers of block `index`."""
        layers = dict(self.model.linears(index))
        layout = self.options.layout
        width = width_at_least(layout.widths, PREFIX_BITS)
        for name, weight in weights.items():
            layers[name].weight.data = weight.dequantize(layout, width).to(self.model.device)


def _quantize(
    weight: torch.Tensor, hessian: torch.Tensor | None, options: RoundingOptions, name: str
) -> QuantizedWeight:
    """To nearest where there is no Hessian."""
    group_size = choose_group_size(weight.shape[1], options.group_size)
    assert group_size is not None, "layers without a group size are not chosen"
    if hessian is None:
        return quantize_rtn(weight, options.layout, group_size, name=name)
    return nested_gptq(weight, hessian, options.layout, group_size, options.gptq, name)
