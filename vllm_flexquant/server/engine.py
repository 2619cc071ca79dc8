# SPDX-License-Identifier: Apache-2.0
"""The engine that a server speaks to."""

from __future__ import annotations

from typing import Any

from vllm_flexquant.options import METHOD


def flexquant_engine(app: Any) -> Any:
    """The engine client of a FastAPI application, None if it serves no flexquant model."""
    engine = getattr(app.state, "flexquant_engine", None)
    if engine is None or engine.model_config.quantization != METHOD:
        return None
    return engine
