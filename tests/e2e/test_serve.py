# SPDX-License-Identifier: Apache-2.0
"""`vllm serve MODEL --quantization flexquant` as typed, behind an API key."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_flexquant.cli.trace import fetch

KEY = "secret"
OPERATOR_KEY = "secret-of-the-operator"
PATH = "/v1/flexquant"


class Server:
    """A running server and how to ask it."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, path, body=None, key=KEY, operator_key=OPERATOR_KEY):
        """(status, answer) of a GET, or of a POST of `body`."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data)
        request.add_header("Content-Type", "application/json")
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        if operator_key:
            request.add_header("X-FlexQuant-Key", operator_key)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def view(self):
        """The view as it is now: a change, even of nothing, ends what was kept for a second."""
        status, view = self.ask(PATH, {})
        assert status == 200
        return view

    def metrics(self):
        """Values of our metrics by name, as `/metrics` shows them without a key."""
        self.view()
        with urllib.request.urlopen(self.url + "/metrics", timeout=120) as answer:
            lines = answer.read().decode().splitlines()
        named = [line.rpartition(" ") for line in lines if line.startswith("vllm:flexquant_")]
        return {name.partition("{")[0]: float(value) for name, _, value in named}

    def chat(self, tokens=8, **extra):
        message = {"role": "user", "content": "Name three colours."}
        body = {"model": "smol", "messages": [message], "max_tokens": tokens, "temperature": 0}
        return self.ask("/v1/chat/completions", body | extra)


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(smollm2)]
    command += ["--quantization", "flexquant", "--api-key", KEY, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--max-model-len", "1024", "--served-model-name", "smol"]
    command += ["--enforce-eager"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ
            | {
                "VLLM_PLUGINS": "flexquant",
                "VLLM_FLEXQUANT_OPERATOR_KEY": OPERATOR_KEY,
                "VLLM_FLEXQUANT_TRACE_STEPS": "200",
            },
            start_new_session=True,
        )
    made = Server(port)
    try:
        for _ in range(180):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                if made.ask("/v1/models")[0] == 200:
                    break
            except OSError:
                time.sleep(1)
        else:
            raise AssertionError(log.read_text()[-3000:])
        made.log = log
        yield made
    finally:
        process.terminate()
        process.wait(60)


def test_one_line_says_what_is_in_force(server):
    lines = [line for line in server.log.read_text().splitlines() if "layers in planes" in line]
    assert len(lines) == 1
    assert "121 layers in planes 4|2|2" in lines[0]
    assert "policy entropy, prefill full, bounds 2 to 8 bits; kernel" in lines[0]


def test_the_operator_sees_and_changes_the_policy(server):
    with ThreadPoolExecutor(1) as pool:
        chat, seen = pool.submit(server.chat, 300, ignore_eos=True), []
        while not chat.done():
            seen += server.ask(PATH)[1]["requests"]
            time.sleep(0.2)
        assert chat.result()[0] == 200
    assert any(request["entropy_nats"] for request in seen)
    view = server.view()
    assert len(view["layers"]) == 121
    assert view["options"]["policy"] == "entropy"
    assert {"name", "width", "kernel", "why"} <= view["layers"][0].keys()
    assert server.ask(PATH, {"width": 6})[0] == 200
    assert server.chat()[0] == 200
    view = server.view()
    assert {layer["width"] for layer in view["layers"]} == {6}
    assert view["mean_bits"] == 6
    assert server.ask(PATH, {"policy": "entropy"})[1]["options"]["width"] is None
    assert server.ask(f"{PATH}?trace=1")[1]["trace"][-1]["widths"]


def test_metrics_follow_the_steps(server):
    server.ask(PATH, {"width": 6})
    before = server.metrics()
    assert server.chat(20, ignore_eos=True)[0] == 200
    after = server.metrics()
    steps, bits = (
        after[f"vllm:flexquant_{name}_total"] - before[f"vllm:flexquant_{name}_total"]
        for name in ("decode_steps", "decode_step_bits")
    )
    assert steps == 19  # the first token comes of the prompt
    assert bits == pytest.approx(6 * steps)  # a difference of sums
    assert after["vllm:flexquant_mean_bits"] == 6
    assert after["vllm:flexquant_unknown_rows_total"] == 0
    server.ask(PATH, {"policy": "entropy"})


def test_two_keys_guard_it(server, tmp_path):
    assert server.ask(PATH, key=None)[0] == 401
    assert server.ask(PATH, {"width": 6}, key="wrong")[0] == 401
    status, view = server.ask(PATH, operator_key=None)
    assert status == 200
    assert "requests" not in view
    for given in (None, KEY):
        assert server.ask(PATH, {"width": 6}, operator_key=given)[0] == 401
        assert server.ask(f"{PATH}?trace=1", operator_key=given)[0] == 401
    out = tmp_path / "steps.npz"
    with pytest.raises(ValueError, match="answers 401: this is the operator's alone"):
        fetch(server.url, KEY, "", out)
    assert fetch(server.url, KEY, OPERATOR_KEY, out).startswith(f"{out}: ")
    log = server.log.read_text()
    assert OPERATOR_KEY not in log
    assert OPERATOR_KEY not in json.dumps(server.view())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not valid JSON"),
        ([1], "the body is a list; give an object"),
        ({"policy": "guess"}, "option 'policy' is 'guess'"),
        ({"bits": 6}, "unknown option 'bits'; options that can be changed are policy"),
        ({"width": 9}, "option 'width' is 9"),
        ({"width": 5}, "width 5 is not in layout 4|2|2; it has 4, 6, 8"),
        ({"level": 9999}, "level 9999 is not on the ladder"),
        ({"min_bits": 8, "max_bits": 4}, "min_bits 8 is above max_bits 4"),
    ],
)
def test_a_bad_post_is_a_400_and_changes_nothing(server, body, message):
    before = server.view()["options"]
    status, answer = server.ask(PATH, body)
    assert status == 400
    assert message in answer["error"]["message"]
    assert server.view()["options"] == before


def test_a_bad_request_is_a_400_and_its_neighbours_finish(server):
    with ThreadPoolExecutor(4) as pool:
        good = [pool.submit(server.chat, 24) for _ in range(3)]
        status, answer = server.chat(vllm_xargs={"flexquant_min_bits": 11})
        assert status == 400
        assert "flexquant_min_bits is 11; give an integer from 2 to 8" in json.dumps(answer)
        status, answer = server.chat(vllm_xargs={"flexquant_bits": 4})
        assert status == 400
        assert "unknown key 'flexquant_bits'" in json.dumps(answer)
        assert [f.result()[0] for f in good] == [200, 200, 200]


def test_a_floor_over_http(server):
    server.ask(PATH, {"width": 4})
    assert server.chat(40, vllm_xargs={"flexquant_min_bits": 8}, ignore_eos=True)[0] == 200
    trace = server.ask(f"{PATH}?trace=1")[1]["trace"]
    assert all(set(record["widths"]) == {8} for record in trace[-40:])
    server.ask(PATH, {"policy": "entropy"})
