# SPDX-License-Identifier: Apache-2.0
"""How the Triton linear layer is launched: tables, heuristic, and what is compiled beforehand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ENTRY = {
    "layout": "4|2|2", "n": 4096, "k": 4096, "rows": 8,
    "block": 8, "splits": 4, "warps": 4, "stages": 3,
}  # fmt: skip
TABLE = {"format": 1, "target": "sm_90", "dequantize_above": 200, "entries": [ENTRY]}


@pytest.fixture
def tuning(gpu):
    return gpu.tuning


def _written(folder: Path, table: object) -> Path:
    path = folder / "sm_90.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    return path


def test_the_heuristic_depends_on_shapes_and_device_alone(tuning) -> None:
    def splits(rows: int, n: int, k: int, processors: int) -> tuple[int, int]:
        launch = tuning.heuristic(rows, n, k, "sm_90", processors)
        return launch.block, launch.splits

    assert splits(1, 4096, 4096, 132) == (8, 8)
    assert splits(1, 28672, 4096, 132) == (8, 1)
    assert splits(1, 64, 512, 132) == (8, 2)
    assert splits(9, 64, 4096, 132) == (16, 16)
    assert splits(64, 4096, 4096, 132) == (32, 4)
    assert splits(65, 64, 4096, 132) == (32, 1)
    assert splits(1, 64, 4096, 1) == (8, 4)
    assert tuning.heuristic(30, 64, 4096, "sm_100", 148).block == 8
    assert tuning.heuristic(1, 64, 4096, "gfx942", 304).block == 16


def test_an_entry_serves_its_shape_and_rows(tuning, tmp_path) -> None:
    more = ENTRY | {"rows": 64, "block": 32, "splits": 2}
    table = tuning.read_table(_written(tmp_path, TABLE | {"entries": [ENTRY, more]}))

    def chosen(rows: int, n: int = 4096, layout: tuple[int, ...] = (4, 2, 2)):
        return tuning.choose(table, layout, rows, n, 4096, "sm_90", 132)

    few, many = tuning.Launch(8, 4, 4, 3), tuning.Launch(32, 2, 4, 3)
    assert [rows for rows in range(1, 201) if chosen(rows) == few] == list(range(1, 9))
    assert [rows for rows in range(1, 201) if chosen(rows) == many] == list(range(9, 65))
    assert chosen(65) == tuning.heuristic(65, 4096, 4096, "sm_90", 132)
    assert chosen(8, n=4032) == tuning.heuristic(8, 4032, 4096, "sm_90", 132)
    assert chosen(8, layout=(2, 2, 4)) == tuning.heuristic(8, 4096, 4096, "sm_90", 132)
    assert chosen(200) is not None
    assert chosen(201) is None


def test_a_family_without_a_table_has_the_heuristic(tuning, tmp_path) -> None:
    table = tuning.table_of("sm_90", tmp_path)
    assert table == tuning.Table({}, 256)
    assert tuning.table_of("sm_100", tmp_path) == tuning.Table({}, 64)
    assert tuning.table_of("gfx942", tmp_path) == tuning.Table({}, 256)
    _written(tmp_path, TABLE)
    tuning.table_of.cache_clear()
    assert tuning.table_of("sm_90", tmp_path).dequantize_above == 200


def test_registers_are_set_where_ptxas_would_spill(tuning) -> None:
    assert tuning.compiler_options(8, 128, "sm_80") == {"maxnreg": 208}
    for block, group_size, target in ((8, 64, "sm_80"), (16, 128, "sm_80"), (8, 128, "gfx942")):
        assert tuning.compiler_options(block, group_size, target) == {}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("{", "is no table of launches"),
        ([], "is no table of launches"),
        (TABLE | {"format": 2}, "has format 2, this version reads 1: tune again"),
        (TABLE | {"dequantize_above": 0}, "dequantize_above is 0"),
        (TABLE | {"entries": [{"n": 1}]}, "cannot be read"),
        (TABLE | {"entries": [ENTRY | {"layout": "4x2"}]}, "cannot be read"),
        (TABLE | {"entries": [ENTRY | {"block": 64}]}, "out of range on sm_90: tune again"),
        (TABLE | {"entries": [ENTRY | {"splits": 17}]}, "out of range"),
        (TABLE | {"entries": [ENTRY | {"rows": 7}]}, "out of range"),
        (TABLE | {"entries": [ENTRY | {"warps": 3}]}, "out of range"),
        (TABLE | {"entries": [ENTRY | {"stages": 0}]}, "out of range"),
    ],
)
def test_bad_tables_say_what_is_wrong(tuning, tmp_path, table, words) -> None:
    with pytest.raises(tuning.TableError, match=rf"^sm_90.json.*{words}"):
        tuning.read_table(_written(tmp_path, table))


COMPILED = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

class Driver:
    '''An H200 that compiles nothing and runs nothing.'''
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(Driver)
asked = []
triton.knobs.runtime.jit_cache_hook = lambda **call: asked.append(call["key"]) or True

from flexquant_kernels import gpu, pack
from flexquant_kernels.triton import Layer, linear, relay, warm_up
from flexquant_kernels.triton import linear as function

function.__globals__["target_of"] = lambda device: "sm_90"
function.__globals__["processors"] = lambda device: 132
function.__globals__["torch"].mm = lambda *args, **kwargs: None

layers = []
for n, k, group_size, layout in ((100, 512, 64, (4, 2, 2)), (4096, 1056, 32, (4, 2, 2)),
                                 (64, 256, 128, (2, 1, 1, 2, 2)), (576, 512, 64, (4, 2, 2))):
    codes = torch.zeros(n, k, dtype=torch.uint8)
    scales = torch.zeros(n, k // group_size, len(layout), 2, dtype=torch.float16)
    weight = relay(pack.pack_planes(codes, layout), scales, layout, group_size, k)
    layers.append(Layer(weight, torch.bfloat16, torch.zeros(n) if n == 576 else None))
launches = warm_up(layers, 2000)
compiled = set(asked)
table = torch.full((9,), 4, dtype=torch.int32)
for layer in layers:
    for rows in [*range(1, 70), 128, 200, 256, 257, 1000]:
        x = torch.zeros(rows, layer.weight.k, dtype=layer.dtype)
        linear(x, layer.weight, table[rows % 9 : rows % 9 + 1], layer.bias)
print(launches, len(compiled), len(set(asked) - compiled))
"""


def test_nothing_is_compiled_after_the_warm_up() -> None:
    """Triton is asked what it would compile for a GPU, in a process that does not interpret."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("needs a process without a GPU")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    launches, compiled, later = map(int, done.stdout.split())
    assert later == 0
    assert 12 <= compiled <= launches
