# SPDX-License-Identifier: Apache-2.0
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import by_hand
import pytest
import torch
from rich.console import Console

from benchmarks.provenance import package_versions
from demo import live, report, server
from demo.prompts import PROMPTS
from demo.run import calibrated_checkpoint, take_turn


def status(ids: str = "", **options):
    """What a worker tells after five steps of these requests."""
    made = by_hand.planner(**options)
    told = by_hand.telemetry(made)
    for slot in range(len(ids)):
        by_hand.start(made, slot)
    for _ in range(5 if ids else 0):
        made.step(by_hand.batch(ids))
        made.logits(torch.linspace(0, 40, 40).repeat(len(ids), 1))
    return told.now()


def row(speed: float, kl: float) -> dict:
    steps = {"mean_bits": 6.0, "bytes_per_step": 1e8}
    text = {"kl": kl, "kl_standard_error": kl / 10, "top1": 0.9}
    chat = {"tokens_per_second": speed}
    return {"chat": chat, "chat_steps": steps, "text": text, "text_steps": steps}


def printed(what) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(what)
    return console.export_text()


def test_a_calibrated_checkpoint_beside_the_model_is_found(tmp_path):
    model = tmp_path / "some-model"
    assert calibrated_checkpoint(model) is None
    (tmp_path / "some-model-flexquant").mkdir()
    assert calibrated_checkpoint(model) is None  # not complete
    (tmp_path / "some-model-flexquant" / "flexquant.json").write_text("{}")
    assert calibrated_checkpoint(model) == tmp_path / "some-model-flexquant"


def test_prompts_are_a_dozen_different_ones():
    assert len(set(PROMPTS)) == 12


def test_live_view_shows_status_and_answer():
    told = status("ab")
    nats = told["gauges"]["entropy_nats"]
    text = printed(live.view("entropy", told, "first\nlast line"))
    widths = "".join(str(layer["width"]) for layer in told["layers"])
    bits, level = f"{told['mean_bits']:.2f} bits", f"level {told['level']:>3} of 10"
    for part in (bits, f"{nats:.2f} nats", "2 requests", "step 5", level, widths, "last"):
        assert part in text
    assert 4 <= told["mean_bits"] < 8


def test_live_view_of_an_idle_server():
    text = printed(live.view("x", status(policy="static"), ""))
    assert "0 requests" in text
    assert "entropy -" in text


def test_table_has_ratios_and_fits_a_terminal():
    rows = report.with_ratios({"fp32": row(100, 0.001), "static 8": row(150, 0.0123)}, "fp32")
    assert rows["static 8"]["speed_to_baseline"] == 1.5
    text = printed(report.table(rows, "fp32"))
    assert "1.50 x" in text
    assert "to fp32" in text
    assert "0.0123 ± 0.0012" in text
    assert "bits: chat" in text
    assert "…" not in text


def test_remarks_name_the_reference():
    assert "dequantized GGUF" in report.notes("bf16", True, 9, 3, [])
    assert "calibrated checkpoint" in report.notes("bf16", True, 9, 3, [], calibrated=True)
    plain = report.notes("bf16", False, 9, 3, ["amx_bf16"])
    assert "GGUF" not in plain
    assert "AMX" in plain
    assert "without calibration" in plain


def test_the_baseline_is_named_with_its_reason():
    emulated = report.notes("fp32", False, 9, 3, ["avx2"])
    assert "Baseline: fp32. This CPU has no instructions for bf16" in emulated
    assert "for fp32 4 bytes per weight" in emulated
    native = report.notes("bf16", False, 9, 3, ["avx512_bf16"])
    assert "Baseline: bf16" in native
    assert "for bf16 2 bytes per weight" in native


@pytest.fixture
def fake_server(tmp_path, monkeypatch):
    """A VllmServer whose command is a Python program."""

    def make(code: str) -> server.VllmServer:
        monkeypatch.setattr(server, "find_vllm", lambda: Path("unused"))
        made = server.VllmServer("m", (), {}, tmp_path / "log" / "server.log")
        made.command = [sys.executable, "-u", "-c", code, str(made.port)]
        return made

    return make


LISTEN = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_server_goes_with_its_children(fake_server):
    running = fake_server(LISTEN)
    running.start()
    child = int(running.log.read_text().split()[0])
    assert alive(child)
    with pytest.raises(KeyboardInterrupt), running:
        raise KeyboardInterrupt
    for _ in range(50):
        if not alive(child):
            break
        time.sleep(0.1)
    assert not alive(child)


def test_servers_are_launched_together_and_take_turns(fake_server):
    first, second = servers = fake_server(LISTEN), fake_server(LISTEN)
    try:
        for running in servers:
            running.launch()
        for running in servers:
            running.wait()
            assert running.start_seconds > 0
        take_turn(second, first)
        assert second._healthy()
        with pytest.raises(TimeoutError):
            urlopen(f"{first.url}/health", timeout=0.5)
        take_turn(first, second)
        assert first._healthy()
    finally:
        for running in servers:
            running.stop()


def test_server_that_ignores_the_kind_signal_is_killed(fake_server, monkeypatch):
    monkeypatch.setattr(server, "STOP_SECONDS", 0.5)
    ignoring = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    running = fake_server(ignoring + LISTEN)
    running.start()
    process = running._process
    running.stop()
    assert process is not None
    assert process.returncode == -signal.SIGKILL


def test_server_that_dies_shows_its_last_lines(fake_server):
    dying = fake_server("print('the reason'); raise SystemExit(3)")
    with pytest.raises(
        server.ServerError, match=r"status 3:(.|\n)*\| the reason\n(.|\n)*server\.log"
    ):
        dying.start()


@pytest.mark.skipif(package_versions()["vllm"] is None, reason="needs the vllm command")
def test_vllm_command_is_found():
    assert server.find_vllm().name == "vllm"


@pytest.mark.slow
def test_demo_refuses_a_model_that_is_not_there(tmp_path):
    command = [sys.executable, "-m", "demo.run", "--out", str(tmp_path), "--model"]
    run = subprocess.run(
        [*command, str(tmp_path / "none")],
        cwd=server.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "demo: " in run.stdout
    assert "Traceback" not in run.stderr
