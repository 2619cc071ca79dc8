# SPDX-License-Identifier: Apache-2.0
"""Two tensor-parallel ranks, each with a planner: sums that differ in their last bits on each rank
must not lead to other widths."""

import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from by_hand import batch, calibrated, start, widths

STEPS, RANKS = 500, 2
POLICIES = ({}, {"signal": "both", "aggregate": "max"}, {"policy": "entropy", "entropy_low": 2.0})


def first_rank(tensor):
    """The tensor of rank 0."""
    found = tensor.clone()
    dist.broadcast(found, src=0)
    return found


def steps_apart(rank, agrees, options):
    """500 steps whose hidden states and logits have noise of their own on each rank; returns after
    how many of them the tables of the ranks differed."""
    made = calibrated(agree=first_rank if agrees else None, entropy_high=3.5, **options)
    start(made, 2, {"flexquant_class": "fast"})
    same, own = np.random.default_rng(0), np.random.default_rng(1 + rank)
    apart = 0
    for _ in range(STEPS):
        ids = sorted(same.choice(list("abcd"), size=same.integers(1, 5), replace=False))
        logs, heat = 0.6 * same.standard_normal(len(ids)), 0.5 + 3 * same.random(len(ids))
        made.step(batch(ids))
        logs += 1e-2 * own.standard_normal(len(ids))
        made.probe(torch.tensor([[v, 0.0, 0.0, 0.0] for v in logs], dtype=torch.float32))
        logits = torch.linspace(0, 8, 50) / torch.tensor(heat, dtype=torch.float32)[:, None]
        made.logits(logits * float(1 + 1e-2 * own.standard_normal()))
        table = torch.tensor(widths(made))
        apart += int(not torch.equal(first_rank(table), table))
    return apart


def serve(rank, port, found):
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    runs = [(n, agrees) for n in range(len(POLICIES)) for agrees in (True, False)]
    apart = {(n, agrees): steps_apart(rank, agrees, POLICIES[n]) for n, agrees in runs}
    if rank == 1:
        found.put(apart)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def apart():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = mp.get_context("spawn").SimpleQueue()
    mp.spawn(serve, (port, found), nprocs=RANKS)
    return found.get()


@pytest.mark.parametrize("policy", range(len(POLICIES)), ids=map(str, POLICIES))
def test_ranks_that_agree_run_at_the_same_widths_in_every_step(policy, apart):
    assert apart[policy, True] == 0
    assert apart[policy, False] > 0  # so the noise does decide
