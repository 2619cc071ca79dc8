# SPDX-License-Identifier: Apache-2.0
from vllm_flexquant.server.endpoint import _merge


def rank(names, clamped, read):
    layers = [{"name": name, "width": 4, "shape": [2, 8]} for name in names]
    return {"layers": layers, "clamped_widths": clamped, "bytes_read_per_step": read, "steps": 3}


def test_view_adds_up_what_ranks_count_and_joins_their_layers():
    view = _merge([rank("ab", 1, 10), rank("bc", 2, 20)])
    assert [layer["name"] for layer in view["layers"]] == ["a", "b", "c"]
    assert (view["clamped_widths"], view["bytes_read_per_step"]) == (3, 30)
    assert (view["ranks"], view["mean_bits"], view["steps"]) == (2, 4, 3)
