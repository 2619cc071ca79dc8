# SPDX-License-Identifier: Apache-2.0
"""The order in which units lose planes, from all bits down to the lowest width everywhere.

Each step lowers one unit to its next width. `greedy` takes the step with the least extra KL per
byte saved, by sensitivities that are taken to add up; what a unit's next two steps together save is
looked at as well, so that a dear step before a cheap one does not hide it. `tree` is the one-way
search of the elastic FlexQuant (Chai et al. 2025, section 3.2): at each node the `branch` best
steps by sensitivity are candidates, and the `stem` candidates whose measured KL on calibration text
is least go on.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vllm_flexquant.format.layout import PARENT_BITS

Costs = Mapping[str, Mapping[int, float]]
"""KL in nats per token of each unit at each width, all else unquantized."""

Measure = Callable[[Sequence[Mapping[str, int]]], Sequence[float]]
"""Mean KL in nats per token of each choice of widths."""


@dataclass(frozen=True)
class Step:
    """One unit's next lower width. `kl`: by how much the sum of sensitivities grows, nats."""

    unit: str
    width: int
    kl: float


def mean_bits(weights: Mapping[str, int], widths: Mapping[str, int]) -> float:
    """Mean width over all weights; `weights` is the number of weights of each unit."""
    return sum(weights[name] * width for name, width in widths.items()) / sum(weights.values())


def greedy(costs: Costs, weights: Mapping[str, int]) -> list[Step]:
    """All steps in their order.

    Args:
        weights: number of weights of each unit.
    """
    queue: list[tuple[float, str, tuple[int, ...]]] = []

    def offer(name: str, width: int) -> None:
        lower = sorted((w for w in costs[name] if w < width), reverse=True)
        if not lower:
            return
        best = min(
            (
                (costs[name][target] - costs[name][width])
                / (weights[name] * (width - target) / PARENT_BITS),
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


@dataclass
class _Branch:
    """A partial order of steps, and the widths that it has reached."""

    steps: list[Step]
    widths: dict[str, int]


def tree(
    costs: Costs,
    weights: Mapping[str, int],
    measure: Measure,
    branch: int = 4,
    stem: int = 2,
    bundle: float = 0.02,
    advance: Callable[[float], None] | None = None,
) -> list[Step]:
    """All steps in the order that the tree search finds.

    Args:
        bundle: a node of the tree is this share of the bytes that can be saved, in greedy steps
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
    total = sum(weights[n] * (highest[n] - lowest[n]) for n in costs)
    alive = [_Branch([], dict(highest))]
    while True:
        candidates = [
            grown for node in alive for grown in _grow(node, costs, weights, branch, bundle * total)
        ]
        if not candidates:
            return alive[0].steps
        unique = {tuple(sorted(c.widths.items())): c for c in reversed(candidates)}
        nodes = list(unique.values())
        saved = [sum(weights[n] * (highest[n] - w) for n, w in c.widths.items()) for c in nodes]
        measured = measure([c.widths for c in nodes]) if len(nodes) > 1 else [0.0]
        # candidates differ in what they save by less than one unit; KL per byte compares them
        ranked = sorted(
            zip(measured, saved, range(len(nodes)), strict=True), key=lambda m: m[0] / m[1]
        )
        alive = [nodes[i] for _, _, i in ranked[:stem]]
        if advance:
            advance(max(saved) / total)


def _grow(
    node: _Branch, costs: Costs, weights: Mapping[str, int], branch: int, size: float
) -> list[_Branch]:
    """`node` with a bundle of steps more, one for each of the best `branch` first steps.

    A candidate leaves the units of better first steps alone, or all bundles would be the same.
    """
    options = []
    for name, width in node.widths.items():
        lower = [w for w in costs[name] if w < width]
        if lower:
            target = max(lower)
            extra = costs[name][target] - costs[name][width]
            options.append((extra / (weights[name] * (width - target)), name, target, extra))
    options.sort()
    grown = []
    for rank, (_, name, target, extra) in enumerate(options[:branch]):
        widths = node.widths | {name: target}
        steps = [*node.steps, Step(name, target, extra)]
        saved = weights[name] * (node.widths[name] - target)
        left_alone = {option[1] for option in options[:rank]}
        open_costs = {
            n: {w: kl for w, kl in c.items() if w <= widths[n]}
            for n, c in costs.items()
            if n not in left_alone
        }
        for step in greedy(open_costs, weights):
            if saved >= size:
                break
            saved += weights[step.unit] * (widths[step.unit] - step.width)
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
