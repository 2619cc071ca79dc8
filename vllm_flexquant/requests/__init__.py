# SPDX-License-Identifier: Apache-2.0
"""What a request is granted, and the accounts that budgets are kept on."""
