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

from vllm_flexquant.format.layout import PlaneLayout, choose_group_size
from vllm_flexquant.quantize.blocks import BlockModel, Unit
from vllm_flexquant.quantize.gptq import (
    GptqSettings,
    accumulate_hessian,
    dequantize_codes,
    nested_gptq,
)
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
    batches = list(tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1])))
    hidden: list[torch.Tensor] | None = None
    with torch.inference_mode():
        for index in range(len(model)):
            units = _units(model, index, tokens, options)
            found.append(units)
            done = work.read_tensors(block_file(index))
            if done is None:
                if hidden is None:
                    hidden = _hidden_before(model, index, batches, options, work)
                with model.loaded(index):
                    weights = _round_block(model, index, units, batches, hidden, options)
                    work.write_tensors(block_file(index), to_tensors(weights))
                    _use(model, index, weights, options)
                    hidden = _forward(model, index, batches, hidden)
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
    group_size = choose_group_size(weight.shape[1], options.group_size)
    assert group_size is not None
    if options.method == "rtn":
        return quantize_rtn(weight, options.layout, group_size, name=name)
    batches = list(tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1])))
    columns = weight.shape[1]
    hessian = torch.zeros(columns, columns, device=model.device)
    seen = 0

    def note(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal seen
        seen = accumulate_hessian(hessian, args[0], seen)

    handle = layer.register_forward_pre_hook(note)
    nothing = torch.zeros(1, columns)  # only the input is wanted, not the logits
    with torch.inference_mode():
        hidden = _hidden_before(model, len(model), batches, options, work)
        for batch, given in zip(batches, hidden, strict=True):
            model.logits(batch, given, nothing)
    handle.remove()
    return nested_gptq(weight, hessian, options.layout, group_size, options.gptq, name)


def block_file(index: int) -> str:
    """Name in the work folder of a block's codes; -1 is the output layer."""
    return "output" if index < 0 else f"block-{index:05d}"


def read_block(
    work: WorkFolder, options: RoundingOptions, index: int
) -> dict[str, tuple[QuantizedWeight, int]]:
    """Codes, scales and group size of a block's layers, as `NestedWeights.read` wants them."""
    tensors = work.read_tensors(block_file(index))
    if tensors is None:
        return {}
    result = {}
    for name, weight in from_tensors(tensors).items():
        group_size = choose_group_size(weight.codes.shape[1], options.group_size)
        assert group_size is not None
        result[name] = (weight, group_size)
    return result


def _units(
    model: BlockModel, index: int, tokens: torch.Tensor, options: RoundingOptions
) -> list[Unit]:
    """Those of which every member is to be quantized."""
    with model.loaded(index):
        probe = model.embed(tokens[:1, : min(16, tokens.shape[1])])
        units = model.units(index, probe)
    kept = []
    for unit in units:
        members = [
            (name, rows)
            for name, rows in zip(unit.members, unit.rows, strict=True)
            if name in options.chosen
        ]
        if members:
            names, rows = zip(*members, strict=True)
            kept.append(Unit(names, rows, unit.columns))
    return kept


def _hidden_before(
    model: BlockModel,
    index: int,
    batches: Sequence[torch.Tensor],
    options: RoundingOptions,
    work: WorkFolder,
) -> list[torch.Tensor]:
    """What block `index` is given, from what an interrupted run stored last, or from the start."""
    stored = work.read_tensors(_HIDDEN) or {}
    reached = {int(name.partition(".")[0]) for name in stored}
    start = reached.pop() if len(reached) == 1 else 0
    if 0 < start <= index and len(stored) == len(batches):
        hidden = [stored[f"{start}.{b}"].to(model.device) for b in range(len(batches))]
    else:
        start, hidden = 0, [model.embed(batch) for batch in batches]
    for done in range(start, index):
        weights = {name: found[0] for name, found in read_block(work, options, done).items()}
        with model.loaded(done):
            _use(model, done, weights, options)
            hidden = _forward(model, done, batches, hidden)
    return hidden


def _round_block(
    model: BlockModel,
    index: int,
    units: Sequence[Unit],
    batches: Sequence[torch.Tensor],
    hidden: Sequence[torch.Tensor],
    options: RoundingOptions,
) -> dict[str, QuantizedWeight]:
    layers = dict(model.linears(index))
    hessians: dict[str, torch.Tensor] = {}
    if options.method == "gptq":
        hessians = _hessians(model, index, units, batches, hidden)
    weights = {}
    for unit in units:
        group_size = choose_group_size(unit.columns, options.group_size)
        assert group_size is not None
        for name in unit.members:
            weight = layers[name].weight.data
            if options.method == "gptq":
                hessian = hessians[unit.name]
                weights[name] = nested_gptq(
                    weight, hessian, options.layout, group_size, options.gptq, name
                )
            else:
                weights[name] = quantize_rtn(weight, options.layout, group_size, name=name)
    return weights


def _hessians(
    model: BlockModel,
    index: int,
    units: Sequence[Unit],
    batches: Sequence[torch.Tensor],
    hidden: Sequence[torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Mean of x xᵀ over all tokens, fp32 [K, K] of each unit by name."""
    hessians = {u.name: torch.zeros(u.columns, u.columns, device=model.device) for u in units}
    seen = dict.fromkeys(hessians, 0)

    def note(unit: Unit, inputs: torch.Tensor) -> None:
        seen[unit.name] = accumulate_hessian(hessians[unit.name], inputs, seen[unit.name])

    with model.watching(index, units, note):
        _forward(model, index, batches, hidden)
    return hessians


def _forward(
    model: BlockModel,
    index: int,
    batches: Sequence[torch.Tensor],
    hidden: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    after = []
    for batch, given in zip(batches, hidden, strict=True):
        model.match(batch)
        after.append(model.run(index, given))
    return after


def _use(
    model: BlockModel,
    index: int,
    weights: Mapping[str, QuantizedWeight],
    options: RoundingOptions,
) -> None:
    """Put weights of the prefix's width into the layers of block `index`."""
    layers = dict(model.linears(index))
    width = options.layout.width_at_least(PREFIX_BITS)
    for name, weight in weights.items():
        group_size = choose_group_size(weight.codes.shape[1], options.group_size)
        assert group_size is not None
        layers[name].weight.data = dequantize_codes(weight, options.layout, group_size, width)
