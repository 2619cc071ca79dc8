# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test folders share."""

from pathlib import Path

import pytest

from demo.get_model import get_model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the SmolLM2-135M-Instruct checkpoint, downloaded and converted once."""
    return get_model()
