# SPDX-License-Identifier: Apache-2.0
"""What operators see of a worker: all of it for `GET /v1/flexquant`, sums for `/metrics`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_flexquant.planner.ladder import bytes_read, mean_bits
from vllm_flexquant.policy.arrays import host
from vllm_flexquant.policy.load import MISSED

if TYPE_CHECKING:
    from vllm_flexquant.planner.planner import Controller


def status(controller: Controller) -> dict[str, Any]:
    """What is in force now, as plain values (syncs a GPU)."""
    from flexquant_kernels import ops

    assert controller.table is not None
    ladder, sequences = controller.ladder, controller.sequences
    layers, widths = controller.table.layers, controller.table.widths.tolist()
    average, seen = sequences.average.tolist(), sequences.seen.tolist()
    batch = controller.batch
    running = zip(batch.request_ids, batch.slots, strict=True) if batch else ()
    return {
        "steps": controller.steps,
        "options": controller.plain_options(),
        "level": controller.level().item(),
        "levels": len(ladder),
        "mean_bits": mean_bits(layers, widths),
        "bytes_read_per_step": bytes_read(layers, widths),
        "request_floor_bits": controller.facts.floor,
        "clamped_widths": ops.clamped_calls(),
        "unknown_rows": sequences.unknown.item(),
        "entropy_nats": {request: average[s] for request, s in running if seen[s]},
        "budget": _accounts(controller),
        "load": _load(controller),
        "cost_table": controller.load.cost_table(),
        "speculation": controller.speculation and controller.speculation.status(),
        "ladder": {
            "source": ladder.source,
            "kl_nats": ladder.kl_nats and list(ladder.kl_nats),
            "mean_bits": list(ladder.mean_bits),
            "bytes_read_per_step": list(ladder.bytes_read),
        },
        "layers": [
            {
                "name": layer.name,
                "width": width,
                "widths": list(layer.widths),
                "shape": [layer.rows, layer.columns],
                "group_size": layer.group_size,
                "kernel": layer.kernel,
                "why": layer.reason,
            }
            for layer, width in zip(layers, widths, strict=True)
        ],
    }


def metrics(controller: Controller) -> dict[str, Any]:
    """What `/metrics` shows: `gauges` and `counters` by name, and both of `classes` by theirs.

    Counters are what was added since this was called last (syncs a GPU).
    """
    from flexquant_kernels import ops

    assert controller.table is not None
    controller.count()
    layers, counts, budget = controller.table.layers, controller.counts, _accounts(controller)
    gauges = {
        "mean_bits": mean_bits(layers, controller.table.widths.tolist()),
        "level": controller.level().item(),
        "levels": len(controller.ladder),
        "request_floor_bits": controller.facts.floor,
    }
    if controller.facts.decoding:
        average, seen = map(host, controller.sequences.of(controller.facts.sequences[0]))
        if seen.any():
            gauges["entropy_nats"] = float(average[seen].mean())
    if controller.load.target is not None:
        gauges["load_target_seconds"] = controller.load.target
        gauges["load_met"] = controller.load.met
    if budget is not None:
        gauges["best_nats"] = budget["best_nats"]
    probe_layer = controller.budget.probe_layer if controller.budget else 0
    sums: dict[Any, float] = {
        "decode_steps": counts.ran.total(),
        "decode_step_bits": counts.bits(layers, controller.ladder, probe_layer),
        "switches": counts.switches,
        "clamped_widths": ops.clamped_calls(),
        "unknown_rows": controller.sequences.unknown.item(),
    }
    # the accounts rest while another policy decides
    accounts = budget["classes"] if budget is not None and controller.policy is None else {}
    for name, account in accounts.items():
        sums[name, "tokens"] = account["tokens"]
        sums[name, "booked_nats"] = account["tokens"] * account["booked_nats"]
    if controller.speculation is not None:
        gauges |= controller.speculation.gauges()
        sums |= controller.speculation.sums()
    added = controller.since_asked(sums)
    return {
        "gauges": gauges,
        "counters": {name: n for name, n in added.items() if isinstance(name, str)},
        "classes": {
            name: account | {kind: added[name, kind] for kind in ("tokens", "booked_nats")}
            for name, account in accounts.items()
        },
    }


def _accounts(controller: Controller) -> dict[str, Any] | None:
    budget = controller.budget
    return None if budget is None else budget.status(controller.classes.names)


def _load(controller: Controller) -> dict[str, Any] | None:
    target, load = controller.options.target_ms, controller.load
    if target is None:
        return None
    return {
        "target_ms": target,
        "met": load.met,
        "owed_ms": 1e3 * load.owed,
        "ceiling": load.ceiling(len(controller.facts.decoding)),
        "kept": load.met >= 1 - 2 * MISSED,
    }
