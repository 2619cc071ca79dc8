# SPDX-License-Identifier: Apache-2.0
"""An application with our routes, made as vLLM makes it, of one engine with one rank."""

import pytest
from fastapi.testclient import TestClient

from tests.server.served import Client, Rank, application


@pytest.fixture
def rank():
    return Rank()


@pytest.fixture
def client(rank):
    return Client([[rank]])


@pytest.fixture
def http(client):
    with TestClient(application(client)) as made:
        yield made
