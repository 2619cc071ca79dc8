# SPDX-License-Identifier: Apache-2.0
"""vLLM plugin that serves one nested copy of the weights at a width chosen anew at every step.

Importing this package loads neither torch nor vLLM: `vllm_flexquant.plugin.register` is called by
vLLM in every one of its processes.
"""

__version__ = "0.1.0.dev0"
