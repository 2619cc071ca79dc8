# SPDX-License-Identifier: Apache-2.0
"""What tests of measuring compare with."""

import pytest
import torch


@pytest.fixture(scope="module")
def whole(tiny_model):
    """The tiny model as transformers runs it, fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
