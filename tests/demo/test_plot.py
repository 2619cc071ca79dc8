# SPDX-License-Identifier: Apache-2.0
import pytest

pytest.importorskip("matplotlib")

from demo.plot import layer_marks, plot_run


def layers(count: int) -> list[dict]:
    names = [f"model.layers.{i // 2}.mlp.{'up' if i % 2 else 'down'}" for i in range(count - 1)]
    common = {"widths": [4, 6, 8], "shape": [8, 64], "group_size": 64}
    return [{"name": name, **common} for name in [*names, "lm_head"]]


def step(number: int, count: int, entropy: float | None) -> dict:
    return {
        "step": number,
        "request_ids": ["r"],
        "prompt": [number == 0],
        "widths": [(4, 6, 8)[(number + i) % 3] for i in range(count)],
        "average": [entropy],
    }


@pytest.mark.parametrize("count", [1, 2, 121])
def test_run_becomes_a_png(tmp_path, count):
    steps = [step(i, count, None if i == 1 else 0.1 * i) for i in range(6)]
    path = tmp_path / "new" / "run.png"
    assert plot_run(layers(count), steps, path, "title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_nothing_is_drawn_without_decode_steps(tmp_path):
    assert not plot_run(layers(3), [step(0, 3, 1.0)], tmp_path / "run.png", "title")
    assert not list(tmp_path.iterdir())


def test_marks_name_a_few_blocks_and_the_last_layer():
    positions, labels = layer_marks([layer["name"] for layer in layers(61)])
    assert labels == [
        "block 0",
        "block 5",
        "block 10",
        "block 15",
        "block 20",
        "block 25",
        "lm_head",
    ]
    assert positions == [0, 10, 20, 30, 40, 50, 60]
    assert layer_marks(["lm_head"]) == ([0], ["lm_head"])
