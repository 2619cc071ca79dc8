# SPDX-License-Identifier: Apache-2.0
"""Requests of every kind that the routes' OpenAPI description can be made into, or fails."""

import by_hand
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import unsupported_method

from tests.server.served import OPERATOR, Client, Worker, application

WORKER = Worker(by_hand.planner(policy="entropy", trace_steps=4))
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", application(Client([[WORKER]])))
OURS = SCHEMA.include(path_regex="^/v1/flexquant")


@pytest.mark.slow
@pytest.mark.parametrize("headers", [{}, OPERATOR])
@OURS.parametrize()
@settings(
    max_examples=300,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_no_request_ends_in_an_error_of_the_server(case, headers):
    before = WORKER.planner.options
    case.call_and_validate(headers=headers, checks=[not_a_server_error, unsupported_method])
    if not headers:
        assert WORKER.planner.options is before
