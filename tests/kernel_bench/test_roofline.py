# SPDX-License-Identifier: Apache-2.0
"""The roofline model: its bytes are those that kernels ask for, its limits as they should be."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks.kernels import roofline
from flexquant_kernels import layout_widths, pack

pytestmark = pytest.mark.usefixtures("gpu")

H200 = roofline.GPUS["H200"]


@pytest.fixture
def asked(gpu, device, monkeypatch) -> Iterator[dict[str, int]]:
    """Bytes that programs load and store, masked lanes left out; needs the interpreter."""
    if device.type != "cpu":
        pytest.skip("bytes are counted in the interpreter")
    from triton.runtime.interpreter import InterpreterBuilder

    counted = {"loads": 0, "stores": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def size(pointers) -> int:
        return pointers.get_element_ty().primitive_bitwidth // 8

    def counting_load(self, pointers, mask, *rest):
        counted["loads"] += int(mask.data.sum()) * size(pointers)
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        counted["stores"] += int(mask.data.sum()) * size(pointers)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
    return counted


def _weight(gpu, n: int, k: int, layout: tuple[int, ...], group_size: int):
    codes = torch.zeros(n, k, dtype=torch.uint8)
    scales = torch.zeros(n, k // group_size, len(layout), 2, dtype=torch.float16)
    return gpu.relay(pack.pack_planes(codes, layout), scales, layout, group_size, k)


@pytest.mark.parametrize("layout", [(4, 2, 2), (2, 2, 4), (2, 1, 1, 2, 2)], ids=str)
def test_the_linear_kernel_moves_what_the_model_says(gpu, asked, layout) -> None:
    for n, k, rows, group_size, splits in ((70, 544, 3, 32, 1), (64, 768, 11, 128, 3)):
        weight = _weight(gpu, n, k, layout, group_size)
        x = torch.zeros(rows, k, dtype=torch.float16)
        for width in layout_widths(layout):
            asked.update(loads=0, stores=0)
            bits = torch.tensor([width], dtype=torch.int32)
            gpu.linear(x, weight, bits, launch=gpu.Launch(8, splits, 2, 2))
            model = roofline.linear(n, k, rows, width, group_size, 8, splits)
            assert (asked["loads"], asked["stores"]) == (model.loads, model.stores)


def test_the_other_kernels_move_what_the_model_says(gpu, asked) -> None:
    weight = _weight(gpu, 70, 544, (4, 2, 2), 32)
    for width in (4, 6, 8):
        asked.update(loads=0, stores=0)
        gpu.dequantize.dequantize(weight, torch.tensor([width], dtype=torch.int32), torch.float16)
        model = roofline.dequantize(70, 544, width, 32)
        assert (asked["loads"], asked["stores"]) == (model.loads, model.stores)
    for dtype in (torch.float32, torch.bfloat16):
        asked.update(loads=0, stores=0)
        gpu.entropy(torch.zeros(3, 20000, dtype=dtype))
        model = roofline.entropy(3, 20000, dtype.itemsize)
        assert (asked["loads"], asked["stores"]) == (model.loads, model.stores)


def test_little_is_moved_that_need_not_be(gpu) -> None:
    """Padding and the sums of K's parts, on the shapes of a model of 8B."""
    for n, k in roofline.SHAPES.values():
        for rows in (1, 8, 64):
            launch = gpu.tuning.heuristic(rows, n, k, "sm_90", 132)
            for width in (4, 8):
                found = roofline.linear(n, k, rows, width, 64, launch.block, launch.splits)
                assert found.must <= found.memory <= 1.5 * found.must
                if rows == 1:
                    assert found.memory <= 1.03 * found.must
    assert roofline.entropy(64, 128256, 4).memory <= 1.01 * roofline.entropy(64, 128256, 4).must


@pytest.mark.parametrize("layout", ["4|2|2", "2|2|4", "2|1|1|2|2"])
def test_decoding_on_an_h200_waits_for_memory_not_for_instructions(layout) -> None:
    """At up to 8 rows, at every width, by the instructions in the table of what was compiled."""
    compiled = roofline.Compiled()
    for width in layout_widths(tuple(map(int, layout.split("|")))):
        slots = compiled.linear("sm_90", layout, 64, 8, width)
        assert slots is not None
        assert slots < roofline.allowed_slots(H200, width, 64), (layout, width)
        for shape in roofline.SHAPES.values():
            found = roofline.fused_seconds(H200, compiled, shape, 1, width, layout)
            assert max(found, key=lambda limit: found[limit]) == "memory"


def test_limits() -> None:
    traffic = roofline.Traffic(must=1, memory=8600, loads=1, stores=1)
    found = roofline.seconds(H200, traffic, weights=1000, slots=2.0, products=394e3)
    assert found == pytest.approx({"memory": 2e-9, "issue": 2000 / H200.slots, "products": 1e-9})
    assert roofline.allowed_slots(H200, 8, 128) == pytest.approx(8.0, abs=0.05)
    loop = {"per_weight": 4.0, "most": {"LOP3": 60, "SHF": 20, "HMMA": 20}}
    assert roofline.slots_per_weight(loop) == pytest.approx(6.4)
    assert roofline.slots_per_weight(loop | {"most": {"LOP3": 10, "HMMA": 90}}) == 4.0


@pytest.mark.parametrize("name", roofline.GPUS)
def test_the_threshold_of_dequantizing_is_that_of_the_model(gpu, name) -> None:
    """At 8 bits, the width of prefill, on the shapes of a model of 8B; in steps of 32 rows."""
    card, compiled = roofline.GPUS[name], roofline.Compiled()
    for shape in roofline.SHAPES.values():
        first = roofline.crossover(card, compiled, shape, 8, "4|2|2")
        assert first is not None
        assert abs(first - 32 - gpu.tuning.DEQUANTIZE_ABOVE[card.target]) <= 32


def test_the_table_is_printed(capsys) -> None:
    roofline.main(["--gpu", "A100", "--rows", "1"])
    text = capsys.readouterr().out
    assert "4|2|2 on A100: a model, not measured" in text
    assert text.count("down 8B 4096x14336") == 3
