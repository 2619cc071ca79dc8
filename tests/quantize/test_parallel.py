# SPDX-License-Identifier: Apache-2.0
import os
import signal
import socket
import sys
from dataclasses import replace
from functools import partial
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from vllm_flexquant.cli import app
from vllm_flexquant.format.layout import PlaneLayout
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.quantize import evaluate, parallel
from vllm_flexquant.quantize.blocks import BlockModel, Unit
from vllm_flexquant.quantize.calibrate import CalibrationOptions, calibrate_checkpoint
from vllm_flexquant.quantize.rounding import RoundingOptions, read_block, round_blocks
from vllm_flexquant.quantize.workfolder import WorkFolder

LAYOUT = PlaneLayout.parse("4|2|2")


@pytest.fixture(scope="module")
def cluster():
    """A Ray of this machine for all tests, whose tasks run side by side."""
    pytest.importorskip("ray")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with parallel.connect("local") as workers:
        yield workers
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def settings(tiny_text, tmp_path_factory):
    """As much text as estimates in two batches take."""
    text = tmp_path_factory.mktemp("text") / "words.txt"
    words = tiny_text.read_text().split()
    text.write_text(" ".join(words + words[::-1] + words[::2] + words[1::2]))
    return CalibrationOptions(
        text=str(text),
        search="tree",
        branch=2,
        stem=1,
        sequences=132,
        length=64,
        measured_rungs=5,
        measured_units=4,
    )


@pytest.fixture(scope="module")
def alone(cluster, tiny_model, settings, tmp_path_factory):
    """Folder and record of a run without Ray, with as many threads."""
    out = tmp_path_factory.mktemp("alone") / "out"
    return out, calibrate_checkpoint(tiny_model, out, FlexQuantOptions(), settings)


@pytest.fixture
def nested(tiny_model, tmp_path):
    model = BlockModel(tiny_model)
    chosen = frozenset(name for i in range(len(model)) for name, _ in model.linears(i))
    work = WorkFolder(tmp_path / "out", {}, resume=False)
    options = RoundingOptions(LAYOUT, 64, "rtn", chosen)
    units = round_blocks(model, torch.arange(64).view(4, 16), options, work)
    return evaluate.NestedModel(model, units, LAYOUT, partial(read_block, work))


