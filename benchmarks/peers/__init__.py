# SPDX-License-Identifier: Apache-2.0
"""Other programs that serve the same weights, measured in the same runs."""
