# SPDX-License-Identifier: Apache-2.0
import math

import pytest

from benchmarks.quality.engine import agreement
from benchmarks.quality.sequences import (
    TokenSequence,
    cut_text,
    load_sequences,
    mean_and_error,
    save_sequences,
)


class Characters:
    """A tokenizer with one token per character and a BOS token 0."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [0] * add_special_tokens + [ord(c) for c in text]}


def test_text_is_cut_evenly_behind_a_bos_token():
    text = "".join(chr(ord("a") + i % 26) for i in range(50))
    first, second = cut_text(Characters(), text, count=2, prompt=3, forced=4)
    assert "".join(map(chr, first.tokens[1:])) == text[:7]
    assert "".join(map(chr, second.forced)) == text[28:32]
    assert first.prompt[0] == 0
    assert len(first.prompt) == 4


@pytest.mark.parametrize("count", [0, 8])
def test_short_text_is_refused(count):
    with pytest.raises(ValueError, match="ask for 1 to 7"):
        cut_text(Characters(), "x" * 50, count, prompt=3, forced=4)


def test_sequences_survive_a_file(tmp_path):
    sequences = [TokenSequence("a", [1], [2, 3]), TokenSequence("b", [], [4])]
    save_sequences(tmp_path / "s.json", sequences)
    assert load_sequences(tmp_path / "s.json") == sequences


def test_mean_and_error():
    mean, error = mean_and_error([1.0, 2.0, 3.0])
    assert mean == 2
    assert error == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(mean_and_error([1.0])[1])


def test_agreement_is_by_noise_or_by_share():
    plain = [0.1, 0.2, 0.3, 0.4]
    noisy = agreement([0.2, 0.1, 0.4, 0.36], plain)
    assert noisy["within_noise"]
    assert noisy["agrees"]
    shifted = agreement([v + 0.01 for v in plain], plain)  # 4 % of the mean, without any noise
    assert not shifted["within_noise"]
    assert shifted["share"] == pytest.approx(0.04)
    assert shifted["agrees"]
    assert not agreement([v + 0.02 for v in plain], plain)["agrees"]
