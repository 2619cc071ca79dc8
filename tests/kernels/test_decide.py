# SPDX-License-Identifier: Apache-2.0
"""The native steps of policy `budget` against plain Python, value by value.

The state lies in poisoned memory, and sequences name slots, rows, accounts and places that are not
there: what is read or written there shows.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexquant_kernels import load_native
from flexquant_kernels.cpu.decide import LogitsReader, NativeSteps
from flexquant_kernels.state import (
    ACCOUNTS,
    AGGREGATES,
    SIZES,
    Facts,
    State,
    places,
    struct_offsets,
)

POISON = 0xFF
NOT_FINITE = (math.nan, math.inf, -math.inf)
ELSEWHERE = (-1, -(1 << 40), 1 << 40, 1 << 62)
"""Indices that nothing has."""

MOST_HELD = 1 << 30
SOME = {"levels": 5, "layers": 3, "slots": 4, "rows": 6, "entropy_bins": 3, "average_bins": 2}
SOME |= {"hidden": 7}

seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", autouse=True)
def native():
    status = load_native()
    if not status.loaded:
        pytest.skip(status.reason)


def make_state(**sizes):
    sizes = SOME | sizes
    table = torch.zeros(sizes["layers"], dtype=torch.int32)
    return State(torch.device("cpu"), table, **sizes)


def with_poison(state, guard):
    """Move a state between `guard` poisoned bytes, and poison the gaps in it. Returns the bytes
    that are to stay."""
    size = state.buffer.numel()
    memory = torch.full((size + 2 * guard,), POISON, dtype=torch.uint8)
    mine = memory[guard : guard + size]
    spans = [(at, at + 8) for at in struct_offsets()[0].values()]
    for offset, shape, dtype in places(state.sizes)[0].values():
        spans.append((offset, offset + math.prod(shape) * dtype.itemsize))
    for begin, end in spans:
        mine[begin:end] = state.buffer[begin:end]
    state.buffer = mine
    for name in places(state.sizes)[0]:
        setattr(state, name, state.tensor(name).numpy())
    stays = torch.ones_like(memory, dtype=torch.bool)
    for begin, end in spans:
        stays[guard + begin : guard + end] = False
    stays[guard : guard + 8 * (len(SIZES) + 1)] = True
    return memory, stays


def limited(value, low, high):
    return min(max(value, low), high)


class Plain:
    """Policy `budget` on a copy of a state, one sequence at a time."""

    def __init__(self, state):
        self.sizes = state.sizes
        for name in (*places(state.sizes)[0], "table"):
            setattr(self, name, getattr(state, name).copy())

    def sequences(self, facts, rows):
        for slot, row, account, place in facts.T.tolist():
            inside = 0 <= slot < self.sizes["slots"] and 0 <= row < min(rows, self.sizes["rows"])
            if inside and 0 <= account < ACCOUNTS:
                yield slot, row, account, place

    def need(self, table, nats):
        if len(table) == 0:
            return 1.0
        if not math.isfinite(nats):
            return math.inf
        return table[int(limited(float(nats) / self.bin_nats[0], 0, len(table) - 1))]

    def correction(self, account):
        return limited(self.needed[account] / self.foreseen[account], 1.0, 8.0)

    def demand(self, needs):
        if self.aggregate[0] == AGGREGATES.index("max"):
            return max(needs)
        if self.aggregate[0] == AGGREGATES.index("quantile"):
            rank = np.float32(len(needs) - 1) * np.float32(self.quantile[0])
            return sorted(needs)[round(float(rank))]
        total = 0.0
        for need in needs:
            total += need
        return total / len(needs)

    def price_of(self, facts, rows):
        needs = {}
        for _, row, account, _ in self.sequences(facts, rows):
            need = self.scores[row]
            needs.setdefault(account, []).append(1e4 if math.isnan(need) else limited(need, 0, 1e4))
        dearest = -1.0
        for account, own in needs.items():
            asked, base = self.asked[account], self.base_price[account]
            balance = self.balance[account]
            if all(map(math.isfinite, (asked, base, balance))):
                share = limited(balance / max(asked * self.horizon[0], 1e-12), -1, 1)
                price = base * math.exp2(-2 * share) * self.demand(own) * self.correction(account)
                dearest = max(dearest, price)
        return dearest

    def cheapest(self, cost, kl, price, last):
        top = self.sizes["levels"] - 1
        ceiling = limited(self.ceiling[0], 0, top)
        objective = [cost[level] + price * kl[level] for level in range(ceiling + 1)]
        wanted, (level, held) = objective.index(min(objective)), self.decisions[last].tolist()
        moves = abs(wanted - level) > self.least_move[0]
        moves = moves or (wanted != level and wanted in (0, top))
        held = min(held + 1, MOST_HELD)
        if moves and held >= self.dwell[0] and price >= 0:
            level, held = wanted, 0
        return min(level, ceiling), held

    def level(self, which):
        return limited(int(self.decisions[which, 0]), 0, self.sizes["levels"] - 1)

    def within_bits(self):
        return limited(int(self.bounds[0]), 0, 8), limited(int(self.bounds[1]), 0, 8)

    def write(self, first):
        low, high = self.within_bits()
        for layer in range(max(first, 0), self.sizes["layers"]):
            width = min(max(self.rungs[self.level(1), layer], low), high)
            self.table[layer] = self.allowed[layer, width]

    def begin(self, facts, before):
        for row in before[1].tolist():
            if 0 <= row < self.sizes["rows"]:
                self.row_account[row] = -1
        for slot, row, account, _ in self.sequences(facts, self.sizes["rows"]):
            self.row_account[row] = account
            knows = self.by_average[0] and self.seen[slot]
            self.scores[row] = self.need(self.need_by_average, self.average[slot]) if knows else 1
        self.price[0] = self.price_of(facts, self.sizes["rows"])
        self.decisions[0] = self.cheapest(self.cost, self.kl, self.price[0], 0)
        self.decisions[1] = self.decisions[0]
        self.write(0)

    def decide(self, facts, scores):
        if not self.probes[0]:
            return
        for _, row, _, _ in self.sequences(facts, len(scores)):
            self.scores[row] = scores[row]
        price = self.price_of(facts, len(scores))
        if price < 0:
            return
        self.price[0] = price
        self.decisions[2] = self.cheapest(self.late_cost, self.late_kl, price, 2)
        self.decisions[1] = self.decisions[2]
        self.write(int(self.probe_layer[0]))

    def book(self, facts, entropy):
        low, high = self.within_bits()
        kl = self.early_kl[self.level(0)] + self.late_kl[self.level(1)]
        kl = min(max(kl, self.width_kl[high]), self.width_kl[low])
        sums = {}
        for _, row, account, place in self.sequences(facts, self.sizes["rows"]):
            if not 0 <= place < len(entropy):
                continue
            need, score = self.need(self.need_by_entropy, entropy[place]), self.scores[row]
            own = sums.setdefault(account, [0.0, 0.0, 0.0])
            own[0] += 1
            own[1] += need if math.isfinite(need) else 1.0
            own[2] += 0.0 if score < 0 else limited(score, 0, 100) if math.isfinite(score) else 1.0
        for account, (rows, needed, expected) in sums.items():
            asked, fade = self.asked[account], math.exp(-rows / 128)
            spent, full = kl * expected * self.correction(account), asked * self.horizon[0]
            balance = self.balance[account] + 0.95 * asked * rows - spent
            balance = np.minimum(balance, full)
            self.balance[account] = np.maximum(balance, -full)
            self.spent[account] += spent
            self.tokens[account] += rows
            self.needed[account] = self.needed[account] * fade + needed
            self.foreseen[account] = self.foreseen[account] * fade + expected

    def average_in(self, nats, slots, decay):
        decay = np.float32(decay)
        for entropy, slot in zip(nats, slots.tolist(), strict=True):
            self.unknown[0] += not math.isfinite(entropy)
            if 0 <= slot < self.sizes["slots"]:
                mixed = entropy + decay * (self.average[slot] - entropy)
                keep = self.seen[slot] and math.isfinite(mixed)
                self.average[slot], self.seen[slot] = mixed if keep else entropy, True


def assert_same(state, plain):
    for name in (*places(state.sizes)[0], "table"):
        got, expected = getattr(state, name), getattr(plain, name)
        if not np.array_equal(got, expected, equal_nan=True):  # for most, in a tenth of the time
            exact = 0 if got.dtype != np.float64 else 1e-12
            np.testing.assert_allclose(got, expected, rtol=exact, atol=0, err_msg=name)


def some_of(pick, values, count, share, others):
    """`count` of `values`, a share of them replaced by one of `others`."""
    values = np.array(values)[:count]
    values[pick.random(len(values)) < share] = pick.choice(others)
    return values


def fill(state, pick, wild):
    """Any figures; `wild`: such as nobody should write, too."""
    sizes, levels = state.sizes, state.sizes["levels"]
    for name in ("cost", "late_cost", "early_cost", "early_kl", "late_kl", "width_kl"):
        getattr(state, name)[:] = pick.exponential(0.3, getattr(state, name).shape)
    state.kl[:] = state.early_kl + state.late_kl
    for name in ("need_by_entropy", "need_by_average"):
        getattr(state, name)[:] = pick.exponential(1.0, getattr(state, name).shape)
    state.rungs[:] = pick.integers(0, 9, state.rungs.shape)
    state.allowed[:] = pick.integers(2, 9, state.allowed.shape)
    state.weight[:] = pick.standard_normal(sizes["hidden"])
    state.bias[:], state.bin_nats[:] = pick.standard_normal(), pick.exponential()
    state.horizon[:], state.least_move[:] = pick.integers(1, 300), pick.choice([0, 0.5, 1, 2])
    state.quantile[:], state.dwell[:] = pick.choice([0, 0.5, 0.7, 1]), pick.integers(0, 4)
    state.aggregate[:], state.by_average[:] = pick.integers(3), pick.integers(2)
    state.bounds[:] = np.sort(pick.integers(0, 9, 2)) if pick.random() < 0.5 else (2, 8)
    state.ceiling[:] = levels - 1 if pick.random() < 0.5 else pick.integers(levels)
    state.probes[:], state.probe_layer[:] = pick.random() < 0.8, pick.integers(sizes["layers"] + 1)
    state.decisions[:, 0] = pick.integers(0, levels, 3)
    state.decisions[:, 1] = pick.choice([0, 5, MOST_HELD - 1, MOST_HELD], 3)
    state.asked[:] = pick.exponential(0.05, ACCOUNTS) * (pick.random(ACCOUNTS) < 0.8)
    state.base_price[:] = pick.exponential(30, ACCOUNTS)
    state.balance[:] = pick.standard_normal(ACCOUNTS)
    state.needed[:], state.foreseen[:] = 128 * pick.exponential(1, (2, ACCOUNTS))
    state.average[:] = pick.exponential(2, sizes["slots"])
    state.seen[:] = pick.random(sizes["slots"]) < 0.7
    state.row_account[:] = -1
    if wild:
        for values in (state.asked, state.base_price, state.balance, state.average):
            values[pick.random(len(values)) < 0.3] = pick.choice(NOT_FINITE)
        state.bounds[:] = pick.choice([*ELSEWHERE, 3, 9], 2)
        state.ceiling[:], state.probe_layer[:] = pick.choice(ELSEWHERE, 2)
        state.decisions[:, 0] = pick.choice([-7, levels, 1 << 30], 3)


def facts_of(pick, sizes, stray):
    count = pick.integers(0, max(sizes["rows"], 1) + 1)
    accounts = pick.choice([0, 5, 63, 64, ACCOUNTS - 1], count)
    columns = [
        some_of(pick, pick.permutation(sizes["slots"]), count, stray, [*ELSEWHERE, sizes["slots"]]),
        some_of(pick, pick.permutation(sizes["rows"]), count, stray, [*ELSEWHERE, sizes["rows"]]),
        some_of(pick, accounts, count, stray, [*ELSEWHERE, ACCOUNTS]),
        some_of(pick, pick.permutation(count), count, stray, [*ELSEWHERE, count]),
    ]
    return np.stack([column[: min(map(len, columns))] for column in columns]).astype(np.int64)


def part_of(values, poisoned=8):
    """The same values with NaN behind them in memory."""
    longer = values.new_full((len(values) + poisoned, *values.shape[1:]), math.nan)
    longer[: len(values)] = values
    return longer[: len(values)]


def to_facts(facts):
    return Facts(torch.from_numpy(np.ascontiguousarray(facts)))


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.fixed_dictionaries(
        dict.fromkeys(SIZES, st.integers(0, 9))
        | {"levels": st.integers(1, 9), "rows": st.integers(0, 20), "slots": st.integers(1, 20)}
        | {"hidden": st.sampled_from([0, 1, 15, 16, 37])}
    ),
    seed=seeds,
    wild=st.booleans(),
    stray=st.sampled_from([0.0, 0.0, 0.2, 1.0]),
    guard=st.sampled_from([0, 4096]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_steps_are_those_of_plain_python(sizes, seed, wild, stray, guard, dtype):
    pick = np.random.default_rng(seed)
    state = make_state(**sizes)
    fill(state, pick, wild)
    memory, stays = with_poison(state, guard)
    before_all = memory[stays].clone()
    plain, steps = Plain(state), NativeSteps(state)
    before = facts_of(pick, state.sizes, stray)
    for _ in range(4):
        facts = facts_of(pick, state.sizes, stray)
        now = to_facts(facts)
        steps.begin(now, to_facts(before))
        plain.begin(facts, before)
        assert_same(state, plain)

        rows = int(pick.integers(0, sizes["rows"] + 3))
        odd = pick.random() < 0.3
        if pick.random() < 0.5:
            x = torch.from_numpy(pick.standard_normal((rows, 2 * sizes["hidden"])))
            if odd and x.numel():
                x[::3] = float(pick.choice(NOT_FINITE))
            x = part_of(x.to(dtype))[:, : sizes["hidden"]]
            if pick.random() < 0.2:
                x = x.T.contiguous().T
            steps.probe(now, x)
            wide = x.float().numpy().astype(np.float64)
            with np.errstate(all="ignore"):
                known = np.exp(wide @ plain.weight + plain.bias[0])
            scores = state.scores.copy()[:rows]
            if plain.probes[0]:
                used = [row for _, row, _, _ in plain.sequences(facts, rows)]
                np.testing.assert_allclose(scores[used], known[used], rtol=1e-3)
            plain.decide(facts, np.resize(scores, rows))
        else:
            scores = torch.from_numpy(pick.standard_normal(rows).astype(np.float32).__abs__())
            if odd and rows:
                scores[::3] = float(pick.choice(NOT_FINITE))
            steps.decide(now, part_of(scores))
            plain.decide(facts, scores.double().numpy())
        assert_same(state, plain)

        first = int(pick.choice([0, 1, sizes["layers"], -1]))
        state.bounds[:] = plain.bounds[:] = np.sort(pick.integers(0, 9, 2))
        steps.write(first)
        plain.write(first)
        assert_same(state, plain)

        entropy = torch.from_numpy(pick.exponential(2, facts.shape[1]).astype(np.float32))
        if odd and len(entropy):
            entropy[::2] = float(pick.choice(NOT_FINITE))
        steps.book(now, steps.entropy_at(part_of(entropy)))
        with np.errstate(all="ignore"):
            plain.book(facts, entropy.numpy())
        assert_same(state, plain)
        before = facts
    assert torch.equal(memory[stays], before_all)


@settings(max_examples=50, deadline=None)
@given(
    seed=seeds,
    slots=st.integers(1, 9),
    rows=st.integers(0, 12),
    decay=st.sampled_from([0.0, 0.6, 1.0]),
    stray=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_logits_are_read_as_in_plain_python(seed, slots, rows, decay, stray, dtype):
    pick = np.random.default_rng(seed)
    state = make_state(slots=slots)
    memory, stays = with_poison(state, 4096)
    before_all = memory[stays].clone()
    plain, reader = Plain(state), LogitsReader(state, 12)
    for _ in range(4):
        logits = torch.from_numpy(3 * pick.standard_normal((rows, 50))).to(dtype)
        odd = pick.random(rows) < 0.2
        logits[odd, 7] = float(pick.choice((math.nan, math.inf)))
        of_row = some_of(pick, pick.integers(0, slots, rows), rows, stray, [*ELSEWHERE, slots])
        kept = reader.nats.clone()
        assert reader(logits, of_row.ctypes.data, decay)
        nats = reader.nats.numpy()
        chance = logits.double().softmax(-1)
        expected = -(chance * chance.log()).sum(-1).numpy()
        np.testing.assert_allclose(nats[:rows], np.where(odd, np.nan, expected), rtol=1e-4)
        assert torch.equal(reader.nats[rows:], kept[rows:])
        plain.average_in(nats[:rows], of_row, decay)
        assert_same(state, plain)
    assert torch.equal(memory[stays], before_all)


# what must hold whatever the figures


def simple_state(**values):
    """Five levels, the price decides: level 0 at price 0, level 4 at a high one."""
    state = make_state()
    state.kl[:], state.cost[:] = np.linspace(0.4, 0, 5), np.linspace(0.2, 1, 5)
    state.late_kl[:], state.late_cost[:] = state.kl, state.cost
    state.rungs[:], state.allowed[:] = np.arange(4, 9)[:, None], np.arange(9)
    state.horizon[:], state.bin_nats[:], state.asked[:] = 100, 1, 0.1
    state.needed[:], state.foreseen[:] = 128, 128
    state.bounds[:], state.ceiling[:], state.probes[:] = (0, 8), 4, 1
    for name, value in values.items():
        getattr(state, name)[:] = value
    return state


def sequences_of(*accounts):
    numbers = np.arange(len(accounts))
    return to_facts(np.stack([numbers, numbers, np.array(accounts, dtype=np.int64), numbers]))


NOBODY = to_facts(np.zeros((4, 0), dtype=np.int64))


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("name", ["asked", "base_price", "balance"])
def test_an_account_that_is_not_finite_does_not_spoil_the_price_of_others(name, value):
    state = simple_state(base_price=50)
    steps = NativeSteps(state)
    steps.begin(sequences_of(3), NOBODY)
    alone, level = state.price[0], state.decisions[0, 0]
    assert (alone, level) == (50, 4)
    getattr(state, name)[2] = value
    for batch in ((2, 3), (3, 2)):
        steps.begin(sequences_of(*batch), NOBODY)
        assert (state.price[0], state.decisions[0, 0]) == (alone, level)
    steps.begin(sequences_of(2), NOBODY)
    assert (state.price[0], state.decisions[0, 0]) == (-1, level)
    state.decisions[2], state.price[0] = (1, 0), 7
    steps.decide(sequences_of(2), torch.ones(1))
    assert (state.price[0], state.decisions[2].tolist()) == (7, [1, 0])


def test_steps_without_a_change_are_counted_up_to_a_limit_and_the_level_still_moves():
    state = simple_state(decisions=[[4, MOST_HELD]] * 3, dwell=3)
    steps = NativeSteps(state)
    steps.begin(NOBODY, NOBODY)
    assert state.decisions[0].tolist() == [4, MOST_HELD]
    steps.begin(sequences_of(0), NOBODY)
    assert state.decisions[0].tolist() == [0, 0]


def test_the_probe_decides_nothing_when_it_is_off():
    state = simple_state(probes=0, base_price=50)
    steps, now = NativeSteps(state), sequences_of(0, 1)
    steps.begin(now, NOBODY)
    before = state.buffer.clone()
    steps.probe(now, torch.ones(2, 7))
    steps.decide(now, torch.ones(2))
    assert torch.equal(state.buffer, before)


def test_rows_that_the_forward_pass_does_not_have_are_not_scored():
    state = simple_state(base_price=1, weight=1)
    steps, now = NativeSteps(state), sequences_of(0, 0, 0)
    steps.begin(now, NOBODY)
    steps.probe(now, torch.zeros(4, 7)[:1])
    assert state.scores[:3].tolist() == [1, 1, 1]
    steps.probe(now, torch.ones(4, 7)[:2])
    np.testing.assert_allclose(state.scores[:3], [math.exp(7), math.exp(7), 1], rtol=1e-6)


# what callers are told


def test_what_cannot_be_used_is_refused():
    with pytest.raises(ValueError, match="has 0 levels: give one on cpu with one or more"):
        NativeSteps(make_state(levels=0))
    steps, now = NativeSteps(simple_state()), sequences_of(0)
    with pytest.raises(ValueError, match=r"x is \[2, 6\]: the probe takes \[rows, 7\]"):
        steps.probe(now, torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"scores is torch.float64 .* give torch.float32"):
        steps.decide(now, torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"entropy is torch.float32 \(2,\) .* contiguous"):
        steps.entropy_at(torch.zeros(4)[::2])


def test_logits_that_cannot_be_read_are_left_to_others():
    reader, slots = LogitsReader(make_state(), 2), np.zeros(3, dtype=np.int64)
    for logits in (torch.zeros(3, 5), torch.zeros(2, 5).double(), torch.zeros(5, 2).T):
        assert not reader(logits, slots.ctypes.data, 0.5)
    assert reader(torch.zeros(2, 5), slots.ctypes.data, 0.5)
    assert reader.nats.tolist() == pytest.approx([math.log(5)] * 2)
