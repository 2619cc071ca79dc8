# SPDX-License-Identifier: Apache-2.0
"""What runs inside the vLLM worker: layers, precision table, signals, policy, hooks."""
