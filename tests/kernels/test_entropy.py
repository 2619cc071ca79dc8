# SPDX-License-Identifier: Apache-2.0
"""flexquant::entropy against fp64, on logits as samplers see them."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("native", "poisoned_empty")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "vocab"), [(1, 1), (3, 7), (2, 16), (5, 4095), (2, 4097), (3, 49152), (70, 33)]
)
def test_against_fp64(
    isa, make_logits, check_entropy, rows: int, vocab: int, dtype: torch.dtype
) -> None:
    for spread in (0.0, 0.1, 3.0, 60.0):
        logits = make_logits(rows, vocab, spread).to(dtype)
        got = torch.ops.flexquant.entropy(logits)
        check_entropy(got, logits, 3e-6)


def test_masked_logits(isa, make_logits, check_entropy) -> None:
    logits = make_logits(4, 10000)
    logits[0, torch.randperm(10000)[:9950]] = -torch.inf  # top-k
    logits[1, :9000] = -torch.inf  # whole chunks
    logits[2, 1:] = -torch.inf
    logits[3, 1000:] = -torch.inf
    got = torch.ops.flexquant.entropy(logits)
    check_entropy(got, logits, 3e-6)
    assert got[2] == 0


def test_rows_without_a_distribution_are_nan(isa, make_logits) -> None:
    for place in (0, 4095, 4096, 9999):
        logits = make_logits(4, 10000)
        logits[0] = -torch.inf
        logits[1, place] = torch.nan
        logits[2, place] = torch.inf
        assert torch.ops.flexquant.entropy(logits).isnan().tolist() == [True, True, True, False]
    assert torch.ops.flexquant.entropy(torch.empty(2, 0)).isnan().all()
    assert torch.ops.flexquant.entropy(torch.empty(0, 9)).shape == (0,)


def test_extreme_values(isa, extreme_logits) -> None:
    logits, want = extreme_logits
    torch.testing.assert_close(torch.ops.flexquant.entropy(logits), want, rtol=1e-6, atol=1e-6)


def test_rows_are_independent_of_batch_threads_and_strides(isa, threads, make_logits) -> None:
    logits = make_logits(9, 20000)
    threads(1)
    alone = torch.cat([torch.ops.flexquant.entropy(logits[i : i + 1]) for i in range(9)])
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(torch.ops.flexquant.entropy(logits), alone)
        assert torch.equal(torch.ops.flexquant.entropy(logits[::2]), alone[::2])
        assert torch.equal(torch.ops.flexquant.entropy(logits.T.contiguous().T), alone)


def test_logits_at_odd_addresses(isa, make_logits) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = make_logits(3, 5003).to(dtype)
        want = torch.ops.flexquant.entropy(logits)
        for by in (1, 3, 7):
            moved = logits.new_empty(logits.numel() + by)[by:].view(logits.shape).copy_(logits)
            assert torch.equal(torch.ops.flexquant.entropy(moved), want)


def test_nothing_is_left_over_from_the_call_before(isa, make_logits) -> None:
    logits = make_logits(2, 5000)
    want = torch.ops.flexquant.entropy(logits)
    torch.ops.flexquant.entropy(torch.full((9, 30000), torch.nan))
    assert torch.equal(torch.ops.flexquant.entropy(logits), want)


def test_contract(make_logits) -> None:
    torch.library.opcheck(torch.ops.flexquant.entropy.default, (make_logits(3, 40),))
    with pytest.raises(ValueError, match="logits have shape"):
        torch.ops.flexquant.entropy(torch.zeros(3))
