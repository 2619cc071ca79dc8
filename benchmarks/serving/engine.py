# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine in a process of its own, told what to do over a pipe.

    python -m benchmarks.serving.engine SPEC

SPEC is the JSON of an `EngineSpec`. Commands are read from standard input, one JSON object a line;
each is answered by one line on what was standard output at the start (vLLM's own output goes to
standard error). The process ends with its input, or with the process that started it. The engine
core runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0) and computes on all cores it may use.

    {"do": "decode", "prompts": [[ids]], "tokens": n, "change": {} | null}
    {"do": "answer", "prompts": [[ids]], "tokens": n, "temperature": t, "seed": n, "change": {}}
    {"do": "generate", "prompts": [[ids]], "tokens": n, "stop": [text], "change": {} | null}
    {"do": "prefill", "prompt": [ids], "change": {} | null}
    {"do": "force", "run": name, "sequences": file, "reference": file, "record": file, "rows": n,
     "change": {} | null}
    {"do": "profile", "prompts": [[ids]], "tokens": n, "trace_tokens": n, "change": {} | null}

`change` is what flexquant is told first, as in `POST /v1/flexquant`; null for other engines.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

ENVIRON = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Of every engine."""

PR_SET_PDEATHSIG = 1

FRESH = {"policy": "budget", "budget": 1.0, "signal": "probe", "target_ms": None}
"""A budget like no other: an account that is asked for anything else afterwards begins anew."""

COMMANDS = ("decode", "answer", "generate", "prefill", "force", "profile", "drafts")

MAX_ROWS = 16
"""Most requests at a time, where a benchmark says nothing else."""

MAX_SEQS = 32
"""Most that an engine takes."""

MAX_MODEL_LEN = 1024


@dataclass(frozen=True)
class EngineSpec:
    """What to start: `arguments` go to `vllm.LLM`, `environ` is set before vLLM is imported.

    command: what is run, if not this module by this Python; it gets the specification as well.
    """

    name: str
    model: str
    dtype: str = "bfloat16"
    compiled: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Engine:
    """The engine of this process, stepped by hand."""

    def __init__(self, spec: EngineSpec) -> None:
        self._counted: dict[str, float] = {}
        from vllm import LLM
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            raise SystemExit("this benchmark measures vLLM's CPU backend, which is not installed")
        self.spec = spec
        self.llm = LLM(
            spec.model,
            dtype=spec.dtype,
            enforce_eager=not spec.compiled,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_SEQS,
            # prompts come again each round; a cached one would cost nothing
            enable_prefix_caching=False,
            seed=0,
            **spec.arguments,
        )
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self._requests = 0

    def facts(self) -> dict[str, Any]:
        """What runs here."""
        import torch

        config = self.llm.llm_engine.vllm_config
        return {
            "threads": torch.get_num_threads(),
            "cores": sorted(os.sched_getaffinity(0)),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "compilation": config.compilation_config.mode.name,
            "kernels": dict(Counter(linear_kernels(self.runner.model))),
        }

    def adopt(self, change: dict[str, Any] | None) -> None:
        """Take up a policy, with an account of its own; None: not a flexquant engine."""
        if change is None:
            return
        if change.get("policy") == "budget":
            self.set_policy(FRESH)
        self.set_policy(change)

    def set_policy(self, change: dict[str, Any]) -> None:
        """As `POST /v1/flexquant`, from the next step on."""
        if reason := self.llm.collective_rpc("flexquant_change", args=(change,))[0]:
            raise RuntimeError(f"{self.spec.name} refused {change}: {reason}")

    def steps(self, prompts: Sequence[Sequence[int]], tokens: int) -> Iterator[float]:
        """Generate `tokens` after each of `prompts`; yields the seconds of each engine step.

        Raises:
            RuntimeError: the prompts were not all taken in by the first step, or a request ended
                early, so that the steps are not one of prompts and then only decode steps.
        """
        from vllm import SamplingParams, TokensPrompt

        engine = self.llm.llm_engine
        # not detokenized: under `vllm serve` another process does that
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        count, began = 0, time.perf_counter()
        for prompt in prompts:
            self._requests += 1
            engine.add_request(
                str(self._requests), TokensPrompt(prompt_token_ids=list(prompt)), params
            )
        while engine.has_unfinished_requests():
            engine.step()
            ended = time.perf_counter()
            yield ended - began
            count, began = count + 1, time.perf_counter()
        if count != tokens:
            raise RuntimeError(f"{count} steps for {tokens} tokens of {len(prompts)} requests")

    # ---- commands

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        temperature: float,
        seed: int,
        change: dict[str, Any],
    ) -> dict[str, Any]:
        """Answer prompts at a time, after a change of policy; steps may give several tokens.

        Returns:
            tokens of each answer; seconds from the first step in which all had begun to the end,
            and how many tokens came in them.
        """
        from vllm import SamplingParams, TokensPrompt

        if change:
            self.set_policy(change)
        engine, answers = self.llm.llm_engine, {}
        for i, prompt in enumerate(prompts):
            self._requests += 1
            params = SamplingParams(
                temperature=temperature,
                seed=1 + seed + i if temperature else None,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
            )
            name = str(self._requests)
            engine.add_request(name, TokensPrompt(prompt_token_ids=list(prompt)), params)
            answers[name] = list[int]()
        began, had = 0.0, 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                answers[output.request_id] = list(output.outputs[0].token_ids)
            if not began and all(answers.values()):
                began, had = time.perf_counter(), sum(map(len, answers.values()))
        given = sum(map(len, answers.values())) - had
        return {
            "answers": list(answers.values()),
            "seconds": time.perf_counter() - began,
            "tokens": given,
        }

    def decode(
        self, prompts: Sequence[Sequence[int]], tokens: int, change: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Seconds of the decode steps, after a few that warm the caches.

        With a `change` also `mean_bits`, the mean width of these steps over all weights.
        """
        self.adopt(change)
        list(self.steps(prompts, 4))
        self._bits(change)
        steps = list(self.steps(prompts, tokens))[1:]
        return {"steps": steps} | self._bits(change)

    def _bits(self, change: dict[str, Any] | None) -> dict[str, Any]:
        """`mean_bits` of the decode steps since this was asked last; nothing without a change."""
        if change is None:
            return {}
        counts = self.llm.collective_rpc("flexquant_snapshot", args=(True,))[0]["counters"]
        before, self._counted = self._counted, counts
        bits, steps = (
            counts[name] - before.get(name, 0) for name in ("decode_step_bits", "decode_steps")
        )
        return {"mean_bits": bits / max(steps, 1)}

    def drafts(self) -> dict[str, Any]:
        """What the engine's status says of its drafts; empty where it does not speculate."""
        return self.llm.collective_rpc("flexquant_snapshot", args=(True,))[0]["speculation"] or {}

    def prefill(self, prompt: Sequence[int], change: dict[str, Any] | None) -> dict[str, Any]:
        """Seconds from the request to its first token, three times after one that warms."""
        self.adopt(change)
        runs = [list(self.steps([prompt], 1)) for _ in range(4)]
        return {"seconds": [seconds for (seconds,) in runs[1:]]}

    def force(
        self,
        run: str,
        sequences: str,
        reference: str,
        record: str,
        rows: int,
        change: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Decode the given text, and record the KL of each token; `mean_bits` as `decode`.

        The processor that does so is taken in for this and taken out again, so that it costs
        nothing where time is measured.
        """
        import torch

        from benchmarks.quality import teacher_forcing
        from benchmarks.quality.engine import decode
        from benchmarks.quality.sequences import load_sequences

        self.adopt(change)
        os.environ |= {teacher_forcing.REFERENCE: reference, teacher_forcing.RECORD: record}
        config = self.llm.llm_engine.vllm_config
        processor = teacher_forcing.TeacherForcing(config, torch.device("cpu"), False)
        processors = self.runner.input_batch.logitsprocs.non_argmax_invariant
        processors.append(processor)
        self._bits(change)
        try:
            seconds = decode(self.llm, run, load_sequences(Path(sequences)), rows)
            return {"seconds": seconds} | self._bits(change)
        finally:
            processors.remove(processor)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        stop: list[str],
        change: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Greedy answers as text, at most so many tokens each, up to one of `stop`."""
        from vllm import SamplingParams, TokensPrompt

        self.adopt(change)
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
            SamplingParams(temperature=0.0, max_tokens=tokens, stop=stop or None),
            use_tqdm=False,
        )
        return {"texts": [output.outputs[0].text for output in outputs]}

    def profile(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        trace_tokens: int,
        change: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """As `benchmarks.serving.owners.profile`."""
        from benchmarks.serving import owners

        self.adopt(change)
        return owners.profile(self, prompts, tokens, trace_tokens)


def linear_kernels(model: Any) -> list[str]:
    """Of each linear layer and the output layer, what computes it, in words."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    names = []
    for module in model.modules():
        if isinstance(module, LinearBase):
            names.append(kernel_name(module))
        elif isinstance(module, ParallelLMHead):
            names.append(f"output layer: {kernel_name(module)}")
    return names


def kernel_name(layer: Any) -> str:
    """Class of the layer's method or kernel, and the variant that it chose while loading."""
    method = layer.quant_method
    kernel = getattr(getattr(layer, "scheme", None), "kernel", None)
    parts = [type(method).__name__ if kernel is None else type(kernel).__name__]
    if kernel is not None and hasattr(kernel, "linear_method"):
        parts.append(kernel.linear_method.__name__)
    if hasattr(layer, "use_w4a8"):
        parts.append("W4A8" if layer.use_w4a8 else f"W4A16 {layer.isa_hint}")
    if hasattr(layer, "cpu_linear"):
        code = getattr(layer.cpu_linear, "__code__", None)
        # a lambda around the operator, whose name is the last that it looks up
        name = code.co_names[-1] if code and code.co_names else layer.cpu_linear.__name__
        parts.append(name)
    if hasattr(layer, "flexquant_width"):
        parts.append(method.config.table.layers[method.index].kernel)
        parts.append(f"groups of {method.group_size}")
    return ", ".join(parts)


def serve(engine: Any, names: Sequence[str], commands: TextIO, answers: TextIO) -> None:
    """Answer commands until there are no more.

    Args:
        names: methods of `engine` that are commands; `facts` is said first.
    """

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    handlers: dict[str, Callable[..., dict[str, Any]]] = {n: getattr(engine, n) for n in names}
    say(engine.facts())
    for line in commands:
        command = json.loads(line)
        say(handlers[command.pop("do")](**command))


def run_engine(make: Callable[[EngineSpec], Any], names: Sequence[str]) -> None:
    """Start the engine of the specification on the command line, and serve."""
    # a stopped process would not notice the end of its input
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    spec = EngineSpec(**json.loads(sys.argv[1]))
    os.environ |= ENVIRON | spec.environ
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(make(spec), names, sys.stdin, answers)


if __name__ == "__main__":
    run_engine(Engine, COMMANDS)
