# SPDX-License-Identifier: Apache-2.0
"""Serve a real model at switching precision and show what happens.

    python -m demo.run [--model NAME_OR_PATH] [--out FOLDER] [--fast]

Computes what the unquantized model says of a text, then serves it twice: without flexquant, in
the dtype that one would serve unquantized on this CPU, and with `--quantization flexquant`. Both
servers are up at once and take turns. The policy of the second is changed while it serves: all
layers at 8, 6 and 4 bits, and by entropy. The first server and each policy answer the same dozen
chat requests and decode the same text. The results: a table, a picture of the entropy run, and
all numbers as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import openai
from rich.console import Console

from benchmarks import trace
from benchmarks.provenance import hash_model, provenance, write_json
from benchmarks.quality.sequences import (
    TEXT,
    TokenSequence,
    cut_text,
    read_records,
    save_sequences,
    scored,
    summarise,
)
from benchmarks.serving.configurations import UNQUANTIZED, unquantized
from demo import report
from demo.client import MODEL, ChatRun, Client
from demo.get_model import ModelError, get_model
from demo.live import LiveView
from demo.plot import plot_run
from demo.prompts import PROMPTS
from demo.server import ROOT, ServerError, VllmServer
from vllm_flexquant.format.checkpoint import SIDECAR

PROCESSOR = "benchmarks.quality.teacher_forcing:TeacherForcing"
POLICIES: dict[str, dict[str, Any]] = {
    "static 8": {"policy": "static", "width": 8},
    "static 6": {"policy": "static", "width": 6},
    "static 4": {"policy": "static", "width": 4},
    "entropy": {"policy": "entropy"},
}
TRACE_STEPS = 4000
KNOWN_ERRORS = (ModelError, ServerError, ValueError, OSError, subprocess.SubprocessError)
ARGUMENTS = (
    *("--served-model-name", MODEL, "--max-model-len", "1024"),
    *("--max-num-seqs", "16", "--enforce-eager", "--logits-processors", PROCESSOR),
    # a cached prefix would bring the keys and values of one policy into another
    *("--no-enable-prefix-caching", "--disable-uvicorn-access-log"),
)


@dataclass
class Demo:
    """One run: what it works on and what it found.

    baseline: name of the unquantized engine that speeds are compared with.
    """

    baseline: str
    model: str
    served: str
    out: Path
    work: Path
    console: Console
    sequences: list[TokenSequence]
    templated: bool
    max_tokens: int
    rounds: int
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    # of the last chat run, which is one under policy entropy
    steps: list[dict[str, Any]] = field(default_factory=list)
    answer: str = ""
    start_seconds: dict[str, float] = field(default_factory=dict)
    key: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)

    def compute_reference(self) -> int:
        """Write the reference's log-probabilities; returns the weights of all linear layers."""
        save_sequences(self.work / "sequences.json", self.sequences)
        command = [sys.executable, "-m", "benchmarks.quality.reference", "--model", self.model]
        command += ["--sequences", str(self.work / "sequences.json"), "--out", str(self.work)]
        subprocess.run(command, cwd=ROOT, check=True)
        index = json.loads((self.work / "reference.json").read_text(encoding="utf-8"))
        return int(index["linear_weights"])

    def servers(self) -> tuple[VllmServer, VllmServer]:
        """Without flexquant and with it, not started; both teacher-force and record."""
        benchmark = {
            "BENCH_REFERENCE": str(self.work / "reference.npy"),
            "BENCH_RECORD": str(self.work / "records.jsonl"),
        }
        arguments = [*ARGUMENTS, "--dtype", UNQUANTIZED[self.baseline]]
        disabled = benchmark | {"VLLM_FLEXQUANT_DISABLE": "1"}
        enabled = benchmark | {
            "VLLM_PLUGINS": "flexquant",  # vLLM serves only the endpoints of plugins named here
            "VLLM_FLEXQUANT_OPERATOR_KEY": self.key,
            "VLLM_FLEXQUANT_TRACE_STEPS": str(TRACE_STEPS),
        }
        log = self.out / f"{self.baseline}.log"
        stock = VllmServer(self.model, arguments, disabled, log)
        arguments += ["--quantization", "flexquant"]
        return stock, VllmServer(self.served, arguments, enabled, self.out / "flexquant.log")

    def start(self, servers: Sequence[VllmServer]) -> None:
        """Start all at once, as most of a start uses one core, and wait until they answer."""
        for server in servers:
            server.launch()
            self.console.print(f"  {server.log.stem}: log in {server.log}")
        with self.console.status("") as status:
            for server in servers:
                server.wait(lambda s: status.update(f"{len(servers)} servers start: {s:.0f} s"))
                self.start_seconds[server.log.stem] = server.start_seconds
        self.console.print(f"  all answer after {max(self.start_seconds.values()):.0f} s")

    async def measure(self, stock: VllmServer, flexquant: VllmServer, weights: int) -> None:
        """Chat with the baseline and under each policy in turn, round by round; then the text."""
        plain = Client(stock.url, self.templated)
        switched = Client(flexquant.url, self.templated, self.key)
        chats: dict[str, list[ChatRun]] = {name: [] for name in (self.baseline, *POLICIES)}
        steps: dict[str, list[dict[str, Any]]] = {name: [] for name in POLICIES}
        try:
            for client in (plain, switched):
                await client.chat(PROMPTS[:2], 4, lambda text: None)  # warm up
            for number in range(1, self.rounds + 1):
                take_turn(stock, flexquant)
                with self.console.status(self._title(self.baseline, number)):
                    run = await plain.chat(PROMPTS, self.max_tokens, lambda text: None)
                self._say_speed(number, self.baseline, run)
                chats[self.baseline].append(run)
                take_turn(flexquant, stock)
                for name in POLICIES:
                    chats[name].append(await self._chat(switched, name, number))
                    steps[name] += self.steps
            self.answer = chats[name][-1].text
            take_turn(stock, flexquant)
            await self._force(plain, self.baseline)
            bits = report.BITS[self.baseline]
            same = {"mean_bits": float(bits), "bytes_per_step": weights * bits / 8}
            self._add(self.baseline, chats[self.baseline], same, same)
            take_turn(flexquant, stock)
            for name, changes in POLICIES.items():
                before = await self._begin(switched, changes)
                await self._force(switched, name)
                text_steps = await self._steps_since(switched, before)
                chat_summary = trace.summarise(self.layers, steps[name])
                self._add(name, chats[name], chat_summary, trace.summarise(self.layers, text_steps))
        finally:
            await plain.close()
            await switched.close()

    async def _chat(self, client: Client, name: str, number: int) -> ChatRun:
        """All requests under a policy, whose steps are kept."""
        before = await self._begin(client, POLICIES[name])
        async with LiveView(client, self._title(name, number), self.console) as live:
            run = await client.chat(PROMPTS, self.max_tokens, live.show_answer)
        self.steps = await self._steps_since(client, before)
        self._say_speed(number, name, run)
        return run

    def _say_speed(self, number: int, name: str, run: ChatRun) -> None:
        self.console.print(f"  round {number}, {name}: {run.tokens_per_second:.1f} tokens/s")

    def _title(self, name: str, number: int) -> str:
        return f"{name}: {len(PROMPTS)} chat requests, round {number} of {self.rounds}"

    async def _begin(self, client: Client, changes: dict[str, Any]) -> int:
        """Set the policy; returns the number of the next step."""
        await client.set_policy(changes)
        status = await client.status()
        self.layers = status["layers"]
        return int(status["steps"])

    async def _steps_since(self, client: Client, first: int) -> list[dict[str, Any]]:
        recorded = (await client.status(trace=True))["trace"]
        return [step for step in recorded if step["step"] >= first]

    async def _force(self, client: Client, name: str) -> None:
        with self.console.status(f"{name}: decoding the text, {len(self.sequences)} at a time"):
            await client.force(self.sequences, name)

    def _add(
        self,
        name: str,
        chats: list[ChatRun],
        chat_steps: dict[str, Any],
        text_steps: dict[str, Any],
    ) -> None:
        records = scored(read_records(self.work / "records.jsonl", name), self.sequences)
        text = summarise(records)
        speeds = [chat.tokens_per_second for chat in chats]
        self.rows[name] = {
            "chat": {
                "requests": len(PROMPTS),
                "tokens": chats[0].tokens,
                "tokens_per_second": median(speeds),
                "tokens_per_second_of_each_round": speeds,
            },
            "chat_steps": chat_steps,
            "text": text,
            "text_steps": text_steps,
        }
        self.console.print(
            f"  {name}: {median(speeds):.1f} tokens/s, KL {text['kl']:.4f} nats per token"
        )


