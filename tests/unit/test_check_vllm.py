# SPDX-License-Identifier: Apache-2.0
"""What we use of vLLM, looked for in its sources."""

import sysconfig
from pathlib import Path

import pytest

from tools import check_vllm

INSTALLED = Path(sysconfig.get_paths()["purelib"]) / "vllm"


def test_the_installed_version_has_it_all():
    assert list(check_vllm.missing(INSTALLED)) == []
    assert len(set(check_vllm.imported())) > 40


@pytest.mark.parametrize(
    ("table", "entry", "message"),
    [
        ("CALLED", {"v1/worker/gpu_model_runner.py": {"A._go": ()}}, "has no A._go"),
        ("CALLED", {"v1/no_such.py": {"f": ()}}, "v1/no_such.py has no f"),
        (
            "CALLED",
            {"v1/engine/input_processor.py": {"InputProcessor.process_inputs": ("mood",)}},
            "InputProcessor.process_inputs in v1/engine/input_processor.py takes no mood",
        ),
        ("FIELDS", {"v1/worker/gpu_input_batch.py": ("no_such",)}, "sets no no_such"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, table, entry, message):
    monkeypatch.setattr(check_vllm, table, entry)
    assert [line for line in check_vllm.missing(INSTALLED) if message in line]


def test_an_import_that_went_is_named(tmp_path):
    (tmp_path / "logger.py").write_text("def other(): ...\n")
    found = "\n".join(check_vllm.missing(tmp_path))
    assert "vllm.logger has no init_logger, which vllm_flexquant/host/" in found
    assert "vllm.distributed is not there" in found
