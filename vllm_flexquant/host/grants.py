# SPDX-License-Identifier: Apache-2.0
"""What a request that runs was granted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm_flexquant.requests.grant import Grant, Terms

logger = init_logger(f"vllm.{__name__}")


def grant_of(terms: Terms, params: Any) -> Grant:
    """By the same terms as at the front end; a request that came past it must not fail now.

    Args:
        params: `SamplingParams`, None for a pooling request.
    """
    try:
        return terms.grant(params.extra_args if params else None)
    except ValueError:
        # not the message, which holds what a client wrote
        logger.warning_once(
            "flexquant: a request came past vLLM's input processor with arguments that cannot be "
            "kept; such requests run at all bits"
        )
        return terms.strictest()
