# SPDX-License-Identifier: Apache-2.0
import subprocess
from pathlib import Path

import pytest

from benchmarks import bench
from benchmarks.bench import STAGES, Run, command_of, fingerprint, read_options


def test_quick_results_stay_out_of_what_is_committed():
    assert "benchmarks/out/" in read_options(["--quick"]).out.as_posix()
    assert "benchmarks/results/" in read_options([]).out.as_posix()


def test_an_unknown_stage_is_named(capsys):
    with pytest.raises(SystemExit):
        read_options(["--stages", "sped"])
    assert "--stages: sped is none of speed, quality" in capsys.readouterr().err


def test_a_stage_is_done_only_by_the_same_command_and_sources(tmp_path):
    stage = STAGES[0]
    run = Run(tmp_path)
    assert not run.is_done(stage, ["a"], "s")
    run.add(stage, ["a"], "s", 1.0)
    assert not run.is_done(stage, ["a"], "s")  # its results are gone
    stage.file(tmp_path).write_text("{}")
    again = Run(tmp_path)
    assert again.is_done(stage, ["a"], "s")
    assert not again.is_done(stage, ["b"], "s")
    assert not again.is_done(stage, ["a"], "t")
    assert not again.is_done(STAGES[1], ["a"], "s")


def test_commands_name_model_checkpoint_and_trace(tmp_path):
    options = read_options(["--out", str(tmp_path), "--trace", "t.csv"])
    words = {s.name: command_of(s, options, "M", Path("C")) for s in STAGES}
    assert words["speed"][:2] == ["-m", "benchmarks.serving.run"]
    assert words["replay"][-2:] == ["--trace", "t.csv"]
    assert "--trace" not in words["speed"]
    assert words["policies"][4:6] == ["--checkpoint", "C"]


def test_sources_are_told_apart(tmp_path):
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / "benchmarks" / "report").mkdir(parents=True)
    file = tmp_path / "benchmarks" / "a.py"
    file.write_text("1")
    first = fingerprint(tmp_path)
    (tmp_path / "benchmarks" / "report" / "b.py").write_text("1")
    assert fingerprint(tmp_path) == first  # figures do not depend on how they are shown
    file.write_text("2")
    assert fingerprint(tmp_path) != first


def test_every_stage_can_be_run():
    for stage in STAGES:
        path = bench.ROOT / Path(*stage.module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
