# SPDX-License-Identifier: Apache-2.0
"""The Triton decision kernel against the planner in NumPy: the same levels and tables."""

import random
from dataclasses import replace

import pytest
import torch

from vllm_flexquant.format import PlaneLayout
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner.planner import Planner
from vllm_flexquant.planner.step import Batch
from vllm_flexquant.planner.table import LayerRecord, WeightError, allowed_widths
from vllm_flexquant.policy.protocol import FIRST
from vllm_flexquant.requests.grant import Kept, Terms

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of infinity

SLOTS = 9
ROWS = 6


def _planner(tops: tuple[int, ...], layout: str, **changes) -> Planner:
    """A planner on the CPU, of layers that have the widths up to these."""
    options = FlexQuantOptions(layout=PlaneLayout.parse(layout), **changes)
    made = Planner(options, Terms.of(options, options.layout.widths, Kept(None)))
    made.allocate(torch.device("cpu"), SLOTS)
    for i, top in enumerate(tops):
        index, _ = made.table.reserve()
        widths = tuple(w for w in made.options.layout.widths if w <= top)
        error = WeightError(2048, 1.0, {w: (top - w) * (i + 1.0) for w in widths})
        made.table.describe(
            index,
            LayerRecord(f"l{i}", 32, 64, 64, made.options.layout, widths, "any", "test", error),
        )
    made.start()
    return made


def _rules(gpu, options: FlexQuantOptions):
    bits = options.width if options.policy != "entropy" else None
    return gpu.Rules(
        options.policy != "entropy",
        options.entropy_low,
        options.entropy_high,
        options.hysteresis,
        options.dwell,
        options.aggregate,
        options.quantile,
        bits or options.min_bits,
        bits or options.max_bits,
        options.prefill == "full",
    )


def _beside(gpu, device, made: Planner):
    """A state with the planner's, and tensors of its own."""
    state = gpu.make_state(
        made.model.ladder.widths.to(device),
        allowed_widths(made.table.layers).to(device),
        made.state.tensor("average").to(device, copy=True),
        made.state.tensor("seen").to(device, copy=True),
        torch.full((len(made.table.layers) + 2,), -7, dtype=torch.int32, device=device),
        ROWS,
    )
    state.adopt(_rules(gpu, made.options))
    level, held = made.state.tensor("decisions")[FIRST]
    state.level.copy_(level)
    state.held.copy_(held)
    return state


def _entropies(pick: random.Random) -> torch.Tensor:
    strange = [float("nan"), float("inf"), 0.0, 1.5]
    values = [
        pick.choice(strange) if pick.random() < 0.1 else pick.uniform(0, 4)
        for _ in range(SLOTS + 1)
    ]
    return torch.tensor(values)


def _steps(gpu, device, pick: random.Random, made: Planner, steps: int) -> None:
    state = _beside(gpu, device, made)
    for _ in range(steps):
        average, seen = made.state.tensor("average"), made.state.tensor("seen")
        average.copy_(_entropies(pick))
        seen.copy_(torch.tensor([pick.random() < 0.8 for _ in range(SLOTS + 1)]))
        state.average.copy_(average)
        state.seen.copy_(seen)
        rows = pick.randint(0, ROWS)
        slots = pick.sample(range(SLOTS), rows)
        prompt = [pick.random() < 0.15 for _ in slots]
        floors = [pick.choice([0, 0, 0, 2, 3, 4, 5, 6, 7, 8]) for _ in slots]
        for slot, bits in zip(slots, floors, strict=True):
            made.started(slot, made.terms.grant({"flexquant_min_bits": bits} if bits else None))
        made._new.clear()  # their averages are given
        names, nothing = [str(s) for s in slots], [0] * rows
        made.step(Batch(names, slots, prompt, prompt, nothing, nothing))
        state.announce(slots, prompt, floors)
        gpu.decide(state)
        level, held = made.state.decisions[FIRST].tolist()
        assert int(state.level) == level
        assert made.policy.pinned or int(state.held) == held
        layers = len(made.table.layers)
        assert state.table[:layers].tolist() == made.table.widths.tolist()
        assert state.table[layers:].tolist() == [-7, -7]


@pytest.mark.parametrize("aggregate", ["mean", "quantile", "max"])
def test_decides_as_the_controller_does(gpu, device, aggregate) -> None:
    for seed in range(12):
        pick = random.Random(f"{aggregate} {seed}")
        layout = pick.choice(["4|2|2", "2|2|4", "2|1|1|2|2"])
        widths = PlaneLayout.parse(layout).widths
        tops = tuple(pick.choice(widths[1:]) for _ in range(pick.choice([3, 40])))
        bounds = sorted(pick.choices(range(2, 9), k=2))
        low = pick.uniform(0, 2)
        made = _planner(
            tops,
            layout,
            policy="entropy",
            aggregate=aggregate,
            quantile=pick.choice([0.0, 0.3, 0.5, 0.9, 1.0]),
            entropy_low=low,
            entropy_high=low + pick.uniform(0.1, 2),
            hysteresis=pick.choice([0.0, 0.05, 0.3]),
            dwell=pick.choice([1, 1, 3]),
            min_bits=bounds[0],
            max_bits=bounds[1],
            prefill=pick.choice(["full", "policy"]),
        )
        _steps(gpu, device, pick, made, 8)


