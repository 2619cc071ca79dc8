# SPDX-License-Identifier: Apache-2.0
"""Turning weights into nested codes and scales."""
