# SPDX-License-Identifier: Apache-2.0
"""Where we meet vLLM: the only folder that imports or patches it."""
