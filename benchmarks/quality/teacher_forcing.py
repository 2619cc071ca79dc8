# SPDX-License-Identifier: Apache-2.0
"""A vLLM V1 logits processor that makes the engine decode a given text, and measures each step.

    vllm serve MODEL --logits-processors benchmarks.quality.teacher_forcing:TeacherForcing

The real scheduler, KV cache and per-step precision run as for any request; only the choice of the
next token is taken away. Requests say what to decode in `SamplingParams.extra_args` (over HTTP
`vllm_xargs`); other requests are left alone:

    force_id      str: a sequence of the reference
    force_tokens  list[int]: tokens that must follow the prompt
    force_run     str, optional: copied into the records
    force_every   int, optional: of how many forced tokens one is compared and recorded (default: 1,
                  all of them). Comparing takes time, about that of reading the logits eight times;
                  where time is measured too, a sample is enough. Which ones differs by sequence.

Environment: BENCH_REFERENCE names the .npy of reference log-probabilities [tokens, vocabulary],
whose index lies beside it (`benchmarks.quality.reference` writes both); BENCH_RECORD names the
.jsonl to which a line is added per recorded token. Where BENCH_REFERENCE is not set nothing is
compared: any text can be forced, and a line has the token's negative log-likelihood alone.

For one tensor-parallel rank: each rank would write its own lines.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from vllm.v1.sample.logits_processor.interface import LogitsProcessor, MoveDirectionality

from benchmarks.quality.divergence import compare

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

NAME = f"{__name__}:TeacherForcing"
"""As vLLM wants it in `--logits-processors`."""

REFERENCE, RECORD = "BENCH_REFERENCE", "BENCH_RECORD"


class Reference:
    """Log-probabilities of the reference model, mapped from a file.

    Row `start + i` of the sequence with that `start` belongs to its forced token i.
    """

    def __init__(self, path: Path) -> None:
        self.rows: np.ndarray[Any, Any] = np.load(path, mmap_mode="r")
        index = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        self.spans: dict[str, tuple[int, int]] = {
            name: (span["start"], span["tokens"]) for name, span in index["sequences"].items()
        }

    def at(self, places: list[tuple[str, int]]) -> torch.Tensor:
        """fp32 [len(places), vocabulary] of (sequence, position) pairs."""
        rows = [self.spans[name][0] + position for name, position in places]
        return torch.from_numpy(np.stack([self.rows[row] for row in rows])).float()


@lru_cache(maxsize=2)
def open_reference(path: str) -> Reference:
    """The reference at `path`, opened once per process."""
    return Reference(Path(path))


def setting(name: str) -> str:
    """The value of an environment variable that must be set."""
    value = os.environ.get(name, "")
    if not value:
        raise ValueError(f"TeacherForcing needs the environment variable {name}; see its docstring")
    return value


@dataclass(frozen=True)
class Forced:
    """One request's text. `output` is vLLM's own list of its output tokens, which grows."""

    id: str
    run: str
    tokens: list[int]
    output: list[int]
    every: int = 1

    def is_recorded(self, position: int) -> bool:
        """Whether the token at `position` is one of the sample."""
        return (position + zlib.crc32(self.id.encode())) % self.every == 0


class TeacherForcing(LogitsProcessor):
    """Compares each row with the reference, then forces the token that comes next."""

    def __init__(
        self, vllm_config: VllmConfig | None, device: torch.device, is_pin_memory: bool
    ) -> None:
        self._reference = open_reference(path) if (path := os.environ.get(REFERENCE)) else None
        self._record: TextIO = open(setting(RECORD), "a", encoding="utf-8")  # noqa: SIM115
        self._requests: dict[int, Forced] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request (HTTP 400) whose text is not in the reference."""
        extra = sampling_params.extra_args or {}
        if not {"force_id", "force_tokens"} & extra.keys():
            return
        every = extra.get("force_every", 1)
        if type(every) is not int or every < 1:
            raise ValueError(f"vllm_xargs: force_every is {every!r}; give a whole number above 0")
        name, tokens = extra.get("force_id"), extra.get("force_tokens")
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ValueError("vllm_xargs: force_tokens must be a list of token ids")
        if not isinstance(name, str):
            raise ValueError(f"vllm_xargs: force_id is {name!r}; give a name")
        if not (path := os.environ.get(REFERENCE)):
            return
        spans = open_reference(path).spans
        if name not in spans:
            raise ValueError(f"vllm_xargs: force_id is {name!r}, which the reference does not hold")
        if len(tokens) > spans[name][1]:
            raise ValueError(
                f"vllm_xargs: {len(tokens)} force_tokens, but the reference holds "
                f"{spans[name][1]} of {name}"
            )

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests from row to row: removed, then added, then moved, as vLLM asks."""
        if batch_update is None:
            return
        requests = self._requests
        for row in batch_update.removed:
            requests.pop(row, None)
        for row, params, _, output in batch_update.added:
            requests.pop(row, None)
            extra = (params.extra_args or {}) if params is not None else {}
            if "force_tokens" in extra:
                run = str(extra.get("force_run", ""))
                every = extra.get("force_every", 1)
                requests[row] = Forced(extra["force_id"], run, extra["force_tokens"], output, every)
        for source, target, direction in batch_update.moved:
            moving, displaced = requests.pop(source, None), requests.pop(target, None)
            if moving is not None:
                requests[target] = moving
            if displaced is not None and direction == MoveDirectionality.SWAP:
                requests[source] = displaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary]: forced rows become -inf but for the wanted token."""
        active = [
            (row, request, len(request.output))
            for row, request in sorted(self._requests.items())
            if row < len(logits) and len(request.output) < len(request.tokens)
        ]
        if not active:
            return logits
        chosen = [entry for entry in active if entry[1].is_recorded(entry[2])]
        if chosen:
            self._write(chosen, logits)
        rows = torch.tensor([row for row, _, _ in active], device=logits.device)
        wanted = [request.tokens[position] for _, request, position in active]
        logits[rows] = -torch.inf
        logits[rows, torch.tensor(wanted, device=logits.device)] = 0.0
        return logits

    def _write(self, chosen: list[tuple[int, Forced, int]], logits: torch.Tensor) -> None:
        """Add a line for each row, request and position."""
        device = logits.device
        rows = torch.tensor([row for row, _, _ in chosen], device=device)
        columns = torch.tensor([r.tokens[position] for _, r, position in chosen], device=device)
        served = torch.log_softmax(logits[rows].float(), dim=-1)
        measured = {"nll": -served.gather(1, columns.unsqueeze(1)).squeeze(1)}
        if self._reference is not None:
            places = [(request.id, position) for _, request, position in chosen]
            reference = self._reference.at(places).to(device)
            if reference.shape != served.shape:
                raise ValueError(
                    f"the reference has a vocabulary of {reference.shape[1]}, the served model one "
                    f"of {served.shape[1]}; compute the reference from the model that is served"
                )
            kl, same = compare(reference, served)
            nll_reference = -reference.gather(1, columns.unsqueeze(1)).squeeze(1)
            top = reference.amax(-1).exp()
            measured = {"kl": kl, "top1": same, **measured}
            measured |= {"nll_reference": nll_reference, "reference_top": top}
        lists = {name: values.tolist() for name, values in measured.items()}
        for i, (_, request, position) in enumerate(chosen):
            line = {"run": request.run, "id": request.id, "position": position}
            line |= {name: values[i] for name, values in lists.items()}
            self._record.write(json.dumps(line) + "\n")
        self._record.flush()
