# SPDX-License-Identifier: Apache-2.0
"""Which instruction sets the machine offers, and the choice among them."""

import logging
import os
import subprocess
import sys

import pytest
import torch

import flexquant_kernels as fk
from flexquant_kernels import ops
from flexquant_kernels.cpu import build
from flexquant_kernels.cpu import native as native_isas

VARIABLE = native_isas.ISA_VARIABLE
SELECTED = """
import logging, sys
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
import flexquant_kernels as fk
print(fk.load_native().isa)
"""


def _load_with(name: str) -> subprocess.CompletedProcess[str]:
    """Load the kernels in a process of its own whose variable names an instruction set."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), VARIABLE: name}
    command = [sys.executable, "-c", SELECTED]
    return subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.usefixtures("native")
def test_library_and_processor_flags_agree() -> None:
    """What the library finds by asking the processor, and what Linux lists, less its refusals."""
    listed = [isa for isa in native_isas.isas_of_machine() if not native_isas.why_not(isa)]
    found = fk.supported_isas()
    assert found
    assert [isa for isa in listed if isa in found] == list(found)
    assert set(listed) - set(found) <= {"amx_int8"}  # Linux may refuse tiles to a process


@pytest.mark.usefixtures("native")
def test_best_is_selected_at_first_unless_the_variable_is_set() -> None:
    done = _load_with("")
    assert done.stdout.splitlines() == [fk.supported_isas()[0]], done.stderr


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", native_isas.ISAS)
def test_variable_names_the_instruction_set(name: str) -> None:
    lines = _load_with(name).stdout.splitlines()
    supported = fk.supported_isas()
    if name in supported:
        assert lines == [name]
    else:  # the best below the one named, else the best
        below = native_isas.ISAS[native_isas.ISAS.index(name) :]
        assert lines[-1] == next((isa for isa in below if isa in supported), supported[0])
        assert f"WARNING {VARIABLE} is {name}, which this machine does not offer (" in lines[0]
        assert f"using {lines[-1]}. It supports {', '.join(supported)}." in lines[0]


@pytest.mark.parametrize(
    ("supported", "wanted", "chosen"),
    [
        (("avx_vnni", "avx2"), "amx_int8", "avx_vnni"),
        (("avx512_vnni", "avx2"), "avx_vnni", "avx2"),
        (("amx_int8", "avx2"), "neon_dotprod", "amx_int8"),
        (("neon_dotprod",), "avx2", "neon_dotprod"),
    ],
)
def test_named_but_not_offered_takes_the_best_below(
    monkeypatch, caplog, supported, wanted, chosen
) -> None:
    monkeypatch.setattr(native_isas, "supported_isas", lambda: supported)
    monkeypatch.setenv(VARIABLE, wanted)
    with caplog.at_level(logging.WARNING, native_isas.logger.name):
        assert native_isas.choose_isa() == chosen
    assert f"using {chosen}." in caplog.text


def test_variable_with_an_unknown_name_is_refused(monkeypatch) -> None:
    """Before anything is built: a slip of the pen must not end in a choice nobody made."""
    monkeypatch.setenv(VARIABLE, "avx512")
    for call in (native_isas.wanted_isa, lambda: build.load(build=False)):
        with pytest.raises(ValueError, match=r"VLLM_FLEXQUANT_ISA is 'avx512'.*avx512_vnni.*unset"):
            call()


@pytest.mark.usefixtures("selected")
def test_selecting() -> None:
    for isa in fk.supported_isas():
        assert fk.select_isa(isa) == isa
        assert native_isas.selected_isa() == fk.native_status().isa == isa
        assert isa in fk.native_status().reason
    before = native_isas.selected_isa()
    other = "neon_dotprod" if native_isas.machine() == "x86_64" else "avx2"
    for name, reason in ((other, "this CPU is no"), ("", "no such name"), ("AVX2", "no such name")):
        with pytest.raises(ValueError, match=f"{name!r} cannot be selected: {reason}.*supports"):
            fk.select_isa(name)
    assert native_isas.selected_isa() == before


def test_nothing_is_offered_while_nothing_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr(native_isas, "_library", None)
    assert fk.supported_isas() == ()
    assert native_isas.selected_isa() == "none"
    with pytest.raises(RuntimeError, match="not loaded: call load_native"):
        fk.select_isa("avx2")


def test_machine_without_any_instruction_set_is_told(native, monkeypatch) -> None:
    monkeypatch.setattr(native_isas, "supported_isas", lambda: ())
    with pytest.raises(build.NativeUnavailableError, match="offers none of the instruction sets"):
        build.load()


def test_row_paths_cover_every_instruction_set() -> None:
    for isa in (*native_isas.ISAS, "none"):
        paths = ops.row_paths(isa)
        assert paths
        assert all(rows and what for rows, what in paths)


@pytest.mark.parametrize("tile", [0, 16])
def test_clamped_widths_are_counted_and_reported_once(
    native, make_weight, monkeypatch, caplog, tile: int
) -> None:
    weight = make_weight(17, 64)
    planes, scales = weight.tiled, weight.tiled_scales
    if tile == 0:
        planes, scales = weight.planes, weight.scales
    monkeypatch.setattr(ops, "_clamped", 0)
    before = fk.clamped_calls()
    with caplog.at_level(logging.WARNING, ops.logger.name):
        for width in (4, 5, 6, 8, 9, 0):
            torch.ops.flexquant.linear(
                torch.ones(1, 64), planes, scales, torch.tensor([width], dtype=torch.int32),
                None, weight.layout, 32, 17, tile,
            )  # fmt: skip
    assert fk.clamped_calls() - before == 3
    if tile == 0:
        (record,) = caplog.records
        assert "asked for width 5, which is not in layout (4, 2, 2), and uses 6" in record.message
