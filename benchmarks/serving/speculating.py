# SPDX-License-Identifier: Apache-2.0
"""An engine that was started for self-speculation, driven step by step: with drafts and without.

The speed of a run is that of its steps of decoding, all requests running: from the first step
after all prompts to the one that has given the tokens asked for, after which the requests are
ended. Each such step has the time of the drafts that follow it, so that drafting is in it as often
as verifying.

What a gate learns (times, chances) is its own: it is put aside while another runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.serving.drafts import between, read_counts
from benchmarks.serving.engine import MAX_MODEL_LEN, MAX_ROWS, Engine, EngineSpec
from benchmarks.serving.equality import Answer
from benchmarks.serving.kinds import Prompt

PLAIN: dict[str, Any] = {"speculate": 0}

TRACED = 4096
LEARNED = ("times", "greedy", "sampled")
"""Of `Speculation`: what it learns while it runs."""


@dataclass
class Run:
    """Seconds and tokens of the steps of decoding, and what was counted in them."""

    seconds: float
    tokens: int
    counts: dict[str, Any]
    cost: dict[str, Any] | None = None

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass
class Crowd:
    """Requests that run, and the tokens of each so far."""

    given: dict[str, int] = field(default_factory=dict)

    def tokens(self) -> int:
        return sum(self.given.values())

    def answering(self) -> bool:
        return all(self.given.values())


class SpeculatingEngine(Engine):
    """Started for drafts of at most `most` tokens."""

    def __init__(self, model: str, most: int, dtype: str) -> None:
        options = {"policy": "static", "speculate": most, "trace_steps": TRACED}
        super().__init__(
            EngineSpec(
                "flexquant", model, dtype, arguments={"additional_config": {"flexquant": options}}
            )
        )
        self.most = most
        self.planner = self.runner.vllm_config.quant_config.planner
        self.speculation = self.runner.drafter.speculation
        if self.speculation is None:
            raise SystemExit(f"{model} was started without self-speculation; is it flexquant's?")
        # by name: no update goes back to what was not named
        self.usual = {"draft_level": self.speculation.level}
        self._learned: dict[str, dict[str, Any]] = {}

    def use(self, options: dict[str, Any], learned: str | None = None) -> None:
        """Take up options of speculation, at the level of old if they name none.

        Args:
            learned: name of what is learned from now on, and was before under this name.
        """
        if not options.keys() & {"draft_level", "draft_width"}:
            options = self.usual | options
        control = self.speculation.control
        # an update may forget what is in the table
        control.times = {}
        if learned is not None and learned not in self._learned:
            # any other drafts: an update that changes nothing forgets nothing
            self.set_policy({"draft_width": self.planner.options.layout.widths[0]})
            self.set_policy({"draft_level": len(self.planner.model.ladder) - 1})
        self.set_policy(options)
        if learned is None:
            return
        if learned not in self._learned:
            control.times = {}
            self._learned[learned] = {name: getattr(control, name) for name in LEARNED}
        for name, value in self._learned[learned].items():
            setattr(control, name, value)

    def forget(self, learned: str) -> None:
        """What was learned under this name."""
        self._learned.pop(learned, None)

    # ---- requests

    def add(
        self, crowd: Crowd, prompt: Sequence[int], tokens: int, temperature: float, seed: int
    ) -> str:
        """A request of at most so many tokens; returns its name."""
        from vllm import SamplingParams, TokensPrompt

        self._requests += 1
        name = f"r{self._requests}"
        params = SamplingParams(
            temperature=temperature,
            seed=1 + seed if temperature else None,
            max_tokens=min(tokens, MAX_MODEL_LEN - len(prompt) - 1),
            ignore_eos=True,
            detokenize=False,
        )
        self.llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=list(prompt)), params)
        crowd.given[name] = 0
        return name

    def step(self, crowd: Crowd) -> None:
        """One step; the requests' tokens are counted."""
        for output in self.llm.llm_engine.step():
            crowd.given[output.request_id] = len(output.outputs[0].token_ids)

    def end(self, crowd: Crowd, names: Sequence[str] | None = None) -> None:
        """End requests, all by default."""
        names = list(crowd.given) if names is None else list(names)
        self.llm.llm_engine.abort_request(names)
        for name in names:
            del crowd.given[name]

    def until(self, crowd: Crowd, tokens: int) -> Iterator[None]:
        """Steps until the requests have so many tokens more together.

        Raises:
            RuntimeError: a request ended before.
        """
        wanted = crowd.tokens() + tokens
        while crowd.tokens() < wanted:
            if not self.llm.llm_engine.has_unfinished_requests():
                raise RuntimeError(f"requests ended {wanted - crowd.tokens()} tokens too early")
            self.step(crowd)
            yield

    def prompted(self, crowd: Crowd) -> None:
        """Run the steps of the prompts."""
        while not crowd.answering():
            self.step(crowd)

    def timed(self, crowd: Crowd, tokens: int) -> Run:
        """Decode until the requests have so many tokens more together."""
        self.prompted(crowd)
        before, had = read_counts(self.speculation), crowd.tokens()
        began = time.perf_counter()
        for _ in self.until(crowd, tokens):
            pass
        seconds = time.perf_counter() - began
        counts = between(before, read_counts(self.speculation))
        return Run(seconds, crowd.tokens() - had, counts, self.cost(len(crowd.given)))

    def run(
        self,
        options: dict[str, Any],
        prompts: Sequence[Sequence[int]],
        tokens: int,
        temperature: float,
        seed: int = 0,
        learned: str | None = None,
    ) -> Run:
        """Answer prompts at the same time, `tokens` to each in the mean."""
        self.use(options, learned)
        crowd = Crowd()
        room = (tokens + 2) * (self.most + 1)
        for i, prompt in enumerate(prompts):
            self.add(crowd, prompt, room, temperature, seed + i)
        found = self.timed(crowd, tokens * len(prompts))
        self.end(crowd)
        return found

    def cost(self, sequences: int) -> dict[str, Any] | None:
        """The entry of the table of costs for so many sequences."""
        wanted = 1 << max(sequences - 1, 0).bit_length()
        control = self.speculation.control
        for entry in control.cost_table():
            if (entry["sequences"], entry["sampled"]) == (wanted, control.sampling):
                return dict(entry)
        return None

    # ---- answers

    def answers(
        self, prompts: Sequence[Prompt], tokens: int, drafts: bool, temperature: float
    ) -> list[Answer]:
        """Answers to prompts at a time, of exactly so many tokens. With log-probabilities of the
        two best where they are greedy without drafts, of its own where they are sampled."""
        from vllm import SamplingParams, TokensPrompt

        self.use({"speculate": self.most, "draft_gate": "fixed"} if drafts else PLAIN)
        wanted = 0 if temperature else None if drafts else 2
        params = [
            SamplingParams(
                temperature=temperature,
                # other draws with drafts than without, so that the means are independent
                seed=1 + 2 * i + drafts if temperature else None,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                logprobs=wanted,
            )
            for i in range(len(prompts))
        ]
        found = self.llm.generate(
            [TokensPrompt(prompt_token_ids=p.ids) for p in prompts], params, use_tqdm=False
        )
        return [
            Answer(
                list(answer.outputs[0].token_ids),
                [
                    {token: entry.logprob for token, entry in position.items()}
                    for position in answer.outputs[0].logprobs or ()
                ],
            )
            for answer in found
        ]

    def trace_answer(
        self, options: dict[str, Any], prompt: Sequence[int], tokens: int, learned: str
    ) -> list[dict[str, Any]]:
        """The steps of one greedy answer: tokens that each gave, entropies in nats of the drafts
        that it verified, and how many of them it kept."""
        self.use(options, learned)
        crowd = Crowd()
        name = self.add(crowd, prompt, tokens, 0.0, 0)
        self.prompted(crowd)
        steps: list[dict[str, Any]] = []
        verified = self.speculation.counts.verified
        while crowd.given[name] < tokens:
            had = crowd.given[name]
            self.step(crowd)
            now = self.speculation.counts.verified
            steps.append({"tokens": crowd.given[name] - had, "drafted": now > verified})
            verified = now
        traced = self.llm.collective_rpc("flexquant_drafts")[0]
        return with_drafts(steps, [e for e in traced if e["request"].startswith(f"{name}-")])

    def facts(self) -> dict[str, Any]:
        """As of any engine, with what the drafts take of memory."""
        config = self.llm.llm_engine.vllm_config
        return super().facts() | {
            "memory": {
                "drafts": "use the served model's weights and its KV cache",
                "kv_cache_blocks": config.cache_config.num_gpu_blocks,
                "kv_cache_block_tokens": config.cache_config.block_size,
                "rows": MAX_ROWS,
            }
        }


def with_drafts(
    steps: Sequence[dict[str, Any]], traced: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Steps, with the entry of the trace of each that verified drafts.

    Raises:
        ValueError: the trace has fewer entries than there were such steps.
    """
    entries = iter(traced)
    missing = sum(step["drafted"] for step in steps) - len(traced)
    if missing > 0:
        raise ValueError(f"the trace lacks {missing} steps that verified drafts")
    found = []
    for step in steps:
        entry = next(entries) if step["drafted"] else {"nats": [], "kept": 0}
        found.append({"tokens": step["tokens"], "nats": entry["nats"], "kept": entry["kept"]})
    return found
