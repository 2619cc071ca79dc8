# SPDX-License-Identifier: Apache-2.0
"""Measurements that are kept: each writes its numbers with where they come from."""
