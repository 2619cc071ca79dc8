# SPDX-License-Identifier: Apache-2.0
"""Entry point `vllm.endpoint_plugins`: `/v1/flexquant`, the operator's view.

vLLM loads endpoint plugins only if `VLLM_PLUGINS` names them.
"""

from vllm_flexquant.server.endpoint import FlexQuantEndpoint

__all__ = ["FlexQuantEndpoint"]
