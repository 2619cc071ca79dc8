# SPDX-License-Identifier: Apache-2.0
"""What is told of a worker: one snapshot of plain, finite values.

The operator's view and `/metrics` are both made from it."""

from __future__ import annotations

import math
import time
from typing import Any

from flexquant_kernels import ops
from flexquant_kernels.state import ACCOUNTS
from vllm_flexquant.options import OWN, FlexQuantOptions
from vllm_flexquant.planner.ladder import bytes_read, mean_bits
from vllm_flexquant.planner.planner import Planner
from vllm_flexquant.planner.watcher import Watcher
from vllm_flexquant.policy.arrays import host
from vllm_flexquant.policy.load import MISSED
from vllm_flexquant.policy.protocol import FIRST, LATER
from vllm_flexquant.requests.accounts import FIRST_OWN, class_accounts, label
from vllm_flexquant.speculation.control import SelfSpeculation
from vllm_flexquant.telemetry.sums import Sums
from vllm_flexquant.values import finite

_KEPT_S = 1.0
"""Seconds for which a snapshot serves all who ask."""


class Snapshots(Watcher):
    """Takes snapshots of one worker."""

    def __init__(
        self, planner: Planner, sums: Sums, speculation: SelfSpeculation | None, **facts: Any
    ) -> None:
        """`facts`: what else is told, and does not change."""
        self._planner, self._sums, self._speculation = planner, sums, speculation
        self._facts = facts
        self._layers = self._describe_layers()
        self._last: dict[str, Any] = {}
        self._taken = -math.inf
        planner.watchers.add(self)

    def changed(self, options: FlexQuantOptions) -> None:
        """What was told is no longer so."""
        self._taken = -math.inf

    def take(self, fresh: bool = False) -> dict[str, Any]:
        """What is in force now and what was counted; a snapshot is kept for a second (syncs a GPU).

        Args:
            fresh: not an older one.
        """
        now = time.monotonic()
        if fresh or now - self._taken >= _KEPT_S:
            view = self._view()
            self._last, self._taken = finite(view | self._metrics(view)), now
        return self._last

    def _view(self) -> dict[str, Any]:
        planner, state = self._planner, self._planner.state
        assert planner.table is not None
        planner.count()
        ladder, layers = planner.model.ladder, planner.table.layers
        widths = host(state.table).tolist()
        levels = host(state.decisions)[:, 0]
        names = class_accounts(planner.options.classes)
        budget = None if planner.ledger is None else planner.ledger.view(names)
        if budget is not None:
            listening = planner.model.listening
            budget |= {"probe": listening and listening.name, "in_force": planner.policy.books}
        return self._facts | {
            "steps": planner.steps,
            "options": planner.options.plain(),
            "level": self.level(widths),
            "decided": {"first": int(levels[FIRST]), "later": int(levels[LATER])},
            "levels": len(ladder),
            "mean_bits": mean_bits(layers, widths),
            "bytes_read_per_step": bytes_read(layers, widths),
            "request_floor_bits": planner.facts.floor,
            "clamped_widths": ops.clamped_calls(),
            "unknown_rows": int(state.unknown[0]),
            "requests": self._requests(),
            "budget": budget,
            "load": self._load(),
            "cost_table": planner.clock.load.cost_table(),
            "speculation": self._speculation and self._speculation.status(),
            "ladder": {
                "source": ladder.source,
                "kl_nats": ladder.kl_nats and list(ladder.kl_nats),
                "mean_bits": list(ladder.mean_bits),
                "bytes_read_per_step": list(ladder.bytes_read),
            },
            "layers": [
                layer | {"width": width} for layer, width in zip(self._layers, widths, strict=True)
            ],
        }

    def level(self, widths: list[int]) -> int:
        """The cheapest level of the ladder that has as many bits as `widths`, by layer: what ran,
        where bounds or a floor left other widths than those that were decided."""
        planner = self._planner
        assert planner.table is not None
        bits = mean_bits(planner.table.layers, widths)
        ladder = planner.model.ladder.mean_bits
        return next((n for n, has in enumerate(ladder) if has >= bits - 1e-9), len(ladder) - 1)

    def _describe_layers(self) -> list[dict[str, Any]]:
        assert self._planner.table is not None
        return [
            {
                "name": layer.name,
                "widths": list(layer.widths),
                "shape": [layer.rows, layer.columns],
                "group_size": layer.group_size,
                "kernel": layer.kernel,
                "why": layer.reason,
            }
            for layer in self._planner.table.layers
        ]

    def _requests(self) -> list[dict[str, Any]]:
        planner = self._planner
        batch = planner.batch
        if batch is None:
            return []
        average, seen = host(planner.state.average), host(planner.state.seen)
        found = []
        for request, slot in zip(batch.request_ids, batch.slots, strict=True):
            grant = planner.grants.get(slot)
            if grant is None:
                continue  # it has left
            found.append(
                {
                    "request": request,
                    "entropy_nats": float(average[slot]) if seen[slot] else None,
                    "account": label(planner.options.classes, grant.account),
                    "floor": grant.floor,
                }
            )
        return found

    def _load(self) -> dict[str, Any] | None:
        load = self._planner.clock.load
        if load.target is None:
            return None
        return {
            "target_ms": load.target * 1e3,
            "met": load.met,
            "owed_ms": 1e3 * load.owed,
            "ceiling": self._planner.ceiling(),
            "kept": load.met >= 1 - 2 * MISSED,
        }

    def _metrics(self, view: dict[str, Any]) -> dict[str, Any]:
        """`gauges` and `counters` by name, and both by label of `accounts`.

        Counters are sums since the start; a gauge that does not apply is absent.
        """
        planner, sums = self._planner, self._sums
        shown = ("mean_bits", "level", "levels", "request_floor_bits")
        gauges: dict[str, float] = {name: view[name] for name in shown}
        known = [r["entropy_nats"] for r in view["requests"] if r["entropy_nats"] is not None]
        if known:
            gauges["entropy_nats"] = sum(known) / len(known)
        if planner.clock.load.target is not None:
            gauges["load_target_seconds"] = planner.clock.load.target
            gauges["load_met"] = planner.clock.load.met
        counters: dict[str, float] = {
            "decode_steps": sums.steps,
            "decode_step_bits": sums.bits,
            "switches": sums.switches,
            "clamped_widths": view["clamped_widths"],
            "unknown_rows": view["unknown_rows"],
        }
        if self._speculation is not None:
            gauges |= self._speculation.gauges()
            counters |= self._speculation.sums()
        if planner.ledger is not None:
            gauges["best_nats"] = planner.ledger.best
        return {"gauges": gauges, "counters": counters, "accounts": self._accounts(view["budget"])}

    def _accounts(self, budget: dict[str, Any] | None) -> dict[str, Any]:
        planner = self._planner
        ledger = planner.ledger
        if ledger is None or budget is None:
            return {}
        names = class_accounts(planner.options.classes)
        lines: dict[str, int | slice] = {**names, OWN: slice(FIRST_OWN, ACCOUNTS)}
        found = {
            name: {"counters": ledger.sums(line), "gauges": {}} for name, line in lines.items()
        }
        # the accounts rest while another policy decides
        if planner.policy.books:
            for name, account in budget["classes"].items():
                kept = ("asked_nats", "balance_nats", "can_be_met")
                found[name]["gauges"] = {kind: float(account[kind]) for kind in kept}
        return found
