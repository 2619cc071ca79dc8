# SPDX-License-Identifier: Apache-2.0
"""Entry point `vllm.general_plugins`: makes the quantization method known in every vLLM process.

What it changes in vLLM, and why, is in `host/README.md`.
"""

from __future__ import annotations

import logging
import os

DISABLE = "VLLM_FLEXQUANT_DISABLE"

logger = logging.getLogger(f"vllm.{__name__}")

_warned = False


def register() -> None:
    """Make `--quantization flexquant` known. Idempotent, cheap, touches no device.

    Where vLLM is not as we know it, models that do not use flexquant are served as ever, and a
    warning says why flexquant is not there.

    The environment variable VLLM_FLEXQUANT_DISABLE=1 makes this do nothing.
    """
    global _warned
    if os.environ.get(DISABLE) == "1":
        return
    try:
        from vllm_flexquant.host import engine_args

        engine_args.install(again=register)
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        if not _warned:
            _warned = True
            logger.warning("flexquant is not available: %s", error)
