# SPDX-License-Identifier: Apache-2.0
"""Tokens per second in real vLLM engines, beside the choices that vLLM itself offers on a CPU."""