def weights_of(folder):
    return {
        name: tensor.numpy().tobytes()
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_bad_addresses_are_named(tiny_model, tiny_text, tmp_path, monkeypatch):
    """Before the fixture connects this process, or no address would be looked at."""
    ray = pytest.importorskip("ray")
    assert not ray.is_initialized()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused at once
        closed = f"127.0.0.1:{taken.getsockname()[1]}"
        for address, message in (
            (closed, f"cannot connect to Ray at '{closed}'.*refused; start a cluster with"),
            (f"ray://{closed}", f"cannot connect to Ray at 'ray://{closed}'.*or use --ray local"),
            ("nonsense", "--ray is 'nonsense'; use local, auto, HOST:PORT"),
            ("host:port", "--ray is 'host:port'; use local, auto, HOST:PORT"),
        ):
            with pytest.raises(ValueError, match=message), parallel.connect(address):
                pass
    monkeypatch.setitem(sys.modules, "ray", None)
    out = tmp_path / "out"
    command = ["quantize", str(tiny_model), str(out), "--calibration", str(tiny_text)]
    result = CliRunner().invoke(app, [*command, "--length", "64", "--ray", "auto"])
    assert "pip install 'vllm-flexquant[ray]'" in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_on_ray_comes_to_the_same_bits(cluster, alone, tiny_model, settings, tmp_path):
    out, shares = tmp_path / "out", {}
    record = calibrate_checkpoint(
        tiny_model,
        out,
        FlexQuantOptions(),
        replace(settings, ray="auto"),
        advance=lambda name, share: shares.setdefault(name, []).append(share),
    )
    assert record == alone[1]
    assert weights_of(out) == weights_of(alone[0])
    for stage in ("sensitivity, estimated", "sensitivity, measured", "ladder, measured"):
        assert shares[stage] == sorted(shares[stage])
        assert 0.0 < shares[stage][1] < 1.0


@pytest.mark.slow
def test_what_ray_began_goes_on_without_it(cluster, alone, tiny_model, settings, tmp_path):
    class InterruptedRunError(Exception):
        pass

    def interrupt(name, share):
        if name == "ladder, measured" and share > 0:
            raise InterruptedRunError

    out, on_ray = tmp_path / "out", replace(settings, ray="auto")
    with pytest.raises(InterruptedRunError):
        calibrate_checkpoint(tiny_model, out, FlexQuantOptions(), on_ray, advance=interrupt)
    record = calibrate_checkpoint(tiny_model, out, FlexQuantOptions(), settings, resume=True)
    assert record == alone[1]
    assert weights_of(out) == weights_of(alone[0])


@pytest.mark.slow
def test_a_task_whose_worker_dies_is_run_again(cluster, nested, tmp_path):
    tokens = torch.arange(96).view(6, 16) % 90
    choices = [{unit.name: 4} for unit in chain(*nested.units)]
    marker = tmp_path / "killed"

    def read_or_die(index, nested_read=nested.read):
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return nested_read(index)
        os.kill(os.getpid(), signal.SIGKILL)

    (found,) = cluster.compare(replace(nested, read=read_or_die), tokens, choices, lambda _: None)
    assert marker.exists()
    assert torch.equal(found, evaluate.divergence(nested, tokens, choices))


def test_a_task_that_is_always_lost_ends_in_one_sentence(cluster, nested):
    def die(_):
        os.kill(os.getpid(), signal.SIGKILL)

    workers = parallel.OnRay("local", retries=1)
    choices = [{nested.units[0][0].name: 4}]
    with pytest.raises(ValueError, match=r"lost in the Ray cluster 'local' 2 times.*add --resume"):
        workers.compare(
            replace(nested, read=die), torch.arange(32).view(2, 16), choices, lambda _: None
        )


def test_an_error_in_a_task_is_the_one_that_it_would_be_here(cluster, nested):
    layers = [("broken", torch.full((4, 64), float("nan")), torch.eye(64))]
    options = RoundingOptions(LAYOUT, 64, "gptq", frozenset())
    with pytest.raises(ValueError, match=r"^broken"):
        cluster.quantize(layers, options)


def test_what_workers_cannot_see_is_named(cluster, tmp_path):
    here = tmp_path / "here.json"
    here.write_text("as it is here")
    workers = parallel.OnRay("local")
    workers.share(here)
    (mark,) = workers.place.marks
    workers.place = replace(workers.place, marks=(mark, (str(here), "hash as on another node")))
    with pytest.raises(ValueError, match=rf"does not see {here} as it is here; put the model"):
        workers._run(parallel._enter, [()], "cpu")
    with pytest.raises(ValueError, match=r"no node of the Ray cluster 'local' has .*GPU"):
        workers._claim("cuda", 1)


def test_other_versions_on_a_node_are_named(cluster):
    workers = parallel.OnRay("local")
    workers.place = replace(workers.place, versions=("vllm-flexquant 0.0", "torch 1.0"))
    with pytest.raises(ValueError, match=r"has vllm-flexquant .*here is vllm-flexquant 0\.0; inst"):
        workers._run(parallel._enter, [()], "cpu")


def test_choices_that_share_blocks_are_neighbours():
    units = [[Unit((f"{b}.{u}",), (64,), 64) for u in "ab"] for b in range(4)]
    early = [{"0.a": 4, f"{b}.b": 4} for b in (1, 2, 3)]
    late = [{"3.a": 4}, {"3.b": 4}, {"lm_head": 4}]
    choices = [choice for pair in zip(early, late, strict=True) for choice in pair]
    groups = parallel.group_choices(choices, units, 2)
    assert sorted(chain(*groups)) == list(range(6))
    assert [set(group) for group in groups] == [{1, 3, 5, 4}, {0, 2}]
    for count in (1, 3, 100):
        assert sorted(chain(*parallel.group_choices(choices, units, count))) == list(range(6))
