# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from benchmarks.report import figures, page, quality, speed, text
from benchmarks.report.readme import fill


def entry(label: str, kl: float, speeds: dict[str, float], prompt: float) -> dict:
    def rate(value: float) -> dict:
        return {"rate": {"rounds": [10 * value, 20 * value, 10 * value]}}

    return {
        "label": label,
        "stored_bytes": None,
        "quality": {"kl": kl, "kl_standard_error": 0.001, "top1": 0.9, "nll": 1.0},
        "decode_tokens_per_second": {batch: rate(v) for batch, v in speeds.items()},
        "prefill_tokens_per_second": rate(prompt),
    }


@pytest.fixture
def results() -> dict:
    return {
        "settings": {"rounds": 3, "prefill_tokens": 256, "scored_tokens": 100},
        "cpu_while_measuring": {"other_processes": 0.01, "stolen_by_host": 0.0},
        "unavailable": {"w4a16": "no kernel."},
        "configurations": {
            "bf16": entry("bf16", 0.001, {"1": 1.0, "16": 1.0}, 1.0),
            "w8a8": entry("W8A8", 0.04, {"1": 1.5, "16": 1.2}, 2.0),
            "calibrated-8": entry("flexquant 8 bit, calibrated", 0.01, {"1": 1.4, "16": 1.3}, 0.9),
            "calibrated-6": entry("flexquant 6 bit, calibrated", 0.041, {"1": 1.8, "16": 1.1}, 0.9),
            "calibrated-4": entry("flexquant 4 bit, calibrated", 0.2, {"1": 9.0, "16": 9.0}, 0.9),
        },
    }


def test_a_static_choice_meets_the_fastest_of_no_more_kl(results):
    bf16, w8a8 = speed.duels(results["configurations"], "1", "bf16")
    assert (bf16.static, bf16.flexquant, bf16.ratio) == ("bf16", None, None)
    assert (w8a8.flexquant, w8a8.flexquant_kl) == ("flexquant 6 bit, calibrated", 0.041)
    assert w8a8.ratio == pytest.approx(1.8 / 1.5)
    _, many = speed.duels(results["configurations"], "16", "bf16")
    assert many.flexquant == "flexquant 8 bit, calibrated"
    _, prompt = speed.duels(results["configurations"], speed.PROMPT, "bf16")
    assert prompt.ratio == pytest.approx(0.9 / 2.0)


def test_losses_name_each_case(results):
    lines = speed.losses(results, "bf16").splitlines()
    assert lines == [
        "- **bf16** (nearer to the reference than any of ours): 1 request: 0.71 times the speed of "
        "the nearest of ours; 16 requests: 0.77 times the speed of the nearest of ours; a prompt: "
        "1.11 times the speed of the nearest of ours.",
        "- **W8A8**: a prompt: 2.22 times as fast at no more KL.",
    ]


def test_the_section_says_what_is_missing_and_who_else_ran(results):
    written = speed.section(results, {"machine": {"flags": ["avx512_bf16"]}})
    assert "Not measured: w4a16: no kernel." in written
    assert "other processes used 1.0 % of the cores" in written
    assert "| W8A8 | – | – | 0.0400 ± 0.0010 | 90.0 % | 2.72 | 1.50 |" in written


def test_speeds_are_multiples_of_what_one_would_serve_there(results):
    has, lacks = ({"machine": {"flags": flags}} for flags in (["amx_bf16"], ["avx2"]))
    assert speed.base_of(results, has) == "bf16"
    assert speed.base_of(results, lacks) == "bf16"  # fp32 was not measured
    results["configurations"]["fp32"] = entry("fp32", 0.0, {"1": 0.5, "16": 4.0}, 1.0)
    assert speed.base_of(results, lacks) == "fp32"
    found = speed.speed_over(results["configurations"], "w8a8", "16", "fp32")
    assert found["median"] == pytest.approx(0.3)
    assert speed.speed_over(results["configurations"], "w8a8", "32", "fp32") is None
    assert "no instructions for bf16" in speed.section(results, lacks)


def test_cells_of_tables_are_escaped():
    assert text.table(["a"], [["4|2|2"]]).splitlines()[-1] == "| 4\\|2\\|2 |"


def test_numbers_that_are_nothing_have_no_sign():
    assert text.nats(-1.6e-9, 5.9e-9) == "0.0000 ± 0.0000"
    assert text.nats(-0.0123) == "-0.0123"
    assert quality.signed(-0.124) == "-0.12"
    assert quality.signed(None) == quality.signed(float("nan")) == "–"


def test_each_configuration_has_a_family():
    found = [figures.family(n) for n in ("bf16", "w4a16-weights-only", "llama-q8_0", "budget-0.1")]
    assert found == ["vLLM, unquantized", "vLLM W4A16", "llama.cpp", "flexquant, policy budget"]
    assert {figures.family(n) for n in ("flexquant-4", "flexquant-bf16-output-4")} == {
        "flexquant, rounded to nearest"
    }


def test_pictures_are_drawn_for_both_pages_and_go_into_the_page(results, tmp_path):
    pytest.importorskip("matplotlib")
    paint = figures.speed_picture(results["configurations"], ["1", "16"], "bf16")
    figures.draw_all(tmp_path, "quality-speed", paint)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "quality-speed-dark.svg",
        "quality-speed-light.svg",
    ]
    written = page.to_html(
        f"# T\n\n{text.picture('quality-speed', 'words')}\n\n| a |\n| --- |\n| 1 |\n", tmp_path, "T"
    )
    assert written.count("<svg") == 2
    assert "<picture>" not in written
    assert 'id="quality-speed-dark-' in written
    assert '<div class="table"><table>' in written


def test_a_block_of_unknown_name_or_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="'x' is none of demo, headline"):
        fill("<!-- generated: x from a.json -->\n<!-- /generated -->", tmp_path)
    with pytest.raises(ValueError, match=r"made of a\.json, which is not there"):
        fill("<!-- generated: demo from a.json -->\n<!-- /generated -->", tmp_path)


def test_text_beside_blocks_is_left_alone(tmp_path: Path):
    assert fill("# a\n\n<!-- a comment -->\n", tmp_path) == "# a\n\n<!-- a comment -->\n"
