# SPDX-License-Identifier: Apache-2.0
import pytest

pytest.importorskip("vllm")

from benchmarks import papers
from benchmarks.report import papers as section


def speed(kl: float, *rounds: float) -> dict:
    return {
        "quality": {"kl": kl},
        "decode_tokens_per_second": {"1": {"rate": {"rounds": list(rounds)}}},
    }


def test_without_results_every_line_says_what_to_run():
    rows = papers.rows_of({}, None)
    assert {row.ours for row in rows} == {"not measured"}
    assert all("make bench" in row.source or "benchmarks.papers" in row.source for row in rows)
    assert all(row.claim and row.quoted_from and row.paper for row in rows)


def test_each_line_names_the_file_that_its_figures_are_from():
    results = {
        "speed": {
            "flags": ["avx2"],
            "configurations": {
                "fp32": speed(0.0, 10.0, 20.0),
                "bf16": speed(0.001, 1.0, 1.0),
                "calibrated-4": speed(0.2, 20.0, 40.0),
            },
        },
        "policies": {
            "steps": {
                "1": {f"probe {b}": {"time_over_8_bit": 0.8} for b in ("0.01", "0.03", "0.1")}
            }
        },
    }
    rows = {row.system: row for row in papers.rows_of(results, None)}
    assert rows["AnyBCQ, Any-Precision"].ours == "2.00 at 4 bits, KL 0.2000"
    assert "fp32's" in rows["AnyBCQ, Any-Precision"].comparable
    assert rows["AnyBCQ, Any-Precision"].source.startswith("speed.json: ")
    assert rows["FlexQuant"].ours.startswith("1.25 at 0.01 nats")
    assert rows["FlexQuant"].source.startswith("policies.json: ")
    assert rows["FlexiQ"].ours == "not measured"


def test_the_table_says_quoted_or_measured_in_every_line():
    rows = [vars(row) for row in papers.rows_of({}, None)]
    rows[0] |= {"ours": "1.3", "source": "x.json: a"}
    first, *others = section.whole({"rows": rows}, notes=True).splitlines()[2:]
    assert "quoted: " in first
    assert "measured: 1.3 (x.json: a)" in first
    assert all("quoted: " in line and "not measured; " in line for line in others)
