# SPDX-License-Identifier: Apache-2.0
"""The terms of an engine, from what its config carries."""

from __future__ import annotations

from vllm_flexquant.format.checkpoint import StoredConfig
from vllm_flexquant.format.record import CalibrationRecord
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.policy.choose import resolve_policy
from vllm_flexquant.requests.grant import Kept, Terms


def terms_of(
    options: FlexQuantOptions,
    stored: StoredConfig | None,
    calibration: CalibrationRecord | None,
    rounds_activations: bool = False,
) -> Terms:
    """What requests get.

    Args:
        rounds_activations: the layers' kernels round them to int8, which costs KL at any width.

    Raises:
        ValueError: a policy that the checkpoint has no figures for, or too many classes.
    """
    widths = (stored.widths if stored else ()) or options.layout.widths
    return Terms.of(options, widths, _kept(options, calibration, rounds_activations))


def _kept(
    options: FlexQuantOptions, calibration: CalibrationRecord | None, rounds_activations: bool
) -> Kept:
    ladder = None if calibration is None else calibration.ladder
    policy = resolve_policy(options, calibrated=ladder is not None).policy
    if ladder is None:
        return Kept(None, "this server keeps none: its checkpoint is not calibrated")
    if policy != "budget":
        return Kept(None, f"this server keeps none under policy {policy}")
    best = min(rung.kl_nats for rung in ladder.rungs)
    if rounds_activations and calibration is not None and calibration.int8_activations:
        best += calibration.int8_activations[0]
    return Kept(best)