def run(options: argparse.Namespace, console: Console) -> None:
    """The whole demo."""
    began = time.monotonic()
    console.rule("1 model")
    model = options.model or str(get_model())
    facts = provenance(model, TEXT)
    console.print(f"  {Path(model).name}")

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    sequences = cut_text(tokenizer, TEXT.read_text(encoding="utf-8"), 4 if options.fast else 8)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="flexquant-demo-") as work:
        demo = Demo(
            baseline=unquantized(facts["machine"]["flags"]),
            model=model,
            served=str(options.calibrated or calibrated_checkpoint(Path(model)) or model),
            out=options.out,
            work=Path(work),
            console=console,
            sequences=sequences,
            templated=bool(tokenizer.chat_template),
            max_tokens=32 if options.fast else 48,
            rounds=1 if options.fast else 3,
        )
        console.print(f"  {report.baseline_reason(demo.baseline)}")
        if demo.served != model:
            console.print(f"  calibrated checkpoint: {Path(demo.served).name}")
            facts["calibrated"] = {
                "name": Path(demo.served).name,
                "sha256": hash_model(Path(demo.served)),
            }
        serve = f"vllm serve --dtype {UNQUANTIZED[demo.baseline]}"
        console.rule("2 reference: the unquantized checkpoint in fp32")
        weights = demo.compute_reference()
        console.rule(f"3 {serve}, and with --quantization flexquant")
        stock, flexquant = servers = demo.servers()
        with ExitStack() as stack:
            for server in servers:
                stack.callback(server.stop)
            demo.start(servers)
            watched(servers, demo.measure(stock, flexquant, weights))
    finish(demo, options, facts, time.monotonic() - began)