@pytest.mark.parametrize(
    "options",
    [{}, {"width": 6}, {"level": 2}, {"level": 1, "min_bits": 6}, {"max_bits": 4}],
    ids=str,
)
def test_a_pinned_level_moves_with_floors_alone(gpu, device, options) -> None:
    made = _planner((8, 6, 8, 4), "4|2|2", policy="manual", **options)
    _steps(gpu, device, random.Random(str(options)), made, 8)


def test_ranks_of_a_quantile(gpu, device) -> None:
    """Every rank of a full batch, with ties, and a value below zero, as rounding gives them."""
    values = [0.25, -1e-7, 3.0, 0.25, 1e-30, 2.0]
    for rank, want in enumerate(sorted(values)):
        made = _planner((8,) * 40, "4|2|2", aggregate="quantile", quantile=rank / 5,
                           hysteresis=0.0, entropy_low=0.0, entropy_high=3.0)  # fmt: skip
        made.state.average[:6] = values
        made.state.seen[:6] = True
        state = _beside(gpu, device, made)
        state.announce(range(6), [False] * 6, [0] * 6)
        gpu.decide(state)
        assert int(state.level) == round(max(want, 0) / 3 * (len(made.model.ladder) - 1))


def test_what_a_probe_may_still_decide(gpu, device) -> None:
    made = _planner((8, 8), "4|2|2", min_bits=4, max_bits=6)
    state = _beside(gpu, device, made)
    for prompt, floors, bounds in (
        ([False], [0], [4, 6, 1]),
        ([True], [0], [4, 6, 0]),
        ([False, False], [0, 8], [8, 8, 1]),
    ):
        state.announce(range(len(floors)), prompt, floors)
        gpu.decide(state)
        assert state.bounds.tolist() == bounds
    made.change({"width": 4})
    state.adopt(_rules(gpu, made.options))
    gpu.decide(state)
    assert state.bounds.tolist() == [8, 8, 0]


def test_bad_states_say_what_to_do(gpu, device) -> None:
    ladder = torch.tensor([[4, 4], [8, 8]], dtype=torch.int32, device=device)
    allowed = torch.tensor([[4] * 5 + [6] * 2 + [8] * 2] * 2, dtype=torch.int32, device=device)
    average, seen = torch.zeros(3, device=device), torch.zeros(3, dtype=torch.bool, device=device)
    table = torch.zeros(2, dtype=torch.int32, device=device)
    given = {
        "ladder": ladder, "allowed": allowed, "average": average, "seen": seen, "table": table,
        "rows": 2,
    }  # fmt: skip

    def refused(words: str, **changes: object) -> None:
        with pytest.raises(ValueError, match=words):
            gpu.make_state(**given | changes)

    refused("ladder is torch.int64", ladder=ladder.long())
    refused(r"ladder is .* strides \(1, 2\): give a contiguous", ladder=ladder.T)
    refused(r"allowed is .*\(2, 8\).* give .*\[2, 9\]", allowed=allowed[:, :8])
    refused(r"seen is torch.bool \(2,\)", seen=seen[:2])
    refused(r"table is torch.int32 \(1,\).* give .*\[2\]", table=table[:1])
    refused("average is on meta but must be on", average=average.to("meta"))
    refused("rows is 0: give 1 to 4096", rows=0)
    refused(r"ladder is \(0, 2\): give \[levels, layers\]", ladder=ladder[:0])
    refused(r"ladder is \(2, 0\): give \[levels, layers\]", ladder=ladder[:, :0])
    refused(r"ladder is \(2,\): give \[levels, layers\]", ladder=ladder[0])
    refused(r"table is .*strides \(2,\): give a contiguous", table=table.repeat(2)[::2])
    state = gpu.make_state(**given)
    with pytest.raises(ValueError, match="the batch has 3 rows but there is room for 2"):
        state.announce([0, 1, 2], [False] * 3, [0] * 3)
    with pytest.raises(ValueError, match="slot 3 is none: there are 3"):
        state.announce([0, 3], [False] * 2, [0] * 2)
    with pytest.raises(ValueError, match="a floor is 9 bits: give 0 to 8"):
        state.announce([0, 1], [False] * 2, [0, 9])
    rules = vars(_rules(gpu, FlexQuantOptions()))
    for words, changes in (
        ("aggregate is 'median': give one of", {"aggregate": "median"}),
        ("min_bits is -1: give 0 to 8", {"min_bits": -1}),
        ("max_bits is 9: give 0 to 8", {"max_bits": 9}),
    ):
        with pytest.raises(ValueError, match=words):
            state.adopt(gpu.Rules(**rules | changes))


def test_tensors_at_odd_addresses(gpu, device) -> None:
    """The table is part of a larger one, as are the averages."""
    made = _planner((8, 6, 8), "4|2|2", policy="entropy")
    made.state.tensor("average").copy_(torch.linspace(0, 3, SLOTS + 1))
    made.state.seen[:] = True
    tables = []
    for by in (0, 1, 3):
        state = _beside(gpu, device, made)
        moved = {
            name: getattr(state, name).new_empty(getattr(state, name).numel() + by)[by:]
            for name in ("average", "seen", "table")
        }
        for name, tensor in moved.items():
            tensor.copy_(getattr(state, name))
        state = replace(state, **moved)
        state.announce([2, 5], [False] * 2, [0] * 2)
        gpu.decide(state)
        tables.append(state.table.tolist())
    assert tables[0] == tables[1] == tables[2]
    assert min(tables[0][:3]) >= 4
