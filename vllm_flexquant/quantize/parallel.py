# SPDX-License-Identifier: Apache-2.0
"""Where the independent parts of calibration run: here, or as tasks of a Ray cluster.

Split into tasks are the rounding of a block's layers (each has its weights and Hessian), the
second-order estimate by batches of tokens, and what is measured (KL, drafts) by batches of tokens
and by choices. The rest stays here: blocks are rounded one after the other, because each is rounded
for what the rounded blocks before it give it, and so do Hessians, the output layer, the order of
the ladder and the probe. The tree search waits for the measurement of one node before it knows the
next.

Results are the same bit for bit as without Ray: parts are cut only where they do not depend on
each other, and a task uses as many threads as the part does here (the last bits of a matrix product
may depend on that). Nodes whose CPUs differ from this one's may still give other last bits.

Model and work folder are read by the workers themselves, from the same paths as here.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from vllm_flexquant import __version__
from vllm_flexquant.format.checkpoint import OUTPUT_LAYER
from vllm_flexquant.format.layout import PlaneLayout
from vllm_flexquant.quantize import evaluate, sensitivity
from vllm_flexquant.quantize.blocks import BlockModel, Unit
from vllm_flexquant.quantize.evaluate import NestedModel, Widths
from vllm_flexquant.quantize.rounding import (
    Layer,
    RoundingOptions,
    quantize_layers,
    threads_of_layer,
)
from vllm_flexquant.quantize.rtn import QuantizedWeight

Report = Callable[[float], None]
"""Called with the share that is done."""

RETRIES = 3
"""How often a task is run again when its worker dies."""

_TASKS_PER_SLOT = 2
"""Tasks of a measurement for each that can run at the same time, so that none waits long for the
last one. More would re-read blocks and repeat the reference more often."""

_LOGIT_BLOCKS = 2
"""What the logits of a choice cost, in blocks; only evens out the tasks."""

T = TypeVar("T")


class Workers(Protocol):
    """What can be split, wherever it runs."""

    def share(self, *files: Path) -> None:
        """Make sure that workers see these small text files as they are here.

        Raises:
            ValueError: one does not; the message names file, node and remedy.
        """

    def quantize(self, layers: Sequence[Layer], options: RoundingOptions) -> list[QuantizedWeight]:
        """As `rounding.quantize_layers`."""

    def estimate(
        self, nested: NestedModel, tokens: torch.Tensor, seed: int, report: Report
    ) -> dict[str, dict[int, sensitivity.Cost]]:
        """As `sensitivity.estimate`."""

    def compare(
        self,
        nested: NestedModel,
        tokens: torch.Tensor,
        choices: Sequence[Widths],
        report: Report,
        facts: evaluate.Facts = evaluate.kl_alone,
        truth: Widths | None = None,
    ) -> torch.Tensor:
        """As `evaluate.compare`; `facts` is a function of a module, which workers find by name."""


@contextmanager
def connect(address: str | None) -> Iterator[Workers]:
    """Workers for as long as the context lasts.

    Args:
        address: None for this process; `local` for a Ray of this machine that ends with the
            context, `auto` for the one that runs on it, `host:port` or `ray://host:port`. A
            connection that this process has already is used and kept, whatever the address.

    Raises:
        ValueError: Ray is not installed, or cannot be reached at the address.
    """
    if address is None:
        yield Local()
        return
    try:
        import ray
    except ImportError:
        raise ValueError(
            f"--ray {address} needs Ray, which is not installed; "
            "run: pip install 'vllm-flexquant[ray]'"
        ) from None
    connected = ray.is_initialized()
    if not connected:
        _connect(ray, address)
    try:
        yield OnRay(address)
    finally:
        if not connected:
            ray.shutdown()


class Local:
    """`Workers` of this process alone."""

    def share(self, *files: Path) -> None:
        pass

    def quantize(self, layers: Sequence[Layer], options: RoundingOptions) -> list[QuantizedWeight]:
        return quantize_layers(layers, options)

    def estimate(
        self, nested: NestedModel, tokens: torch.Tensor, seed: int, report: Report
    ) -> dict[str, dict[int, sensitivity.Cost]]:
        blocks = len(nested.model)
        return sensitivity.estimate(nested, tokens, seed, lambda i: report(i / blocks))

    def compare(
        self,
        nested: NestedModel,
        tokens: torch.Tensor,
        choices: Sequence[Widths],
        report: Report,
        facts: evaluate.Facts = evaluate.kl_alone,
        truth: Widths | None = None,
    ) -> torch.Tensor:
        blocks = len(nested.model)
        return evaluate.compare(nested, tokens, choices, facts, truth, lambda i: report(i / blocks))


@dataclass(frozen=True)
class _Place:
    """What a worker must have in common with this process.

    marks: files and the SHA-256 of what is in them.
    """

    threads: int
    versions: tuple[str, ...]
    marks: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Recipe:
    """What a worker makes a `NestedModel` of."""

    folder: Path
    device: str
    units: Sequence[Sequence[Unit]]
    layout: PlaneLayout
    read: Callable[[int], Mapping[str, evaluate.Weight]]

    @classmethod
    def of(cls, nested: NestedModel) -> _Recipe:
        # a worker sees no device but the one that it was given
        device = nested.model.device.type
        return cls(nested.model.folder, device, nested.units, nested.layout, nested.read)


class OnRay:
    """`Workers` of the Ray cluster that this process is connected to.

    A task takes as many cores as torch would have threads for it here, or one core and one GPU.
    """

    def __init__(self, address: str, retries: int = RETRIES) -> None:
        self.address, self.retries = address, retries
        self.place = _Place(torch.get_num_threads(), _versions())

    def share(self, *files: Path) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        marks = tuple((str(f), hashlib.sha256(f.read_bytes()).hexdigest()) for f in files)
        self.place = replace(self.place, marks=marks)
        _, _, nodes = self._claim("cpu", self.place.threads)
        strategies = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        try:
            self._run(_enter, [()] * len(nodes), "cpu", strategies=strategies)
        except ray.exceptions.RayTaskError as error:  # what Ray says where the import fails
            raise ValueError(
                f"a node of the Ray cluster '{self.address}' cannot run {__package__} "
                f"({str(error).strip().splitlines()[-1]}); install vllm-flexquant on all nodes"
            ) from None

    def quantize(self, layers: Sequence[Layer], options: RoundingOptions) -> list[QuantizedWeight]:
        import ray

        if any(hessian is None for _, _, hessian in layers):
            return quantize_layers(layers, options)  # takes less than to send the weights
        device = layers[0][1].device
        hessians = {id(h): h for _, _, h in layers if h is not None}
        stored = {key: ray.put(h.cpu()) for key, h in hessians.items()}
        items = [(n, w.cpu(), stored[id(h)], options, device.type) for n, w, h in layers]
        threads = threads_of_layer(self.place.threads, len(layers))
        found = self._run(_quantize, items, device.type, threads=threads)
        return [QuantizedWeight(w.codes.to(device), w.scales.to(device)) for w in found]

    def estimate(
        self, nested: NestedModel, tokens: torch.Tensor, seed: int, report: Report
    ) -> dict[str, dict[int, sensitivity.Cost]]:
        recipe = _Recipe.of(nested)
        _, slots, _ = self._claim(recipe.device, self.place.threads)
        seeded = list(enumerate(sensitivity.cut(tokens), seed))
        items = [(recipe, part) for part in _spread(seeded, slots)]
        return sensitivity.summarize(self._run(_terms, items, recipe.device, report))

    def compare(
        self,
        nested: NestedModel,
        tokens: torch.Tensor,
        choices: Sequence[Widths],
        report: Report,
        facts: evaluate.Facts = evaluate.kl_alone,
        truth: Widths | None = None,
    ) -> torch.Tensor:
        recipe = _Recipe.of(nested)
        _, slots, _ = self._claim(recipe.device, self.place.threads)
        wanted = _TASKS_PER_SLOT * slots
        texts = [torch.cat(part) for part in _spread(evaluate.cut(tokens), wanted)]
        groups = group_choices(choices, nested.units, -(-wanted // len(texts)))
        items = [
            (recipe, text, [dict(choices[i]) for i in group], facts, truth and dict(truth))
            for group in groups
            for text in texts
        ]
        found = iter(self._run(_compare, items, recipe.device, report))
        by_group = [torch.cat([next(found) for _ in texts], dim=-1) for _ in groups]
        order = torch.tensor([i for group in groups for i in group]).argsort()
        return torch.cat(by_group, dim=1)[:, order]

    def _claim(self, device: str, threads: int) -> tuple[dict[str, float], int, list[str]]:
        """Resources of a task, how many tasks run at the same time, and the nodes that run any."""
        import ray

        alive = {n["NodeID"]: n["Resources"] for n in ray.nodes() if n["Alive"]}
        # threads stay as they are on nodes with fewer cores, which only makes them slower
        most = max((r.get("CPU", 0.0) for r in alive.values()), default=0.0)
        claim = {"CPU": max(1.0, min(float(threads), most))}
        if device != "cpu":
            claim = {"CPU": 1.0, "GPU": 1.0}
        slots = {
            node: int(min(has.get(key, 0.0) // needed for key, needed in claim.items()))
            for node, has in alive.items()
        }
        usable = [node for node, count in slots.items() if count]
        if not usable:
            raise ValueError(
                f"no node of the Ray cluster '{self.address}' has {claim}; add one, or choose "
                "another --device"
            )
        return claim, sum(slots.values()), usable

    def _run(
        self,
        function: Callable[..., T],
        items: Sequence[tuple[Any, ...]],
        device: str,
        report: Report | None = None,
        strategies: Sequence[Any] | None = None,
        threads: int | None = None,
    ) -> list[T]:
        """`function(place, *item)` of each item, in their order, on so many threads or all."""
        import ray

        place = replace(self.place, threads=threads or self.place.threads)
        claim, _, _ = self._claim(device, place.threads)
        remote = ray.remote(
            num_cpus=claim["CPU"],
            num_gpus=claim.get("GPU", 0),
            max_retries=0,  # Ray's own never end for a task that runs out of memory
            max_calls=0,  # else a worker with a GPU ends after one task, and its model with it
        )(function)
        strategies = strategies or ["DEFAULT"] * len(items)
        number: dict[Any, int] = {}

        def start(i: int) -> None:
            task = remote.options(scheduling_strategy=strategies[i])
            number[task.remote(place, *items[i])] = i

        for i in range(len(items)):
            start(i)
        results: dict[int, T] = {}
        lost = dict.fromkeys(range(len(items)), 0)
        try:
            while number:
                (ref,), _ = ray.wait(list(number))
                i = number.pop(ref)
                try:
                    results[i] = ray.get(ref)
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, ValueError):
                        raise error.cause from None
                    raise
                except ray.exceptions.RayError as error:  # the worker is gone, or its node
                    lost[i] += 1
                    if lost[i] > self.retries:
                        raise self._lost(error) from None
                    start(i)
                if report:
                    report(len(results) / len(items))
        finally:
            for ref in number:
                ray.cancel(ref)
        return [results[i] for i in range(len(items))]

    def _lost(self, error: Exception) -> ValueError:
        reason = str(error).strip().partition("\n")[0]
        return ValueError(
            f"a task was lost in the Ray cluster '{self.address}' {self.retries + 1} times: "
            f"{reason} What is finished is kept: give the workers more memory or drop --ray, and "
            "add --resume"
        )


def group_choices(
    choices: Sequence[Widths], units: Sequence[Sequence[Unit]], count: int
) -> list[list[int]]:
    """Numbers of the choices in at most `count` groups of about the same cost.

    Choices that agree on many blocks from the first on are neighbours: they share hidden states.
    """
    paths = [
        [tuple(choice.get(unit.name, 0) for unit in block) for block in units]
        + [(choice.get(OUTPUT_LAYER, 0),)]
        for choice in choices
    ]
    order = sorted(range(len(choices)), key=paths.__getitem__)
    before: Sequence[Any] = [(0,) * len(block) for block in units]
    costs = []
    for i in order:
        path = paths[i][: len(units)]
        same = next((b for b in range(len(units)) if path[b] != before[b]), len(units))
        costs.append(len(units) - same + _LOGIT_BLOCKS)
        before = path
    groups: list[list[int]] = [[] for _ in range(count)]
    total, passed = sum(costs), 0
    for i, cost in zip(order, costs, strict=True):
        groups[(2 * passed + cost) * count // (2 * total)].append(i)
        passed += cost
    return [group for group in groups if group]


def _spread(items: Sequence[T], count: int) -> list[Sequence[T]]:
    """Neighbours in at most `count` parts of about the same length."""
    count = min(count, len(items))
    return [items[i * len(items) // count : (i + 1) * len(items) // count] for i in range(count)]


def _connect(ray: Any, address: str) -> None:
    remedy = (
        "start a cluster with 'ray start --head', check the address (a cluster with tokens needs "
        "RAY_AUTH_MODE=token here), or use --ray local"
    )
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        # nothing is to be sent anywhere by a cluster that nobody asked for
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet["include_dashboard"] = False
    else:
        found = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
        if found:
            _knock(found, address, remedy)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ValueError(f"cannot connect to Ray at '{address}': {error}; {remedy}") from None


def _knock(found: str, address: str, remedy: str) -> None:
    """Refuse an address where nobody listens; Ray itself takes minutes to find that out."""
    host, _, port = found.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"--ray is '{address}'; use local, auto, HOST:PORT or ray://HOST:PORT, or leave it out"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot connect to Ray at '{found}': {error}; {remedy}") from None


# ---- in the worker


def _versions() -> tuple[str, ...]:
    return (f"vllm-flexquant {__version__}", f"torch {torch.__version__}")


def _enter(place: _Place) -> None:
    if torch.get_num_threads() != place.threads:
        torch.set_num_threads(place.threads)
    _check(place)


@functools.lru_cache(maxsize=1)
def _check(place: _Place) -> None:
    node = platform.node()
    for wanted, found in zip(place.versions, _versions(), strict=True):
        if found != wanted:
            raise ValueError(
                f"node {node} of the Ray cluster has {found}, and here is {wanted}; install the "
                "same version on all nodes"
            )
    for name, digest in place.marks:
        file = Path(name)
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise ValueError(
                f"node {node} of the Ray cluster does not see {file} as it is here; put the model "
                "and the new folder on a file system that all nodes have at the same path, or drop "
                "--ray"
            )


@functools.lru_cache(maxsize=1)
def _model(_: _Place, folder: Path, device: str) -> BlockModel:
    """Kept between the tasks of a worker."""
    return BlockModel(folder, device)


def _nested(place: _Place, recipe: _Recipe) -> NestedModel:
    _enter(place)
    model = _model(place, recipe.folder, recipe.device)
    return NestedModel(model, recipe.units, recipe.layout, recipe.read)


def _quantize(
    place: _Place,
    name: str,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    options: RoundingOptions,
    device: str,
) -> QuantizedWeight:
    _enter(place)
    with torch.inference_mode():
        layer = (name, weight.to(device), hessian.to(device))
        (found,) = quantize_layers([layer], options)
    return QuantizedWeight(found.codes.cpu(), found.scales.cpu())


def _terms(
    place: _Place, recipe: _Recipe, seeded: Sequence[tuple[int, torch.Tensor]]
) -> sensitivity.Terms:
    return sensitivity.per_token(_nested(place, recipe), seeded)


def _compare(
    place: _Place,
    recipe: _Recipe,
    tokens: torch.Tensor,
    choices: Sequence[Widths],
    facts: evaluate.Facts,
    truth: Widths | None,
) -> torch.Tensor:
    return evaluate.compare(_nested(place, recipe), tokens, choices, facts, truth)
