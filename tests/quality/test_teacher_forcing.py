# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from benchmarks.quality.sequences import TokenSequence, read_records, scored, summarise
from benchmarks.quality.teacher_forcing import TeacherForcing

VOCABULARY = 11
TOKENS = {"a": [3, 1, 4], "b": [10, 0]}


@pytest.fixture
def reference(tmp_path, monkeypatch):
    """Log-probabilities [5, 11]: three tokens of `a`, two of `b`."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, VOCABULARY, generator=generator).log_softmax(-1)
    np.save(tmp_path / "reference.npy", rows.numpy())
    spans = {"a": {"start": 0, "tokens": 3}, "b": {"start": 3, "tokens": 2}}
    (tmp_path / "reference.json").write_text(json.dumps({"sequences": spans}))
    monkeypatch.setenv("BENCH_REFERENCE", str(tmp_path / "reference.npy"))
    monkeypatch.setenv("BENCH_RECORD", str(tmp_path / "records.jsonl"))
    return rows


@pytest.fixture
def processor(reference):
    return TeacherForcing(None, torch.device("cpu"), False)


def params(name: str | None = None, **more) -> SamplingParams:
    extra = {} if name is None else {"force_id": name, "force_tokens": TOKENS[name]}
    return SamplingParams(extra_args={**extra, **more} or None)


def update(size, removed=(), added=(), moved=()) -> BatchUpdate:
    return BatchUpdate(size, removed=list(removed), added=list(added), moved=list(moved))


def forced(logits: torch.Tensor) -> list[int | None]:
    """The only token that each row still allows, or None where several are."""
    finite = [row.isfinite().nonzero().flatten().tolist() for row in logits]
    return [row[0] if len(row) == 1 else None for row in finite]


def test_served_as_the_reference_has_no_divergence(processor, reference, tmp_path):
    output: list[int] = []
    processor.update_state(update(1, added=[(0, params("a", force_run="x"), [5], output)]))
    for position, token in enumerate(TOKENS["a"]):
        logits = reference[position : position + 1] + 7.0  # a constant does not matter
        assert forced(processor.apply(logits.clone())) == [token]
        output.append(token)
    records = read_records(tmp_path / "records.jsonl", "x")
    assert sorted(records) == [("a", 0), ("a", 1), ("a", 2)]
    for position, token in enumerate(TOKENS["a"]):
        record = records["a", position]
        assert record["kl"] == pytest.approx(0, abs=1e-5)
        assert record["top1"] is True
        assert record["nll"] == pytest.approx(-reference[position, token].item(), abs=1e-5)
    # all is said: the row is free again
    assert forced(processor.apply(torch.zeros(1, VOCABULARY))) == [None]


def test_divergence_is_that_of_the_row(processor, reference, tmp_path):
    served = torch.linspace(-2, 2, VOCABULARY).unsqueeze(0)
    processor.update_state(update(1, added=[(0, params("b"), None, [])]))
    processor.apply(served.clone())
    truth, other = reference[3].double(), served[0].double().log_softmax(-1)
    (record,) = read_records(tmp_path / "records.jsonl", "").values()
    assert record["kl"] == pytest.approx((truth.exp() * (truth - other)).sum().item(), rel=1e-5)
    assert record["top1"] is (truth.argmax().item() == VOCABULARY - 1)
    assert record["nll_reference"] == pytest.approx(-truth[10].item(), rel=1e-5)


def test_requests_are_followed_through_swap_move_and_removal(processor):
    a, b = [], []
    logits = torch.zeros(3, VOCABULARY)
    added = [(0, params("a"), [1], a), (1, params(), [1], []), (2, params("b"), [1], b)]
    processor.update_state(update(3, added=added))
    assert forced(processor.apply(logits.clone())) == [3, None, 10]
    a.append(3)
    b.append(10)
    processor.update_state(update(3, moved=[(0, 2, MoveDirectionality.SWAP)]))
    assert forced(processor.apply(logits.clone())) == [0, None, 1]
    a.append(1)
    # the free request in row 1 ends and the last row moves there
    processor.update_state(
        update(2, removed=[1], moved=[(2, 1, MoveDirectionality.UNIDIRECTIONAL)])
    )
    assert forced(processor.apply(logits[:2].clone())) == [0, 4]
    # `b` in row 0 gives way to a free request
    processor.update_state(update(2, added=[(0, params(), [1], [])]))
    assert forced(processor.apply(logits[:2].clone())) == [None, 4]
    processor.update_state(update(1, removed=[1]))
    assert forced(processor.apply(logits[:1].clone())) == [None]


def test_resumed_request_goes_on_where_it_stopped(processor):
    processor.update_state(update(1, added=[(0, params("a"), [1], [3, 1])]))
    assert forced(processor.apply(torch.zeros(1, VOCABULARY))) == [4]


def test_logits_of_a_discarded_prompt_chunk_do_not_count(processor, reference, tmp_path):
    output: list[int] = []
    processor.update_state(update(1, added=[(0, params("b"), [1], output)]))
    processor.apply(torch.zeros(1, VOCABULARY))  # the token is thrown away
    for position in range(2):
        processor.update_state(None)
        processor.apply(reference[3 + position : 4 + position].clone())
        output.append(TOKENS["b"][position])
    records = read_records(tmp_path / "records.jsonl", "")
    assert [round(r["kl"], 5) for r in records.values()] == [0, 0]
    (record,) = scored(records, [TokenSequence("b", [1], TOKENS["b"])])
    assert record["position"] == 1
    assert summarise([record])["tokens"] == 1


def test_missing_records_are_told(processor, tmp_path):
    with pytest.raises(ValueError, match=r"1 of 1 tokens were not recorded: \('b', 1\)"):
        scored(read_records(tmp_path / "records.jsonl", ""), [TokenSequence("b", [1], [10, 0])])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"force_id": "a"}, "force_tokens must be a list"),
        ({"force_id": "a", "force_tokens": ["3"]}, "force_tokens must be a list"),
        ({"force_id": "c", "force_tokens": [3]}, "'c', which the reference does not hold"),
        ({"force_id": "b", "force_tokens": [3, 3, 3]}, "3 force_tokens, .* holds 2 of b"),
    ],
)
def test_bad_requests_are_refused(reference, extra, message):
    with pytest.raises(ValueError, match=message):
        TeacherForcing.validate_params(SamplingParams(extra_args=extra))


def test_other_requests_are_accepted(reference):
    TeacherForcing.validate_params(SamplingParams())
    TeacherForcing.validate_params(params("a"))


def test_another_vocabulary_is_told(processor):
    processor.update_state(update(1, added=[(0, params("a"), [1], [])]))
    with pytest.raises(ValueError, match="vocabulary of 11, the served model one of 12"):
        processor.apply(torch.zeros(1, 12))


@pytest.mark.parametrize("every", [0, "2", 1.5])
def test_a_sample_of_no_tokens_is_refused(reference, every):
    with pytest.raises(ValueError, match="force_every is"):
        TeacherForcing.validate_params(params("a", force_every=every))


def test_a_sample_forces_all_and_records_some(processor, tmp_path):
    output: list[int] = []
    processor.update_state(
        update(1, added=[(0, params("a", force_run="x", force_every=3), [5], output)])
    )
    for token in TOKENS["a"]:
        assert forced(processor.apply(torch.zeros(1, VOCABULARY))) == [token]
        output.append(token)
    assert len(read_records(tmp_path / "records.jsonl", "x")) == 1


def test_without_a_reference_any_text_is_forced(processor, monkeypatch, tmp_path):
    monkeypatch.delenv("BENCH_REFERENCE")
    plain = TeacherForcing(None, torch.device("cpu"), False)
    request = SamplingParams(extra_args={"force_id": "new", "force_tokens": [7, 2]})
    TeacherForcing.validate_params(request)
    plain.update_state(update(1, added=[(0, request, [1], [])]))
    assert forced(plain.apply(torch.zeros(1, VOCABULARY))) == [7]
    (record,) = read_records(tmp_path / "records.jsonl", "").values()
    assert record["nll"] == pytest.approx(np.log(VOCABULARY))
    assert "kl" not in record


def test_environment_is_asked_for(monkeypatch):
    monkeypatch.delenv("BENCH_RECORD", raising=False)
    with pytest.raises(ValueError, match="needs the environment variable BENCH_RECORD"):
        TeacherForcing(None, torch.device("cpu"), False)
