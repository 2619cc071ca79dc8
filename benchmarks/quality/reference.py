# SPDX-License-Identifier: Apache-2.0
"""What the unquantized model says of each token, and what plain planes at each width would.

    python -m benchmarks.quality.reference --model FOLDER --sequences FILE --out FOLDER

writes `reference.npy`, fp32 log-probabilities [tokens, vocabulary] of all forced tokens from
transformers in fp32 on the CPU, and `reference.json`, its index. With `--widths`, also
`planes.json`: the same model with every linear layer replaced by its dequantized planes, compared
token by token with the reference. Runs as a process of its own, so that engines start from one
that has used no threads of torch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from benchmarks.quality.divergence import compare
from benchmarks.quality.sequences import FIRST_SCORED, TokenSequence, load_sequences

GROUP_SIZE = 64
WEIGHTS_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(model: str) -> Any:
    """The unquantized checkpoint in fp32 on the CPU."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def log_probabilities(model: Any, sequence: TokenSequence) -> torch.Tensor:
    """fp32 [forced tokens, vocabulary], row i predicting forced token i."""
    with torch.inference_mode():
        logits = model(torch.tensor([sequence.tokens]), use_cache=False).logits[0]
        first = len(sequence.prompt) - 1
        rows = logits[first : first + len(sequence.forced)]
        return torch.log_softmax(rows.float(), dim=-1)


def linear_weights(model: Any) -> int:
    """Weights of all linear layers, the output layer among them."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))


def write_reference(
    model: Any, sequences: Sequence[TokenSequence], out: Path, progress: Progress
) -> np.ndarray[Any, Any]:
    """Write `reference.npy` and its index into `out`; returns the mapped log-probabilities."""
    out.mkdir(parents=True, exist_ok=True)
    spans, start = {}, 0
    for sequence in sequences:
        spans[sequence.id] = {"start": start, "tokens": len(sequence.forced)}
        start += len(sequence.forced)
    shape = (start, model.config.vocab_size)
    rows = np.lib.format.open_memmap(
        out / "reference.npy", mode="w+", dtype=np.float32, shape=shape
    )
    for sequence in progress.track(sequences, description="reference, fp32"):
        span = spans[sequence.id]
        rows[span["start"] : span["start"] + span["tokens"]] = log_probabilities(model, sequence)
    rows.flush()
    index = {"linear_weights": linear_weights(model), "sequences": spans}
    (out / "reference.json").write_text(json.dumps(index), encoding="utf-8")
    return rows


class PlanesLinear(torch.nn.Module):
    """A linear layer computed from planes: `width` may be set anew before each forward pass.

    Weights are dequantized by the reference implementation; `int8` quantizes activations as the
    native kernel does, group by group, and keeps everything else in fp32.
    """

    def __init__(self, linear: torch.nn.Linear, group_size: int, dtype: torch.dtype) -> None:
        from flexquant_kernels.pack import pack_planes
        from vllm_flexquant.format.layout import PlaneLayout
        from vllm_flexquant.quantize.rtn import quantize_rtn

        super().__init__()
        self.layout, self.group_size = PlaneLayout(), group_size
        codes, self.scales = quantize_rtn(linear.weight.data.to(dtype), self.layout, group_size)
        self.planes = pack_planes(codes, self.layout.planes)
        self.rows, self.bias = linear.out_features, linear.bias
        self.int8 = False
        self.weight = torch.empty(0)

    def set_width(self, width: int) -> None:
        """Dequantize at `width` bits."""
        from flexquant_kernels.reference import dequantize

        self.weight = dequantize(
            self.planes, self.scales, self.layout.planes, width, self.group_size, self.rows
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [..., K] -> [..., N]."""
        if self.int8:
            from flexquant_kernels.reference import quantize_activations

            codes, scale = quantize_activations(x.reshape(-1, x.shape[-1]), self.group_size)
            x = (codes.float() * scale.unsqueeze(-1)).view(x.shape)
        return torch.nn.functional.linear(x, self.weight, self.bias)


def use_planes(model: Any, dtype: torch.dtype, progress: Progress) -> list[PlanesLinear]:
    """Put planes in place of every linear layer that has a group size; embeddings stay.

    Args:
        dtype: what weights are rounded to before they are quantized, that of the served model.
    """
    from vllm_flexquant.format.layout import choose_group_size

    found = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    layers = []
    for name in progress.track(found, description="quantizing"):
        linear = model.get_submodule(name)
        group_size = choose_group_size(linear.in_features, GROUP_SIZE)
        if group_size is not None:
            layers.append(PlanesLinear(linear, group_size, dtype))
            model.set_submodule(name, layers[-1])
    return layers


def planes_reference(
    model: Any,
    reference: np.ndarray[Any, Any],
    sequences: Sequence[TokenSequence],
    widths: Sequence[int],
    dtype: torch.dtype,
    progress: Progress,
) -> dict[str, dict[str, dict[str, Any]]]:
    """KL to the reference of the plain implementation, at each uniform width.

    `model` is changed on the way. Round-to-nearest planes 4|2|2, scales per width, groups of at
    most 64, the output layer included.

    Returns:
        By width and then by activations (`float` or `int8`): `kl` (nats) and `top1` of each scored
        token, in the order of the sequences.
    """
    layers = use_planes(model, dtype, progress)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for width in widths:
        for layer in layers:
            layer.set_width(width)
        for int8 in (False, True):
            for layer in layers:
                layer.int8 = int8
            name = "int8" if int8 else "float"
            compared = _compare(model, reference, sequences)
            kl, top1 = [], []
            for part_kl, part_top1 in progress.track(
                compared, total=len(sequences), description=f"planes, {width} bits, {name}"
            ):
                kl += part_kl
                top1 += part_top1
            results.setdefault(str(width), {})[name] = {"kl": kl, "top1": top1}
    return results


def _compare(
    model: Any, reference: np.ndarray[Any, Any], sequences: Sequence[TokenSequence]
) -> Iterator[tuple[list[float], list[bool]]]:
    """KL and top-1 agreement of the scored tokens, sequence by sequence."""
    start = 0
    for sequence in sequences:
        stop = start + len(sequence.forced)
        truth = torch.from_numpy(np.array(reference[start + FIRST_SCORED : stop]))
        kl, same = compare(truth, log_probabilities(model, sequence)[FIRST_SCORED:])
        start = stop
        yield kl.tolist(), same.tolist()


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description="Compute reference log-probabilities.")
    parser.add_argument("--model", required=True, help="checkpoint folder or name")
    parser.add_argument("--sequences", type=Path, required=True, help="from save_sequences")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--widths", type=int, nargs="*", default=[], help="also compare planes")
    parser.add_argument(
        "--weights-dtype", choices=sorted(WEIGHTS_DTYPES), default="bfloat16", help="before planes"
    )
    options = parser.parse_args()
    sequences = load_sequences(options.sequences)
    with Progress() as progress:
        model = load_model(options.model)
        reference = write_reference(model, sequences, options.out, progress)
        if options.widths:
            dtype = WEIGHTS_DTYPES[options.weights_dtype]
            results = planes_reference(model, reference, sequences, options.widths, dtype, progress)
            (options.out / "planes.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
