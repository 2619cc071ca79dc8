# SPDX-License-Identifier: Apache-2.0
"""The rounding sweep: every block's layers become nested codes, one block in memory at a time.

Peak memory is one block in fp32, the Hessians of its units, the codes of one layer, and the hidden
states of the calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from vllm_flexquant.format.layout import PlaneLayout, choose_group_size, width_at_least
from vllm_flexquant.quantize.blocks import BlockModel, Unit
from vllm_flexquant.quantize.evaluate import OUTPUT_INDEX
from vllm_flexquant.quantize.gptq import GptqSettings, accumulate_hessian, nested_gptq
from vllm_flexquant.quantize.rtn import QuantizedWeight, quantize_rtn
from vllm_flexquant.quantize.workfolder import WorkFolder, from_tensors, to_tensors

Method = Literal["rtn", "gptq"]

PREFIX_BITS = 4
"""The inputs of a block come from the blocks before it at this width, or the next one up."""

_BATCH_TOKENS = 4096

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


def round_blocks(
    model: BlockModel,
    tokens: torch.Tensor,
    options: RoundingOptions,
    work: WorkFolder,
    advance: Callable[[int], None] | None = None,
) -> list[list[Unit]]:
    """Quantize the layers of all blocks, into files `block-N` of `work`.

    Args:
        tokens: int64 [sequences, length], the calibration text.

    Returns:
        The units of each block that were quantized.
    """
    found: list[list[Unit]] = []
    sweep = _Sweep(model, tokens, options, work)
    hidden: list[torch.Tensor] | None = None
    with torch.inference_mode():
        for index in range(len(model)):
            done = work.has_tensors(block_file(index))
            if not done and hidden is None:
                hidden = sweep.hidden_before(index)
            with model.loaded(index):
                found.append(sweep.units(index))
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
        for batch, given in zip(sweep.batches, sweep.hidden_before(len(model)), strict=True):
            model.logits(batch, given, nothing)
    handle.remove()
    return _quantize(weight, hessian, options, name)


def block_file(index: int) -> str:
    """Name in the work folder of a block's codes; `OUTPUT_INDEX` is the output layer."""
    return "output" if index == OUTPUT_INDEX else f"block-{index:05d}"


def read_block(work: WorkFolder, index: int) -> dict[str, QuantizedWeight]:
    """Codes and scales of a block's layers, as `NestedModel.read` wants them."""
    return from_tensors(work.read_tensors(block_file(index)) or {})


class _Sweep:
    """The calibration tokens on their way through the blocks, in batches."""

    def __init__(
        self, model: BlockModel, tokens: torch.Tensor, options: RoundingOptions, work: WorkFolder
    ) -> None:
        self.model, self.tokens, self.options, self.work = model, tokens, options, work
        self.batches = list(tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1])))

    def units(self, index: int) -> list[Unit]:
        """Units of block `index`, which must be loaded, with the members to be quantized."""
        probe = self.model.embed(self.tokens[:1, : min(16, self.tokens.shape[1])])
        kept = []
        for unit in self.model.units(index, probe):
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
        count = len(self.batches)
        if 0 < start <= index and len(stored) == count:
            hidden = [stored[f"{start}.{b}"].to(self.model.device) for b in range(count)]
        else:
            start, hidden = 0, [self.model.embed(batch) for batch in self.batches]
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
        hessians = self._hessians(index, units, hidden) if gptq else {}
        return {
            name: _quantize(layers[name].weight.data, hessians.get(unit.name), self.options, name)
            for unit in units
            for name in unit.members
        }

    def forward(self, index: int, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What block `index`, which must be loaded, makes of each batch."""
        after = []
        for batch, given in zip(self.batches, hidden, strict=True):
            self.model.match(batch)
            after.append(self.model.run(index, given))
        return after

    def use(self, index: int, weights: Mapping[str, QuantizedWeight]) -> None:
        """Put weights of the prefix's width into the layers of block `index`."""
        layers = dict(self.model.linears(index))
        layout = self.options.layout
        width = width_at_least(layout.widths, PREFIX_BITS)
        for name, weight in weights.items():
            layers[name].weight.data = weight.dequantize(layout, width).to(self.model.device)

    def _hessians(
        self, index: int, units: Sequence[Unit], hidden: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Mean of x xᵀ over all tokens, fp32 [K, K] of each unit by name."""
        device = self.model.device
        hessians = {u.name: torch.zeros(u.columns, u.columns, device=device) for u in units}
        seen = dict.fromkeys(hessians, 0)

        def note(unit: Unit, inputs: torch.Tensor) -> None:
            seen[unit.name] = accumulate_hessian(hessians[unit.name], inputs, seen[unit.name])

        with self.model.watching(index, units, note):
            self.forward(index, hidden)
        return hessians


def _quantize(
    weight: torch.Tensor, hessian: torch.Tensor | None, options: RoundingOptions, name: str
) -> QuantizedWeight:
    """To nearest where there is no Hessian."""
    group_size = choose_group_size(weight.shape[1], options.group_size)
    assert group_size is not None, "layers without a group size are not chosen"
    if hessian is None:
        return quantize_rtn(weight, options.layout, group_size, name=name)
    return nested_gptq(weight, hessian, options.layout, group_size, options.gptq, name)
