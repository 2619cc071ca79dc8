# SPDX-License-Identifier: Apache-2.0
"""`flexquant trace`, before servers that refuse or send it elsewhere."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from vllm_flexquant.cli.trace import OPERATOR_HEADER, fetch
from vllm_flexquant.server import endpoint


@pytest.fixture
def serve():
    """Makes a server that answers with a status and headers, and keeps the headers it was sent."""
    servers = []

    def make(status, content=b"", **headers):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append((self.path, dict(self.headers)))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def test_both_keys_are_sent_and_a_refusal_is_told(serve, tmp_path):
    server = serve(401, b'{"error": {"message": "not the operator key"}}')
    with pytest.raises(ValueError, match="/v1/flexquant/trace answers 401: not the operator key"):
        fetch(server.url, "user", "operator", tmp_path / "steps.npz")
    [(path, headers)] = server.asked
    assert path == endpoint.TRACE_PATH
    assert headers["Authorization"] == "Bearer user"
    assert headers["X-Flexquant-Key"] == "operator"
    assert OPERATOR_HEADER == endpoint.OPERATOR_HEADER


def test_another_server_gets_no_key(serve, tmp_path):
    other = serve(404)
    server = serve(302, Location=f"{other.url}/elsewhere")
    with pytest.raises(ValueError, match="answers 404: is it a vLLM server"):
        fetch(server.url, "user", "operator", tmp_path / "steps.npz")
    [(path, headers)] = other.asked
    assert path == "/elsewhere"
    assert not {"Authorization", "X-Flexquant-Key"} & headers.keys()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("user\r\nHost: other", ""), "--api-key has a character that no header can hold"),
        (("", "schlüssel"), "--operator-key has a character that no header can hold"),
    ],
)
def test_a_key_that_no_header_can_hold(keys, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fetch("http://127.0.0.1:1", *keys, tmp_path / "steps.npz")
