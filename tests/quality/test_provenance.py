# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import subprocess

import pytest

from benchmarks import provenance


def test_facts_are_plain_values(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    text = tmp_path / "text.txt"
    text.write_text("words")
    facts = provenance.provenance(tmp_path, text)
    assert json.loads(json.dumps(facts)) == facts
    digest = hashlib.sha256(b"weights").hexdigest()
    assert facts["model"]["sha256"] == {"model.safetensors": digest}
    assert facts["text"]["sha256"] == hashlib.sha256(b"words").hexdigest()
    assert facts["machine"]["cores"] >= 1
    assert facts["time_utc"].endswith("+00:00")
    assert set(facts["versions"]) == {"python", *provenance.PACKAGES}
    assert str(tmp_path.parent) not in json.dumps(facts["model"])


def test_command_names_no_folder_of_this_machine():
    inside = str(provenance.ROOT / "demo" / "out")
    words = ["python", "-m", "demo.run", "--out", inside, "--model", "/a/b c/model"]
    line = provenance.command_line([*words, "code=/x/y.txt"])
    assert line == "python -m demo.run --out demo/out --model .../model code=.../y.txt"


def test_git_state(tmp_path):
    def git(*args):
        identity = ("-c", "user.name=n", "-c", "user.email=e")
        subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True)

    git("init", "--quiet")
    assert provenance.git_state(tmp_path) == {"sha": None, "dirty": False}
    git("commit", "--allow-empty", "--message", "m")
    state = provenance.git_state(tmp_path)
    assert len(state["sha"]) == 40
    assert state["dirty"] is False
    (tmp_path / provenance.RESULTS / "m").mkdir(parents=True)
    (tmp_path / provenance.RESULTS / "m" / "a.json").write_text("")
    assert provenance.git_state(tmp_path)["dirty"] is False
    (tmp_path / "new").write_text("")
    assert provenance.git_state(tmp_path)["dirty"] is True


def test_results_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "results.json"
    provenance.write_json(path, {"kl": 1.0}, {"git": {}})
    assert json.loads(path.read_text()) == {"provenance": {"git": {}}, "results": {"kl": 1.0}}
    with pytest.raises(TypeError):
        provenance.write_json(path, {"kl": object()}, {})
    assert json.loads(path.read_text())["results"] == {"kl": 1.0}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
