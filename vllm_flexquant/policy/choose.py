# SPDX-License-Identifier: Apache-2.0
"""From options to the policy that they ask for."""

from __future__ import annotations

from collections.abc import Sequence

from flexquant_kernels.state import AGGREGATES
from vllm_flexquant.options import PINNED, FlexQuantOptions
from vllm_flexquant.policy.budget import Budget
from vllm_flexquant.policy.entropy import Entropy
from vllm_flexquant.policy.progressive import Progressive
from vllm_flexquant.policy.protocol import Policy, least_move
from vllm_flexquant.policy.static import Static


def resolve_policy(options: FlexQuantOptions, calibrated: bool) -> FlexQuantOptions:
    """`options` with a policy in place of `auto`.

    Raises:
        ValueError: policy budget is asked for, but no KL is known.
    """
    if options.policy == "auto":
        # speculation is what costs no quality
        chosen = "static" if options.speculate else "budget" if calibrated else "entropy"
        return options.model_copy(update={"policy": chosen})
    if options.policy == "budget" and not calibrated:
        raise ValueError(
            "policy budget needs a calibrated checkpoint, and this one has no measured KL; "
            "make one with `flexquant quantize MODEL OUT`, or choose policy entropy"
        )
    return options


def make_policy(name: str, probe_layer: int) -> Policy:
    """The policy of a resolved name.

    Args:
        probe_layer: as `State.probe_layer`.
    """
    if name == "budget":
        return Budget(probe_layer)
    if name == "progressive":
        return Progressive()
    if name == "entropy":
        return Entropy()
    return Static(pinned=name in PINNED)


def parameters(options: FlexQuantOptions, mean_bits: Sequence[float]) -> dict[str, float]:
    """What of the options a decision reads: values by their names in the `State`.

    Args:
        mean_bits: of each level of the ladder, cheapest first.

    Raises:
        ValueError: `level` is not on the ladder.
    """
    levels = len(mean_bits)
    level = levels - 1 if options.level is None else options.level
    if level >= levels:
        raise ValueError(f"level {level} is not on the ladder, which has levels 0 to {levels - 1}")
    bits = options.progressive_bits
    return {
        "horizon": options.budget_horizon,
        "least_move": least_move(options.hysteresis, levels),
        "quantile": options.quantile,
        "entropy_low": options.entropy_low,
        "entropy_high": options.entropy_high,
        "falling": options.progressive_tokens,
        "full": options.progressive_full,
        "lowest": min(range(levels), key=lambda n: abs(mean_bits[n] - bits)),
        "pinned": level,
        "dwell": options.dwell,
        "aggregate": AGGREGATES.index(options.aggregate),
        "by_average": options.signal in ("entropy", "both"),
    }
