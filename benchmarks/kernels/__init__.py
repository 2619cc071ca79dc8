# SPDX-License-Identifier: Apache-2.0
"""How fast one linear layer runs: our kernels at each width beside what vLLM offers there."""
