# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from vllm_flexquant.policy.load import REPAID, LoadControl, StepTimes

COST = np.linspace(0.5, 1.0, 101)


def step_time(rows, level, noise=1.0):
    """Seconds: a fixed part, one by rows, one by bytes."""
    return (0.004 + 0.0006 * rows + 0.010 * COST[level]) * noise


def run(control, rows, steps, seed=0, jitter=0.05):
    pick = np.random.default_rng(seed)
    levels, kept = [], []
    for _ in range(steps):
        level = control.ceiling(rows)
        seconds = step_time(rows, level, 1 + jitter * pick.standard_normal())
        control.book(rows, COST[level], seconds)
        levels.append(level)
        kept.append(seconds <= (control.target or np.inf))
    return levels, np.array(kept)


def test_without_a_target_every_step_may_run_at_the_best_level():
    assert set(run(LoadControl(COST), 4, 20)[0]) == {100}


def test_the_first_step_runs_at_the_best_level_and_the_next_know_better():
    control = LoadControl(COST, target=0.8 * step_time(4, 100))
    levels, _ = run(control, 4, 30)
    assert levels[0] == 100
    assert max(levels[2:]) < 100


@pytest.mark.parametrize("share", [0.8, 0.9, 0.97])
def test_the_target_is_kept_and_no_more_precision_is_given_away_than_needed(share):
    target = share * step_time(8, 100)
    control = LoadControl(COST, target)
    levels, kept = run(control, 8, 400, jitter=0.02)
    assert kept[50:].mean() >= 0.93
    assert np.mean([step_time(8, n) for n in levels[50:]]) >= 0.9 * target
    assert control.met == pytest.approx(kept[-100:].mean(), abs=0.1)


def test_a_target_below_what_the_cheapest_level_takes_runs_at_that_level():
    assert set(run(LoadControl(COST, 0.3 * step_time(1, 0)), 1, 30)[0][1:]) == {0}


def test_load_that_comes_and_goes():
    control = LoadControl(COST, target=0.9 * step_time(16, 100))
    calm, _ = run(control, 1, 50)
    busy, kept = run(control, 16, 200)
    after, _ = run(control, 1, 5)
    assert set(calm) == {100}
    assert max(busy[3:]) < 100
    assert kept[3:].mean() >= 0.9
    assert after == [100] * 5


def test_a_target_that_many_rows_cannot_keep_costs_few_rows_nothing():
    control = LoadControl(COST, target=0.9 * step_time(16, 0))
    busy, _ = run(control, 16, 300)
    assert set(busy[1:]) == {0}
    assert set(run(control, 1, 20, jitter=0.01)[0][1:]) == {100}


def test_what_prompts_take_is_made_up_for_by_the_steps_after_them():
    """Every fifth step holds a prompt and takes two targets; cheaper levels have room for that."""
    target = 1.2 * step_time(4, 100)
    control = LoadControl(COST, target)
    run(control, 4, 40)
    assert set(run(control, 4, 10)[0]) == {100}
    assert control.owed == 0
    seconds, levels = [], []
    for _ in range(60):
        control.book_prompt(2 * target)
        seconds.append(2 * target)
        for _ in range(4):
            level = control.ceiling(4)
            control.book(4, COST[level], step_time(4, level))
            levels.append(level)
            seconds.append(step_time(4, level))
    assert np.mean(levels[40:]) < 90
    assert np.mean(seconds[50:]) == pytest.approx(target, rel=0.05)
    assert control.met < 0.85
    assert set(run(control, 4, 60)[0][-10:]) == {100}, "and then all bits again"


def test_prompts_that_nothing_can_make_up_for_are_forgotten_soon():
    target = 1.1 * step_time(4, 100)
    control = LoadControl(COST, target)
    run(control, 4, 40)
    control.book_prompt(1000.0)
    assert control.owed == pytest.approx(REPAID * target)
    assert run(control, 4, 1)[0] == [0]
    assert set(run(control, 4, 100)[0][-10:]) == {100}
    control.book_prompt(1000.0)
    control.aim_at(2 * target)
    assert control.owed == 0
    free = LoadControl(COST)
    free.book_prompt(1000.0)
    assert free.owed == 0


def test_a_machine_that_slows_down_is_followed():
    control = LoadControl(COST, target=step_time(4, 60))
    before, _ = run(control, 4, 200)
    for _ in range(200):
        level = control.ceiling(4)
        control.book(4, COST[level], 1.15 * step_time(4, level))
    assert control.ceiling(4) < np.mean(before[50:])
    assert 1.15 * step_time(4, control.ceiling(4)) <= control.target


def test_the_line_is_found_once_levels_vary():
    times = StepTimes(forget=0.97)
    for level in [0, 30, 60, 100] * 30:
        times.add(COST[level], step_time(2, level))
    a, b = times.line()
    assert (a, b) == pytest.approx((0.0052, 0.010), rel=0.05)


def learn(control, rows, time_of, steps=400, seed=0):
    pick = np.random.default_rng(seed)
    for _ in range(steps):
        level = pick.integers(101) if control.pays(rows) else 100
        seconds = time_of(rows, level) * (1 + 0.03 * pick.standard_normal())
        control.book(rows, COST[level], seconds)


def test_where_low_widths_save_nothing_is_known_by_the_number_of_rows():
    control = LoadControl(COST)
    assert control.pays(32)
    learn(control, 32, lambda rows, level: 0.03)
    learn(control, 1, step_time)
    assert [control.pays(rows) for rows in (1, 8, 20, 32)] == [True, True, False, False]
    one, many = control.cost_table()
    assert (one["rows"], many["rows"]) == (1, 32)
    assert one["cheapest_saves"] == pytest.approx(0.005 / 0.0146, abs=0.03)
    assert many["cheapest_saves"] == pytest.approx(0.0, abs=0.02)
    assert many["seconds"] == pytest.approx(0.03, rel=0.02)


def test_it_is_asked_again_after_a_while_and_found_again():
    control = LoadControl(COST)
    learn(control, 32, lambda rows, level: 0.03)
    asked = 0
    for seed in range(12000):
        asked += control.pays(32)
        learn(control, 32, lambda rows, level: 0.03, steps=1, seed=seed)
    assert 0 < asked < 1200


def test_a_saving_that_is_not_known_well_is_taken_for_one():
    control = LoadControl(COST)
    for _ in range(500):
        control.book(2, 1.0, 0.02)
    assert control.pays(2)
    assert control.cost_table()[0]["cheapest_saves"] is None
