# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests of the controller: its two forms on a CPU."""

import pytest

from flexquant_kernels import load_native, ops


@pytest.fixture(params=["native", "arrays"])
def machinery(request, monkeypatch):
    """Policy `budget` and the averages by the native kernels, and in NumPy's arrays."""
    if request.param == "native":
        status = load_native()
        if not status.loaded:
            pytest.skip(status.reason)
    else:
        monkeypatch.setattr(ops, "native_status", lambda: ops.NativeStatus(False, "as asked"))
