# SPDX-License-Identifier: Apache-2.0
"""What is told of an engine's steps: records, sums that only grow, snapshots, replay."""
