# SPDX-License-Identifier: Apache-2.0
"""The Triton entropy kernel against the reference and fp64: interpreted, or on a GPU if there."""

import pytest
import torch

from flexquant_kernels import reference
from vllm_flexquant.policy.entropy import averaged

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy's, of NaN and infinity
]

CHUNK = 8192


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "vocab"), [(1, 1), (3, 7), (2, CHUNK), (2, CHUNK + 1), (3, 49152), (70, 33)]
)
def test_against_fp64(
    gpu, device, make_logits, check_entropy, rows: int, vocab: int, dtype: torch.dtype
) -> None:
    for spread in (0.0, 0.1, 3.0, 60.0):
        logits = make_logits(rows, vocab, spread).to(dtype)
        got = gpu.entropy(logits.to(device)).cpu()
        check_entropy(got, logits, 5e-6)


def test_the_largest_vocabulary(gpu, device, make_logits, check_entropy) -> None:
    logits = make_logits(2, 262144).bfloat16()
    got = gpu.entropy(logits.to(device)).cpu()
    check_entropy(got, logits, 5e-6)


def test_masked_logits(gpu, device, make_logits, check_entropy) -> None:
    vocab = 3 * CHUNK + 17
    logits = make_logits(5, vocab)
    logits[0, torch.randperm(vocab)[50:]] = -torch.inf  # top-k
    logits[1, : 2 * CHUNK] = -torch.inf  # whole chunks
    logits[2, 1:] = -torch.inf
    logits[3, 1000:] = -torch.inf
    logits[4, :CHUNK] -= 300  # a chunk whose share is zero in fp32
    got = gpu.entropy(logits.to(device)).cpu()
    check_entropy(got, logits, 5e-6)
    assert got[2] == 0


def test_rows_without_a_distribution_are_nan_as_in_the_reference(gpu, device, make_logits) -> None:
    for place in (0, CHUNK - 1, CHUNK, CHUNK + 900):
        logits = make_logits(4, CHUNK + 1000)
        logits[0] = -torch.inf
        logits[1, place] = torch.nan
        logits[2, place] = torch.inf
        got = gpu.entropy(logits.to(device)).cpu()
        assert got.isnan().tolist() == [True, True, True, False]
        assert reference.entropy(logits).isnan().tolist() == got.isnan().tolist()
    assert gpu.entropy(torch.empty(2, 0, device=device)).isnan().all()
    assert gpu.entropy(torch.empty(0, 9, device=device)).shape == (0,)


def test_extreme_values(gpu, device, extreme_logits) -> None:
    logits, want = extreme_logits
    torch.testing.assert_close(gpu.entropy(logits.to(device)).cpu(), want, rtol=1e-6, atol=1e-6)
    ends = torch.full((2, 2 * CHUNK), -3e38)
    ends[0, -1] = ends[1, 0] = 3e38
    assert gpu.entropy(ends.to(device)).tolist() == [0.0, 0.0]


def test_rows_are_independent_of_batch_and_strides(gpu, device, make_logits) -> None:
    logits = make_logits(9, CHUNK + 33).to(device)
    alone = torch.cat([gpu.entropy(logits[i : i + 1]) for i in range(9)])
    assert torch.equal(gpu.entropy(logits), alone)
    assert torch.equal(gpu.entropy(logits[::2]), alone[::2])
    assert torch.equal(gpu.entropy(logits.T.contiguous().T), alone)
    moved = logits.new_empty(logits.numel() + 3)[3:].view(logits.shape).copy_(logits)
    assert torch.equal(gpu.entropy(moved), alone)


def test_tracking_is_that_of_the_planner(gpu, device, make_logits) -> None:
    slots, decay = 6, 0.7
    average, seen = torch.zeros(slots + 1, device=device), torch.zeros(slots + 1, device=device) > 0
    expected, known = average.clone(), seen.clone()
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        rows = 1 + step
        logits = make_logits(rows, 50, 1.0 + step).to(device)
        if step == 2:
            logits[1] = torch.nan
        index = torch.randperm(slots, generator=generator)[:rows].to(device)
        got = gpu.track_entropy(logits, index, average, seen, decay)
        expected[index] = averaged(expected[index], known[index], got, decay)
        known[index] = True
        torch.testing.assert_close(average, expected, equal_nan=True)
        assert torch.equal(seen, known)


def test_discarded_rows_are_not_tracked(gpu, device, make_logits) -> None:
    average, seen = torch.zeros(4, device=device), torch.zeros(4, device=device) > 0
    index = torch.tensor([3, 1, 3], device=device)
    got = gpu.track_entropy(make_logits(3, 9).to(device), index, average, seen, 0.5)
    assert seen.tolist() == [False, True, False, False]
    assert average.tolist() == [0.0, float(got[1]), 0.0, 0.0]


def test_bad_inputs_say_what_to_do(gpu, device) -> None:
    logits = torch.zeros(2, 8, device=device)
    index = torch.arange(2, device=device)
    average, seen = torch.zeros(3, device=device), torch.zeros(3, dtype=torch.bool, device=device)

    def refused(words: str, *args: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=words):
            gpu.track_entropy(*args, 0.5)

    with pytest.raises(ValueError, match=r"logits have shape \(8,\): give \[rows, vocabulary\]"):
        gpu.entropy(logits[0])
    with pytest.raises(ValueError, match=r"logits have dtype torch.float64: give float32, bf"):
        gpu.entropy(logits.double())
    refused(r"logits have shape \(8,\)", logits[0], index, average, seen)
    refused("slots is torch.int32 .* give a contiguous torch.int64", logits, index.int(), average,
            seen)  # fmt: skip
    refused(r"slots is torch.int64 \(1,\).* give .*\[2\]", logits, index[:1], average, seen)
    refused(r"strides \(2,\): give a contiguous", logits, index, average.repeat(2)[::2], seen)
    refused(r"seen is torch.bool \(2,\).* give .*\[3\]", logits, index, average, seen[:2])
    refused("average is on meta but must be on", logits, index, average.to("meta"), seen)
    refused("slots is on meta but must be on", logits, index.to("meta"), average, seen)
    refused("logits have dtype torch.int32", logits.int(), index, average, seen)
    assert gpu.track_entropy(logits[:0], index[:0], average, seen, 0.5).shape == (0,)
    assert not seen.any()
