# SPDX-License-Identifier: Apache-2.0
"""Several engines in one process: each layer's probe reaches its own planner."""

import gc

import pytest
import torch

from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner import probe_op
from vllm_flexquant.planner.planner import Planner
from vllm_flexquant.requests.grant import Kept, Terms


class Noting(Planner):
    def probe(self, x):
        self.seen.append(len(x))


@pytest.fixture
def make():
    def engine():
        options = FlexQuantOptions()
        made = Noting(options, Terms.of(options, options.layout.widths, Kept(None, "none")))
        made.seen = []
        made.allocate(torch.device("cpu"), slots=2)
        _, width = made.table.reserve()
        probe_op.connect(made)
        return made, width

    return engine


def test_the_planner_of_the_layers_table_is_called(make):
    (one, of_one), (other, of_other) = make(), make()
    torch.ops.flexquant.probe(torch.ones(3, 8), of_one)
    torch.ops.flexquant.probe(torch.ones(2, 8), of_other)
    assert (one.seen, other.seen) == ([3], [2])


def test_a_planner_that_is_gone_is_not_called(make):
    one, width = make()
    seen = one.seen
    del one
    gc.collect()
    torch.ops.flexquant.probe(torch.ones(3, 8), width)
    assert seen == []


def test_compiled_code_keeps_it_and_holds_no_engine(make):
    """The same graph serves another engine, as one from a compile cache does."""
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    def layer(x, width):
        torch.ops.flexquant.probe(x, width)
        return x + 1

    compiled = torch.compile(layer, backend=counting, fullgraph=True)
    (one, of_one), (other, of_other) = make(), make()
    compiled(torch.ones(3, 8), of_one)
    compiled(torch.ones(3, 8), of_other)
    assert (one.seen, other.seen) == ([3], [3])
    assert len(graphs) == 1
