# SPDX-License-Identifier: Apache-2.0
"""Self-speculation: when and how far to draft, and what is counted of it."""
