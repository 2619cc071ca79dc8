# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_flexquant.cli`, for where the console script is not on the path."""

from vllm_flexquant.cli import main

main()
