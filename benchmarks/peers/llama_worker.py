# SPDX-License-Identifier: Apache-2.0
"""llama.cpp in a process of its own, told what to do as `benchmarks.serving.engine` is.

    PYTHON llama_worker.py SPEC
    PYTHON llama_worker.py quantize SOURCE TARGET TYPE

PYTHON has llama-cpp-python; of this repository only what needs no package is imported. Sequences
that are decoded together are one batch of `llama_decode`, each with a stream of the cache of its
own, on all cores that the process may use. Everything else is as llama.cpp has it by default.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.quality.sequences import load_sequences
from benchmarks.serving.engine import EngineSpec, run_engine

MAX_SEQUENCES, CELLS = 32, 512
"""Sequences at a time, and tokens of each."""


class LlamaEngine:
    """One model of llama.cpp and a context for `MAX_SEQUENCES`."""

    def __init__(self, spec: EngineSpec) -> None:
        self.threads = len(os.sched_getaffinity(0))
        quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self._quiet = quiet  # must live as long as it may be called
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            spec.model.encode(), llama_cpp.llama_model_default_params()
        )
        if not model:
            raise SystemExit(f"llama.cpp cannot load {spec.model}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = MAX_SEQUENCES * CELLS
        settings.n_seq_max = MAX_SEQUENCES
        settings.n_batch = settings.n_ubatch = 2048
        settings.n_threads = settings.n_threads_batch = self.threads
        self.context = llama_cpp.llama_init_from_model(model, settings)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context of {settings.n_ctx} tokens")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)
        self.room = settings.n_batch

    def facts(self) -> dict[str, Any]:
        """What runs here."""
        return {
            "threads": self.threads,
            "cores": sorted(os.sched_getaffinity(0)),
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "kernels": {llama_cpp.llama_print_system_info().decode().strip(): 1},
        }

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def _compute(self, tokens: Sequence[tuple[int, int, int, bool]]) -> list[np.ndarray[Any, Any]]:
        """Run (token, position, sequence, whether its logits are wanted); logits fp32 in order."""
        if len(tokens) > self.room:
            raise ValueError(f"{len(tokens)} tokens at a time; llama.cpp was given {self.room}")
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.logits[i] = 1, wanted
            batch.seq_id[i][0] = sequence
        if status := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode ended with {status}")
        return [
            np.ctypeslib.as_array(
                llama_cpp.llama_get_logits_ith(self.context, i), (self.vocabulary,)
            )
            for i, (_, _, _, wanted) in enumerate(tokens)
            if wanted
        ]

    def _prompts(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray[Any, Any]]:
        """Take in prompts; the logits after each."""
        return self._compute(
            [
                (token, i, sequence, i == len(prompt) - 1)
                for sequence, prompt in enumerate(prompts)
                for i, token in enumerate(prompt)
            ]
        )

    def steps(self, prompts: Sequence[Sequence[int]], tokens: int) -> Iterator[float]:
        """Generate greedily; the seconds of each step, the first of which takes in the prompts."""
        self._clear()
        began = time.perf_counter()
        chosen = [int(logits.argmax()) for logits in self._prompts(prompts)]
        yield time.perf_counter() - began
        for step in range(tokens - 1):
            began = time.perf_counter()
            rows = [(token, len(prompts[i]) + step, i, True) for i, token in enumerate(chosen)]
            chosen = [int(logits.argmax()) for logits in self._compute(rows)]
            yield time.perf_counter() - began

    # ---- commands; `change` is for flexquant

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int, change: None) -> dict[str, Any]:
        """Seconds of the decode steps, after a few that warm the caches."""
        list(self.steps(prompts, 4))
        return {"steps": list(self.steps(prompts, tokens))[1:]}

    def prefill(self, prompt: Sequence[int], change: None) -> dict[str, Any]:
        """Seconds from the request to its first token, three times after one that warms."""
        runs = [list(self.steps([prompt], 1)) for _ in range(4)]
        return {"seconds": [seconds for (seconds,) in runs[1:]]}

    def force(
        self, run: str, sequences: str, reference: str, record: str, rows: int, change: None
    ) -> dict[str, Any]:
        """Decode the given text, and record the KL of each token."""
        truth = np.load(reference, mmap_mode="r")
        spans = json.loads(Path(reference).with_suffix(".json").read_text())["sequences"]
        began = time.monotonic()
        everything = load_sequences(Path(sequences))
        with open(record, "a", encoding="utf-8") as lines:
            for start in range(0, len(everything), rows):
                part = everything[start : start + rows]
                self._clear()
                found = self._prompts([s.prompt for s in part])
                for position in range(max(len(s.forced) for s in part)):
                    own = [s for s in part if position < len(s.forced)]
                    for sequence, logits in zip(own, found, strict=True):
                        row = truth[spans[sequence.id]["start"] + position]
                        line = {"run": run, "id": sequence.id, "position": position}
                        line |= compared(row, logits, sequence.forced[position])
                        lines.write(json.dumps(line) + "\n")
                    tokens = [
                        (s.forced[position], len(s.prompt) + position, i, True)
                        for i, s in enumerate(part)
                        if position + 1 < len(s.forced)
                    ]
                    found = self._compute(tokens) if tokens else []
        return {"seconds": time.monotonic() - began}


def compared(
    reference: np.ndarray[Any, Any], logits: np.ndarray[Any, Any], token: int
) -> dict[str, Any]:
    """As `benchmarks.quality.teacher_forcing` records a token.

    Args:
        reference: log-probabilities [vocabulary]. logits: [vocabulary]. token: what follows.
    """
    wide = logits.astype(np.float64)
    served = wide - wide.max()
    served -= np.log(np.exp(served).sum())
    truth = reference.astype(np.float64)
    p = np.exp(truth)
    return {
        "kl": float(np.where(p > 0, p * (truth - served), 0.0).sum()),
        "top1": bool(truth.argmax() == served.argmax()),
        "nll": float(-served[token]),
        "nll_reference": float(-truth[token]),
        "reference_top": float(p.max()),
    }


def quantize(source: str, target: str, kind: int) -> None:
    """Write the GGUF file `source` as type `kind`."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = kind, len(os.sched_getaffinity(0))
    if status := llama_cpp.llama_model_quantize(
        source.encode(), target.encode(), ctypes.byref(settings)
    ):
        raise SystemExit(f"llama_model_quantize ended with {status}")


if __name__ == "__main__":
    if sys.argv[1] == "quantize":
        quantize(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        run_engine(LlamaEngine, ("decode", "prefill", "force"))
