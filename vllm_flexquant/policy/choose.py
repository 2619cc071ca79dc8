# SPDX-License-Identifier: Apache-2.0
"""From options to the policy that they ask for."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_flexquant.options import PINNED, FlexQuantOptions
from vllm_flexquant.policy.decision import LevelPolicy
from vllm_flexquant.policy.entropy import EntropyPolicy
from vllm_flexquant.policy.progressive import ProgressivePolicy
from vllm_flexquant.policy.static import FixedPolicy


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


def make_policy(options: FlexQuantOptions, mean_bits: Sequence[float]) -> LevelPolicy:
    """The policy that `options` ask for, where it is not `budget`.

    Args:
        mean_bits: of each level of the ladder, cheapest first.

    Raises:
        ValueError: `level` is not on the ladder.
    """
    levels = len(mean_bits)
    if options.policy in PINNED:
        level = levels - 1 if options.level is None else options.level
        if level >= levels:
            raise ValueError(
                f"level {level} is not on the ladder, which has levels 0 to {levels - 1}"
            )
        return FixedPolicy(level)
    if options.policy == "load":
        return FixedPolicy(levels - 1)  # what load leaves of it
    if options.policy == "progressive":
        lowest = min(range(levels), key=lambda n: abs(mean_bits[n] - options.progressive_bits))
        return ProgressivePolicy(
            levels, lowest, options.progressive_full, options.progressive_tokens
        )
    return EntropyPolicy(
        levels=levels,
        low=options.entropy_low,
        high=options.entropy_high,
        hysteresis=options.hysteresis,
        dwell=options.dwell,
        aggregate=options.aggregate,
        quantile=options.quantile,
    )
