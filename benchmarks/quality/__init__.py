# SPDX-License-Identifier: Apache-2.0
"""How far served tokens are from the unquantized model."""
