# SPDX-License-Identifier: Apache-2.0
"""A transformers model, one decoder block at a time.

A checkpoint may be many times larger than memory, so its blocks stay on the meta device but for
the one at work. All else (embedding, final norm, output layer) is loaded once. What surrounds the
blocks is never re-written here: the model's own `forward` runs with stand-ins in place of blocks,
which record what the first block is given, or give back what the last one returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

BlockHook = Callable[["Unit", torch.Tensor], None]
"""Called with a unit and what its layers are given, [..., K]."""


@dataclass(frozen=True)
class Unit:
    """Linear layers that are given the same input, so that they share a Hessian and a width: vLLM
    fuses such layers into one.

    members: their module names, in the order in which the model calls them. columns: K.
    rows: N of each.
    """

    members: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int

    @property
    def name(self) -> str:
        """The first member's name stands for the unit."""
        return self.members[0]

    @property
    def weights(self) -> int:
        return sum(self.rows) * self.columns


class _Recorder(torch.nn.Module):
    """Stands for a block: keeps what it is given and passes `given` on, or its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}
        self.hidden: torch.Tensor | None = None
        self.given: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            raise ValueError("this model passes its blocks more than one positional argument")
        self.hidden, self.kwargs = hidden, kwargs
        return hidden if self.given is None else self.given


class BlockModel:
    """The model of a checkpoint folder, in fp32 on `device`.

    Raises:
        ValueError: no safetensors, an architecture that transformers does not know or that has no
            list of decoder blocks, or a tensor that the checkpoint lacks.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.folder = folder
        self.device = torch.device(device)
        self._files = _index(folder)
        self.model = _empty_model(folder)
        self.prefix, self._list = _block_list(self.model, folder)
        self.blocks = list(self._list)
        self._recorders = [_Recorder() for _ in self.blocks]
        for i, recorder in enumerate(self._recorders):
            self._list[i] = recorder
            # some models look at their blocks' attributes
            for name in ("attention_type", "layer_type", "layer_idx"):
                if hasattr(self.blocks[i], name):
                    setattr(recorder, name, getattr(self.blocks[i], name))
        self._fill(self.model, "")
        self.model.to(self.device)
        self._shape: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.blocks)

    # ---- weights

    def load(self, index: int) -> torch.nn.Module:
        """Block `index` with its weights, fp32 on the device."""
        block = self.blocks[index]
        self._fill(block, f"{self.prefix}.{index}.")
        return block.to(self.device)

    def unload(self, index: int) -> None:
        """Give the weights of block `index` back."""
        for module in self.blocks[index].modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = _meta(parameter)

    @contextmanager
    def loaded(self, index: int) -> Iterator[torch.nn.Module]:
        """Block `index` for as long as the context lasts."""
        try:
            yield self.load(index)
        finally:
            self.unload(index)

    def read(self, name: str) -> torch.Tensor:
        """One tensor of the checkpoint as stored."""
        if name not in self._files:
            raise ValueError(
                f"{self.folder} lacks {name}; copy the checkpoint again, or, if its tensors have "
                f"other names than {type(self.model).__name__} of transformers gives them (as "
                "experts have), round it without calibration: --method rtn"
            )
        with safe_open(self._files[name], framework="pt") as reader:
            return reader.get_tensor(name)

    def _fill(self, module: torch.nn.Module, prefix: str) -> None:
        tied = getattr(self.model.config.get_text_config(), "tie_word_embeddings", False)
        embedding = self.model.get_input_embeddings()
        for path, child in module.named_modules():
            for name, parameter in list(child._parameters.items()):
                if parameter is None or not parameter.is_meta:
                    continue
                full = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
                if child is self.model.get_output_embeddings() and tied:
                    child._parameters[name] = embedding._parameters["weight"]
                    continue
                data = self.read(full).to(torch.float32)
                if not torch.isfinite(data).all():
                    raise ValueError(f"{full} has NaN or infinite values; repair the checkpoint")
                child._parameters[name] = torch.nn.Parameter(data, requires_grad=False)

    # ---- running

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [B, T] -> what the first block is given, fp32 [B, T, H]."""
        self._give(None)
        self._body(tokens)
        hidden = self._recorders[0].hidden
        assert hidden is not None
        return hidden.detach()

    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Block `index`, which must be loaded, on fp32 [B, T, H].

        Masks and positions are those of the last `embed` or `match`, whose B and T must be the
        same.
        """
        out = self.blocks[index](hidden, **self._recorders[index].kwargs)
        return out[0] if isinstance(out, tuple) else out

    def match(self, tokens: torch.Tensor) -> None:
        """Make masks and positions those of `tokens` [B, T], if the last ones were others."""
        if self._shape != tuple(tokens.shape):
            self.embed(tokens)

    def logits(
        self, tokens: torch.Tensor, hidden: torch.Tensor, output_weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the model makes of `hidden` [B, T, H] from the last block: fp32 [B, T, V].

        Args:
            output_weight: fp32 [V, H] to use as the output layer's.
        """
        output = self.model.get_output_embeddings()
        before = output._parameters["weight"]
        if output_weight is not None:
            output._parameters["weight"] = torch.nn.Parameter(
                output_weight.to(self.device), requires_grad=False
            )
        self._give(hidden)
        try:
            return self._body(tokens, output=True)
        finally:
            self._give(None)
            output._parameters["weight"] = before

    def _give(self, hidden: torch.Tensor | None) -> None:
        self._recorders[-1].given = hidden

    def _body(self, tokens: torch.Tensor, output: bool = False) -> torch.Tensor:
        tokens = tokens.to(self.device)
        self._shape = tuple(tokens.shape)
        if output:
            return self.model(tokens, use_cache=False).logits.float()
        base = self.model.base_model
        return base(tokens, use_cache=False).last_hidden_state

    # ---- structure

    def units(self, index: int, hidden: torch.Tensor) -> list[Unit]:
        """Units of block `index`, which must be loaded, in the order in which they run.

        Args:
            hidden: one short sequence, fp32 [1, T, H], for which `embed` was called.
        """
        seen: dict[int, list[tuple[str, torch.nn.Linear]]] = {}
        kept: list[torch.Tensor] = []  # so that no id is used twice

        def note(name: str, layer: torch.nn.Linear) -> Callable[..., None]:
            def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                kept.append(args[0])
                seen.setdefault(id(args[0]), []).append((name, layer))

            return hook

        with hooked(self.linears(index), note):
            self.run(index, hidden)
        return [
            Unit(
                tuple(name for name, _ in layers),
                tuple(layer.out_features for _, layer in layers),
                layers[0][1].in_features,
            )
            for layers in seen.values()
        ]

    def linears(self, index: int) -> list[tuple[str, torch.nn.Linear]]:
        """Linear layers of block `index` by full name."""
        return [
            (f"{self.prefix}.{index}.{name}", module)
            for name, module in self.blocks[index].named_modules()
            if isinstance(module, torch.nn.Linear)
        ]

    @contextmanager
    def watching(self, index: int, units: Sequence[Unit], hook: BlockHook) -> Iterator[None]:
        """Calls `hook` with the input of each unit while block `index` runs."""
        first = {unit.name: unit for unit in units}

        def note(name: str, _: torch.nn.Linear) -> Callable[..., None] | None:
            if name not in first:
                return None
            return lambda _, args: hook(first[name], args[0])

        with hooked(self.linears(index), note):
            yield


@contextmanager
def hooked(
    layers: Sequence[tuple[str, torch.nn.Linear]],
    make: Callable[[str, torch.nn.Linear], Callable[..., Any] | None],
) -> Iterator[None]:
    """Has the hook that `make` returns for a layer, if any, called before the layer runs; what a
    hook returns takes the place of the layer's arguments."""
    handles = []
    for name, layer in layers:
        if hook := make(name, layer):
            handles.append(layer.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _index(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            found.update(dict.fromkeys(reader.keys(), file))
    if not found:
        raise ValueError(f"{folder} has no .safetensors file; convert the checkpoint first")
    return found


def _meta(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have no memory for parameters; buffers are real."""
    register = torch.nn.Module.register_parameter

    def on_meta(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        register(self, name, None if param is None else _meta(param))

    torch.nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def _empty_model(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{folder}: transformers cannot build this model: {error}") from None
    return model.eval().requires_grad_(False)


def _block_list(model: torch.nn.Module, folder: Path) -> tuple[str, torch.nn.ModuleList]:
    """Name and list of decoder blocks: the longest list of modules that hold linear layers."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and any(isinstance(m, torch.nn.Linear) for m in module.modules())
    ]
    if not lists:
        raise ValueError(
            f"{folder}: {type(model).__name__} has no list of decoder blocks; "
            "only --method rtn can quantize it"
        )
    outer = [
        (n, m) for n, m in lists if not any(n != o and n.startswith(f"{o}.") for o, _ in lists)
    ]
    return max(outer, key=lambda found: len(found[1]))
