# SPDX-License-Identifier: Apache-2.0
"""From the facts of a step to the precision table: one planner per worker."""
