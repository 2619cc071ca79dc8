# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs on a GPU, and why; on machines without one, which GPUs there might be."""

import logging

import pytest
import torch

from flexquant_kernels import gpu as gpus
from flexquant_kernels import ops

CUDA = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """Sets the GPU and the Triton of this machine; what was found before is forgotten."""

    def pretend(target: str = "sm_90", version: str | None = "3.7.1") -> None:
        monkeypatch.setattr(gpus, "target_of", lambda device: target)
        monkeypatch.setattr(gpus, "triton_version", lambda: version)
        ops.triton_status.cache_clear()

    monkeypatch.setattr(ops, "_warned_gpu", False)
    yield pretend
    ops.triton_status.cache_clear()


def _dispatch(device=CUDA, dtype=torch.bfloat16, k=4096, n=4096, group_size=64, layout=(4, 2, 2)):
    return ops.dispatch(device, dtype, k, n, group_size, layout)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_121", "gfx942"])
@pytest.mark.parametrize("layout", [(4, 2, 2), (2, 2, 4), (2, 1, 1, 2, 2)])
def test_gpus_take_triton(machine, caplog, target, layout) -> None:
    machine(target)
    choice = _dispatch(layout=layout)
    assert (choice.name, choice.tile, choice.relaid) == ("triton", 0, True)
    assert choice.reason == (
        f"Triton on {target} on torch.bfloat16, [4096, 4096], groups of 64, layout {layout}"
    )
    assert _dispatch(device="cuda:0", dtype=torch.float16).name == "triton"
    assert caplog.records == []


@pytest.mark.parametrize(
    ("target", "version", "words"),
    [
        ("sm_90", None, "triton is not installed: install triton>=3.6"),
        ("sm_90", "3.5.1", "triton 3.5.1 is too old: install triton>=3.6"),
        ("sm_90", "main", "triton main is too old"),
        ("sm_75", "3.7.1", "GPU sm_75 is none of those that they are compiled for (sm_80, "),
        ("gfx1100", "3.7.1", "GPU gfx1100 is none of those"),
    ],
)
def test_without_triton_the_reference_runs_and_one_line_says_so(
    machine, caplog, target, version, words
) -> None:
    machine(target, version)
    with caplog.at_level(logging.WARNING, "vllm_flexquant.kernels"):
        for k in (4096, 2048):
            choice = _dispatch(k=k)
            assert (choice.name, choice.tile, choice.relaid) == ("reference", 0, False)
            assert words in choice.reason
        ops.triton_status(torch.device("cuda", 1))
    (record,) = caplog.records
    assert words in record.getMessage()


def test_versions_that_will_do(machine) -> None:
    for version in ("3.6.0", "3.7.1", "3.10.0+git1", "4.0.0"):
        machine(version=version)
        assert _dispatch().name == "triton", version


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float32}, "dtype torch.float32 has no native kernel; use one of bfloat16"),
        ({"layout": (4, 4)}, r"layout (4, 4) has no native kernel; those with one are [(2, 1, 1"),
        ({"k": 4112}, "shape [4096, 4112] does not fit the native kernel"),
        ({"n": 0}, "shape [0, 4096] does not fit"),
        ({"k": 96, "group_size": 64}, "group size 64 does not fit the native kernel"),
        ({"device": "xpu"}, "device type xpu has no native kernel"),
    ],
)
def test_what_triton_does_not_take_runs_on_the_reference(machine, caplog, changes, words) -> None:
    machine()
    choice = _dispatch(**changes)
    assert (choice.name, choice.relaid) == ("reference", False)
    assert words in choice.reason
    assert caplog.records == []


def test_this_machine(monkeypatch) -> None:
    """As it is; the version is that of the Triton which is imported."""
    monkeypatch.setattr(ops, "_warned_gpu", True)
    if not torch.cuda.is_available():
        assert gpus.target_of(torch.device("cpu")) == "none"
        assert gpus.processors(torch.device("cpu")) == 1
        choice = _dispatch(device="cuda")
        assert (choice.name, choice.relaid) == ("reference", False)
        assert "can use no cuda device here" in choice.reason
    triton = pytest.importorskip("triton")
    assert gpus.triton_version() == triton.__version__


def test_the_relaid_operator(gpu, device, make_weight) -> None:
    weight = make_weight(33, 96, 32)
    made = gpu.relay(
        [p.to(device) for p in weight.planes], weight.scales.to(device), (4, 2, 2), 32, 96
    )
    width = torch.tensor([6], dtype=torch.int32, device=device)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).half().to(device)
    arguments = (list(made.planes), made.scales, made.counters, width, None, [4, 2, 2], 32, 33)
    torch.library.opcheck(torch.ops.flexquant.linear_relaid.default, (x, *arguments))
    got = torch.ops.flexquant.linear_relaid(x.T.contiguous().T, *arguments)
    assert torch.equal(got, gpu.linear(x, made, width))
