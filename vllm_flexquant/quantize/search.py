# SPDX-License-Identifier: Apache-2.0
"""The order in which units lose planes, from all bits down to the lowest width everywhere.

Each step lowers one unit to its next width. `greedy` takes the step with the least extra KL for
what it saves, by sensitivities that are taken to add up; what a unit's next two steps together save
is looked at as well, so that a dear step before a cheap one does not hide it. What is saved is
bytes read, or the time of kernels where it was measured. `tree` is the one-way
search of the elastic FlexQuant (Chai et al. 2025, section 3.2): at each node the `branch` best
steps by sensitivity are candidates, and the `stem` candidates whose measured KL on calibration text
is least go on.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Costs = Mapping[str, Mapping[int, float]]
"""KL in nats per token of each unit at each width, all else unquantized."""

Prices = Mapping[str, Mapping[int, float]]
"""What running each unit at each width costs per step: bytes, or seconds."""

Measure = Callable[[Sequence[Mapping[str, int]]], Sequence[float]]
"""Mean KL in nats per token of each choice of widths."""

_SMALLEST = 1e-9
"""Share of all that can be saved, below which nothing is."""


@dataclass(frozen=True)
class Step:
    """One unit's next lower width. `kl`: by how much the sum of sensitivities grows, nats."""

    unit: str
    width: int
    kl: float


def mean_bits(weights: Mapping[str, int], widths: Mapping[str, int]) -> float:
    """Mean width over all weights; `weights` is the number of weights of each unit."""
    return sum(weights[name] * width for name, width in widths.items()) / sum(weights.values())


def greedy(costs: Costs, prices: Prices) -> list[Step]:
    """All steps in their order; one that saves nothing comes last."""
    queue: list[tuple[float, str, tuple[int, ...]]] = []

    def offer(name: str, width: int) -> None:
        lower = sorted((w for w in costs[name] if w < width), reverse=True)
        if not lower:
            return
        best = min(
            (
                _rate(costs[name], prices[name], width, target),
                name,
                tuple(w for w in lower if w >= target),
            )
            for target in lower
        )
        heapq.heappush(queue, best)

    for name in costs:
        offer(name, max(costs[name]))
    order = []
    while queue:
        _, name, path = heapq.heappop(queue)
        width = min(w for w in costs[name] if w > path[0])
        for target in path:
            order.append(Step(name, target, costs[name][target] - costs[name][width]))
            width = target
        offer(name, path[-1])
    return order


def _rate(
    costs: Mapping[int, float], prices: Mapping[int, float], width: int, target: int
) -> float:
    """Extra KL per price saved by going from `width` to `target`."""
    saved = prices[width] - prices[target]
    return (costs[target] - costs[width]) / saved if saved > 0 else math.inf


@dataclass
class _Branch:
    """A partial order of steps, and the widths that it has reached."""

    steps: list[Step]
    widths: dict[str, int]


def tree(
    costs: Costs,
    prices: Prices,
    measure: Measure,
    branch: int = 4,
    stem: int = 2,
    bundle: float = 0.02,
    advance: Callable[[float], None] | None = None,
) -> list[Step]:
    """All steps in the order that the tree search finds.

    Args:
        bundle: a node of the tree is this share of what can be saved, in greedy steps
            that start with one candidate: measuring every single step of every candidate would
            take days on a large model.
        advance: called with the share of the search that is done.

    Raises:
        ValueError: `branch` or `stem` below 1.
    """
    if branch < 1 or stem < 1:
        raise ValueError(f"branch {branch} and stem {stem} must be at least 1")
    highest = {name: max(c) for name, c in costs.items()}
    lowest = {name: min(c) for name, c in costs.items()}
    total = _saved(prices, highest, lowest)
    alive = [_Branch([], dict(highest))]
    while True:
        candidates = [
            grown for node in alive for grown in _grow(node, costs, prices, branch, bundle * total)
        ]
        if not candidates:
            return alive[0].steps
        unique = {tuple(sorted(c.widths.items())): c for c in reversed(candidates)}
        nodes = list(unique.values())
        saved = [_saved(prices, highest, node.widths) for node in nodes]
        measured = measure([c.widths for c in nodes]) if len(nodes) > 1 else [0.0]
        # candidates differ in what they save by less than one unit: KL for it compares them
        ranked = sorted(
            zip(measured, saved, range(len(nodes)), strict=True),
            key=lambda m: m[0] / max(m[1], _SMALLEST * total),
        )
        alive = [nodes[i] for _, _, i in ranked[:stem]]
        if advance:
            advance(max(saved) / total)


def _saved(prices: Prices, before: Mapping[str, int], after: Mapping[str, int]) -> float:
    return sum(prices[name][before[name]] - prices[name][width] for name, width in after.items())


def _grow(node: _Branch, costs: Costs, prices: Prices, branch: int, size: float) -> list[_Branch]:
    """`node` with a bundle of steps more, one for each of the best `branch` first steps.

    A candidate leaves the units of better first steps alone, or all bundles would be the same.
    """
    options = []
    for name, width in node.widths.items():
        lower = [w for w in costs[name] if w < width]
        if lower:
            target = max(lower)
            extra = costs[name][target] - costs[name][width]
            rate = _rate(costs[name], prices[name], width, target)
            options.append((rate, name, target, extra))
    options.sort()
    grown = []
    for rank, (_, name, target, extra) in enumerate(options[:branch]):
        widths = node.widths | {name: target}
        steps = [*node.steps, Step(name, target, extra)]
        saved = prices[name][node.widths[name]] - prices[name][target]
        left_alone = {option[1] for option in options[:rank]}
        open_costs = {
            n: {w: kl for w, kl in c.items() if w <= widths[n]}
            for n, c in costs.items()
            if n not in left_alone
        }
        for step in greedy(open_costs, prices):
            if saved >= size:
                break
            saved += prices[step.unit][widths[step.unit]] - prices[step.unit][step.width]
            widths[step.unit] = step.width
            steps.append(step)
        grown.append(_Branch(steps, widths))
    return grown


def rungs(units: Mapping[str, int], steps: Sequence[Step]) -> list[dict[str, int]]:
    """Widths after every step, from none on; `units` gives the highest width of each."""
    widths = dict(units)
    found = [dict(widths)]
    for step in steps:
        widths[step.unit] = step.width
        found.append(dict(widths))
    return found
