# SPDX-License-Identifier: Apache-2.0
"""The kernel benchmark: its gate, its interleaved timing, its targets, and one small run."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import baselines, gate, plain_read, report, timing, worker
from benchmarks.kernels import run_cpu as run
from benchmarks.kernels.contenders import (
    Contender,
    Nested,
    UnavailableError,
    flexquant_name,
    make_activations,
    make_nested,
    make_weights,
    torch_contenders,
)
from benchmarks.kernels.targets import judge
from benchmarks.kernels.timing import BEST, EIGHT_BIT, Budget, Turn
from benchmarks.provenance import machine
from flexquant_kernels import load_native
from vllm_flexquant.format.layout import PlaneLayout

FOUR, EIGHT = flexquant_name("4|2|2", 4), flexquant_name("4|2|2", 8)


@pytest.fixture(scope="module")
def native() -> None:
    if not (status := load_native()).loaded:
        pytest.skip(f"native kernels not available: {status.reason}")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nested(native) -> Nested:
    return make_nested(make_weights(80, 128, 64), PlaneLayout.parse("4|2|2"))


def fake(
    name: str, family: str, bits: int, count: int = 100, layout: str | None = None
) -> Contender:
    """A contender whose calls do nothing."""
    return Contender(
        name, family, "none", bits, count, count, lambda: lambda x: x, None, 0.0, layout=layout
    )


def turns(*microseconds: float, clean: bool = True) -> list[Turn]:
    return [Turn(value * 1e-6, clean) for value in microseconds]


def small_run(out: Path, *more: str) -> list[str]:
    arguments = "--shapes 96x64 --rows 1 2 --memory-rows 1 --threads 1 --layouts 4|2|2 "
    arguments += "--baselines torch --memory-mb 1 --rounds 5 --seconds 0.1 --only speed --no-plot"
    return [*arguments.split(), *more, "--out", str(out)]


def test_a_small_run_from_end_to_end(native, tmp_path, capsys):
    out = tmp_path / "speed.json"
    assert run.main(small_run(out)) == 0
    written = json.loads(out.read_text())
    assert written["provenance"]["machine"]["cpu"]
    results = written["results"]
    assert results["native"]["isa"] != "none"
    checks = results["gate"]["96x64"]["checks"]
    assert {check["contender"] for check in checks} >= {FOUR, EIGHT, "torch fp32", "torch bf16"}
    assert all(check["passed"] for check in checks)
    facts = results["gate"]["96x64"]["contenders"]
    assert facts[FOUR]["bytes_read"] == 96 * 64 // 2 + 96 * 4  # a plane, and a pair per group
    assert [(c["rows"], c["residence"]) for c in results["cells"]] == [
        (1, "cache"), (2, "cache"), (1, "memory"),
    ]  # fmt: skip
    for cell in results["cells"]:
        assert all(
            time["p25"] <= time["median"] <= time["p75"] for time in cell["time_us"].values()
        )
        assert cell["faster_than"][FOUR].keys() >= {"torch bf16", EIGHT_BIT}
    assert results["cells"][2]["reuse_mb"] >= 1
    assert "share of plain read" in results["cells"][2]["faster_than"][EIGHT]
    by_name = {one["target"]: one for one in results["targets"]}
    assert by_name["share of plain-read bandwidth, 1 row, from memory"]["cases"] == 3
    assert "not measured" in capsys.readouterr().out  # vLLM was left out


def test_gate_is_green_for_what_is_right(nested):
    x = make_activations(256, 128)
    checks = gate.check_nested(nested, x, [1, 5, 256], torch.arange(80), [1, 2])
    assert [check["width"] for check in checks] == [4, 6, 8]
    assert all(check["passed"] for check in checks)
    assert all(0.001 < check["int8_activation_error"] < 0.02 for check in checks)
    assert gate.failures(checks) == []


@pytest.mark.parametrize("rows", [1, 256])
def test_one_wrong_value_turns_the_gate_red(nested, rows):
    x = make_activations(256, 128)
    call = nested.contenders[6].copies[0]

    def wrong(given: torch.Tensor) -> torch.Tensor:
        out = call(given)
        if len(out) == rows:
            out[-1, 79] += 0.02 * out.abs().max()
        return out

    nested.contenders[6].copies[0] = wrong
    checks = gate.check_nested(nested, x, [1, 5, 256], torch.arange(80), [1, 2])
    assert [check["passed"] for check in checks] == [True, False, True]
    (line,) = gate.failures(checks)
    assert flexquant_name("4|2|2", 6) in line


@pytest.mark.parametrize("damage", [torch.nan, 7.0])
def test_a_wrong_baseline_turns_the_gate_red(damage):
    (contender, _) = torch_contenders(make_weights(80, 128, 64))
    x = make_activations(4, 128)
    assert gate.check_baseline(contender, x, [1, 4], torch.arange(80))["passed"]
    call = contender.copies[0]

    def wrong(given: torch.Tensor) -> torch.Tensor:
        out = call(given)
        out[0, 3] = damage
        return out

    contender.copies[0] = wrong
    check = gate.check_baseline(contender, x, [1, 4], torch.arange(80))
    assert not check["passed"]
    assert json.loads(json.dumps(check, allow_nan=False)) == check


def test_damaged_planes_end_the_run_without_results(native, tmp_path, monkeypatch, capsys, threads):
    line_up = worker.line_up

    def damaged(shape: tuple[int, int], plan: worker.Plan) -> worker.Line:
        line = line_up(shape, plan)
        line.nested[0].planes[0][17, 3] ^= 1
        return line

    def in_this_process(plan: worker.Plan) -> dict | None:
        monkeypatch.setattr("sys.argv", ["worker", json.dumps(asdict(plan))])
        status = worker.main()
        assert status in (0, worker.GATE_RED)
        return None if status else json.loads(Path(plan.out).read_text())

    monkeypatch.setattr(run, "run_worker", in_this_process)
    out = tmp_path / "speed.json"
    monkeypatch.setattr(worker, "line_up", damaged)
    assert run.main(small_run(out)) == 1
    assert not out.exists()
    said = capsys.readouterr().err
    assert f"RED 96x64: {FOUR}" in said
    assert "nothing is written" in said


def test_a_shape_without_a_native_kernel_is_red(tmp_path, monkeypatch, capsys, threads):
    plan = run.make_plan(run.parse(small_run(tmp_path / "o")), 1, True, tmp_path / "o")
    plan.shapes = [(96, 40)]
    monkeypatch.setattr("sys.argv", ["worker", json.dumps(asdict(plan))])
    assert worker.main() == worker.GATE_RED
    assert "no group size divides k = 40" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_instruction_set_is_red(native, tmp_path, monkeypatch, capsys, threads):
    chosen = run.parse(small_run(tmp_path / "o", "--isa", "mmx"))
    plan = run.make_plan(chosen, 1, True, tmp_path / "o")
    monkeypatch.setattr("sys.argv", ["worker", json.dumps(asdict(plan))])
    assert worker.main() == worker.GATE_RED
    assert "mmx" in capsys.readouterr().err


def test_ratios_are_medians_over_rounds():
    times = {"a": turns(1, 2, 10), "b": turns(3, 4, 10)}
    assert timing.ratio(times, "a", "b") == 2.0  # of 3, 2 and 1, not 4 over 2 by chance
    assert timing.ratio(times, "b", "a") == 0.5
    assert timing.summarise(times)["a"] == {"median": 2.0, "p25": 1.5, "p75": 6.0}


def test_turns_that_lost_their_cpu_do_not_count():
    times = {
        "a": [*turns(1, 1, 1), *turns(900, 900, 900, 900, clean=False)],
        "b": turns(2, 2, 2, 2, 2, 2, 2),
        "never clean": turns(5, 6, 7, clean=False),
    }
    summary = timing.summarise(times)
    assert summary["a"]["median"] == 1.0
    assert summary["never clean"]["median"] == 6.0
    assert timing.ratio(times, "a", "b") == 2.0


def test_what_is_compared_with_what():
    contenders = [
        fake(FOUR, "flexquant", 4, layout="4|2|2"),
        fake(EIGHT, "flexquant", 8, layout="4|2|2"),
        fake("vllm w4a16 g64", "vllm", 4),
        fake("vllm w8a8", "vllm", 8),
        fake("vllm bf16", "vllm", 16),
        fake("ark int4", "ark", 4),
        fake(plain_read.read_name(4), "read", 4),
    ]
    seconds = dict(zip([c.name for c in contenders], [2, 4, 6, 3, 20, 5, 1], strict=True))
    found = timing.compare(
        {name: turns(*[value] * 3) for name, value in seconds.items()}, contenders
    )
    assert found == {
        FOUR: {
            "vllm w4a16 g64": 3.0, "vllm bf16": 10.0, "ark int4": 2.5, BEST: 1.5,
            EIGHT_BIT: 2.0, "share of plain read": 0.5,
        },
        EIGHT: {"vllm w8a8": 0.75, "vllm bf16": 5.0, BEST: 0.75},
    }  # fmt: skip


def test_no_copy_is_read_again_before_enough_else_was():
    log: list[tuple[str, int, int]] = []

    def recorder(name: str, count: int) -> Contender:
        made = iter(range(1000))

        def make():
            copy = next(made)
            return lambda x: log.append((name, copy, count))

        return Contender(name, "read", "none", 0, count, count, make, None, 0.0)

    contenders = [recorder("small", 1000), recorder("large", 50_000)]
    budget = Budget(rounds=12, seconds=0.0, reuse_bytes=500_000, copies_bytes=1 << 20)
    x = torch.zeros(1, 4)
    _, done = timing.time_from_memory(contenders, x, budget, bandwidth=5e7)
    del log[: 4 * len(contenders)]  # the estimates
    total, since, distances = 0, {}, []
    for name, copy, count in log:
        if (name, copy) in since:
            distances.append(total - since[name, copy])
        total += count
        since[name, copy] = total
    assert len(distances) > 100
    assert min(distances) >= 500_000
    assert done["reuse_mb"] == 1  # rounded
    assert done["rounds"] >= timing.LEAST_ROUNDS


def test_too_little_memory_for_the_copies_is_said():
    budget = Budget(rounds=5, seconds=1.0, reuse_bytes=1, copies_bytes=10)
    with pytest.raises(timing.BudgetError, match=r"two rounds take .* time fewer layouts"):
        timing.plan_copies([fake("a", "torch", 16)], {"a": 1}, budget)


def cell(rows: int, residence: str, ratios: dict[str, dict[str, float]]) -> dict:
    place = {"shape": "1x1", "rows": rows, "threads": 1, "residence": residence}
    return place | {"clean_turns": 1.0, "faster_than": ratios}


def test_targets_are_judged_case_by_case():
    cells = [
        cell(1, "memory", {FOUR: {EIGHT_BIT: 2.0, "vllm bf16": 3.5, "vllm w4a16 g64": 0.9}}),
        cell(16, "memory", {FOUR: {EIGHT_BIT: 1.0, "vllm bf16": 4.0, "vllm w4a16 g64": 1.5}}),
        cell(256, "cache", {EIGHT: {BEST: 1.0}, FOUR: {"vllm w4a16 g64": 0.1, BEST: 0.99}}),
    ]
    judged = {one["target"]: one for one in judge(cells, ["4|2|2"])}
    halved = judged["time at 4 bit over time at 8 bit, 1 row, from memory"]
    assert (halved["met"], halved["worst"]["value"], halved["cases"]) == (True, 0.5, 1)
    assert judged["4 bit times faster than vLLM's bf16, 1 row, from memory"]["met"] is True
    assert judged["4 bit times faster than vLLM's bf16, 16 rows, from memory"]["met"] is False
    w4a16 = judged["4 bit times faster than vLLM's W4A16, 1 to 64 rows"]
    assert (w4a16["met"], w4a16["worst"]["value"], w4a16["cases_met"]) == (False, 0.9, 1)
    where = "1x1, 1 row, 1 thread, from memory, vllm w4a16 g64"
    assert w4a16["unmet"] == [f"0.9: {FOUR}, {where}"]
    assert judged["8 bit times faster than the best of vLLM, 256 rows"]["met"] is True
    assert judged["4 bit times faster than the best of vLLM, 256 rows"]["met"] is False
    assert judged["8 bit times faster than vLLM's W8A8, 1 to 64 rows"]["met"] is None


def test_the_default_layout_is_judged_first():
    assert next(one["layout"] for one in judge([], ["2|2|4", "4|2|2"])) == "4|2|2"


def test_a_busy_machine_is_said():
    quiet, busy = ({"clean_turns": share} for share in (0.9, 0.2))
    assert report.caution([quiet, quiet]) is None
    assert "in 1 of 3 cells" in str(report.caution([quiet, busy, quiet]))


@pytest.mark.parametrize("streams", plain_read.STREAMS)
def test_plain_read_reads_every_byte_once(streams):
    try:
        read = plain_read.load_read()
    except UnavailableError as error:
        pytest.skip(str(error))
    for words in (8, 1024, 12_345):
        memory = torch.randint(0, 1 << 40, (words,), generator=torch.Generator().manual_seed(words))
        for threads in (1, 2):
            got = read(memory.data_ptr(), memory.nbytes, threads, streams)
            if words == 1024:  # all of it in whole steps of every stream: a sum of words
                assert got == int(memory.sum())
            for changed in (0, words // 2, words - 1):
                other = memory.clone()
                other[changed] += 1 if other[changed] % 256 < 255 else -1
                step = int(other[changed] - memory[changed])
                assert read(other.data_ptr(), other.nbytes, threads, streams) == got + step


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "12"], "write N x K as in 1536x576"),
        (["--layouts", "4|4|4"], "planes must add up to"),
        (["--rows", "0"], "give numbers from 1 up"),
        (["--threads", "4096"], "this process may use"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_bad_arguments_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as refused:
        run.parse(arguments)
    assert refused.value.code == 2
    assert words in capsys.readouterr().err


def test_quick_means_less():
    quick, full = run.parse(["--quick"]), run.parse([])
    assert (full.shapes, full.layouts) == (run.SHAPES, run.LAYOUTS)
    assert set(quick.shapes) < set(full.shapes)
    assert quick.layouts == ["4|2|2"]
    assert run.parse(["--quick", "--rows", "3"]).rows == [3]
    # what is kept in the repository is only overwritten by a whole run
    assert (full.out, quick.out) == (run.ROOT / run.RESULTS, run.ROOT / run.PART)
    assert run.parse(["--only", "crossover"]).out == run.ROOT / run.PART


def test_ark_that_is_missing_is_a_sentence(monkeypatch):
    monkeypatch.setattr(baselines, "ARK_MODULE", "no_such_module")
    ((name, reason),) = baselines.ark_contenders(make_weights(32, 64, 64), [4])
    assert name == "ark"
    assert "pip install auto-round-lib" in reason


@pytest.mark.slow
def test_baselines_of_vllm_pass_the_gate():
    x = make_activations(32, 256)
    found = list(baselines.vllm_contenders(make_weights(128, 256, 64)))
    reasons = [one for one in found if isinstance(one, tuple)]
    if any(name == "vllm" for name, _ in reasons):
        pytest.skip(reasons[0][1])
    contenders = [one for one in found if isinstance(one, Contender)]
    wanted = {"vllm bf16", "vllm w4a16 g128", "vllm w4a16 g64", "vllm w8a8"}
    if "avx512f" in machine()["flags"] or "avx2" not in machine()["flags"]:
        assert wanted <= {contender.name for contender in contenders}
    else:  # vLLM has neither W4A16 there nor, but for the newest processors, a product in bf16
        assert wanted <= {contender.name for contender in contenders} | dict(reasons).keys()
    # without VNNI, oneDNN adds pairs of int8 products up in 16 bits
    saturates_nowhere = {"avx512_vnni", "avx_vnni", "amx_int8"} & set(machine()["flags"])
    for contender in contenders:
        contender.grow(2)
        check = gate.check_baseline(contender, x, [1, 3, 32], torch.arange(128))
        if "w8a8" in contender.name and not saturates_nowhere:
            assert check["error"] < 5 * check["bound"]
        else:
            assert check["passed"], check
        first, second = (call(x) for call in contender.copies)
        assert torch.equal(first, second)