def take_turn(runs: VllmServer, waits: VllmServer) -> None:
    """Let one server run, and the other take no time from it."""
    waits.pause()
    runs.resume()


def calibrated_checkpoint(model: Path) -> Path | None:
    """`MODEL-flexquant` beside the model, None where nobody made it."""
    found = model.with_name(f"{model.name}-flexquant")
    return found if (found / SIDECAR).is_file() else None


def watched(servers: Sequence[VllmServer], work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; when it fails because a server died, say that instead."""
    try:
        asyncio.run(work)
    except (openai.APIError, httpx.HTTPError) as error:
        time.sleep(1)  # a dying server takes a moment
        for server in servers:
            server.check()
        logs = " and ".join(str(server.log) for server in servers)
        raise ServerError(f"a request failed: {error}; the logs are {logs}") from None


def finish(demo: Demo, options: argparse.Namespace, facts: dict[str, Any], seconds: float) -> None:
    """Write JSON and picture, print the table."""
    console = demo.console
    rows = report.with_ratios(demo.rows, demo.baseline)
    dequantized = (Path(demo.model) / "conversion.json").is_file()
    tokens = rows[demo.baseline]["text"]["tokens"]
    calibrated = demo.served != demo.model
    flags = facts["machine"]["flags"]
    remarks = report.notes(demo.baseline, dequantized, tokens, demo.rounds, flags, calibrated)
    results = {
        "seconds": seconds,
        "start_seconds": demo.start_seconds,
        "baseline": demo.baseline,
        "max_tokens": demo.max_tokens,
        "notes": remarks,
        "policies": rows,
    }
    write_json(options.out / "demo.json", results, facts)
    console.rule("4 result")
    console.print("An answer under policy entropy:", style="bold")
    console.print(demo.answer.strip(), style="italic", markup=False, highlight=False)
    console.print()
    report.show(console, rows, demo.baseline, remarks)
    picture = options.out / "entropy.png"
    title = f"{Path(demo.model).name}: policy entropy, {len(PROMPTS)} chat requests"
    if plot_run(demo.layers, demo.steps, picture, title):
        console.print(f"picture: {picture}")
    console.print(f"numbers: {options.out / 'demo.json'}")
    console.print(f"{seconds:.0f} s in all")


def main() -> None:
    """Parse, run, and end with a message instead of a traceback where the cause is known."""
    parser = argparse.ArgumentParser(description="Serve a model at switching precision.")
    parser.add_argument("--model", help="checkpoint, default: SmolLM2-135M-Instruct")
    parser.add_argument(
        "--calibrated",
        type=Path,
        help="flexquant checkpoint of it to serve (default: MODEL-flexquant beside it, if there)",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "demo" / "out")
    parser.add_argument(
        "--fast", action="store_true", help="one round, fewer tokens and half the text"
    )
    options = parser.parse_args()
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped
    try:
        run(options, console)
    except KNOWN_ERRORS as error:
        console.print(f"demo: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("demo: interrupted; servers are stopped", style="red")
        sys.exit(130)


if __name__ == "__main__":
    main()
