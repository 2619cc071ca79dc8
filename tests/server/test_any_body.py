# SPDX-License-Identifier: Apache-2.0
"""Whatever is posted is answered with a change or a sentence, before a planner that decides."""

import asyncio
import json
import math
import os
from collections import Counter

import by_hand
import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.served import OPERATOR, Client, Worker, application
from vllm_flexquant.options import FlexQuantOptions, live_options

PATH = "/v1/flexquant"
BODIES = int(os.environ.get("BODIES", "1500"))
"""To each planner; 10,000 take a minute."""

NUMBERS = [0, -1, 1, 2, 6, 8, 2**31, 2**63, 2**64, 10**400]
NUMBERS += [0.5, -0.0, 5e-324, 1e-6, 1e308, 100.5]
WORDS = ["", "mean", "max", "static", "load", "entropy", "budget", "none", "6", "nan"]
WORDS += ["\ud800", "\0"]
LITERALS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "00", "'a'"]
LITERALS += ["9" * 5000, "1" + "0" * 400]

numbers = st.sampled_from(NUMBERS) | st.integers() | st.floats()
texts = st.sampled_from(WORDS) | st.text(max_size=80)
scalars = st.none() | st.booleans() | numbers | texts
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
names = st.sampled_from(live_options()) | st.sampled_from(list(FlexQuantOptions.model_fields))
fitting = {
    "policy": st.sampled_from(["entropy", "progressive", "load", "static", "manual", "budget"]),
    "width": st.sampled_from([4, 6, 8]),
    "min_bits": st.integers(2, 8),
    "max_bits": st.integers(2, 8),
    "target_ms": st.none() | st.floats(1e-3, 3.6e6),
    "budget": st.floats(1e-6, 100),
    "level": st.integers(0, 12),
    "aggregate": st.sampled_from(["mean", "quantile", "max"]),
    "dwell": st.integers(1, 2**31 - 1),
}
sensible = st.fixed_dictionaries({}, optional=fitting)
objects = st.dictionaries(names | texts, scalars | anything, max_size=3)
literal = st.builds("{{{}: {}}}".format, names.map(json.dumps), st.sampled_from(LITERALS))
deep = st.builds(
    lambda depth, pair: pair[0] * depth + pair[1] * depth,
    st.integers(0, 20_000),
    st.sampled_from([("[", "]"), ('{"width":', "}"), ("[", "")]),
)
written = (sensible | objects | anything).map(json.dumps) | literal | deep
cut = st.builds(lambda text, n: text.encode(errors="replace")[:n], written, st.integers(0, 40))
whole = written.map(lambda text: text.encode(errors="surrogatepass"))
bodies = whole | cut | st.binary(max_size=40)


def strictly(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def undecided():
    return by_hand.planner(policy="entropy", trace_steps=4)


def decide(planner):
    """Steps of two requests, the second one's logits no numbers."""
    for slot, asked in enumerate((None, {"flexquant_min_bits": 4})):
        if slot not in planner.grants:
            by_hand.start(planner, slot, asked)
    planner.step(by_hand.batch("ab"))
    planner.probe(torch.tensor([[0.5] * 4, [math.nan] * 4]))
    planner.logits(torch.tensor([[0.0, 1.0, 2.0], [math.nan] * 3]))


@pytest.mark.slow
@pytest.mark.parametrize("made", [undecided, by_hand.calibrated])
def test_any_body_is_a_change_or_a_sentence(made):
    workers = [Worker(made()), Worker(made())]
    planners = [worker.planner for worker in workers]
    client = Client([workers[:1], workers[1:]])
    live = {name: getattr(planners[0].options, name) for name in live_options()}
    seen = Counter()
    http = httpx.AsyncClient(
        transport=httpx.ASGITransport(application(client)), base_url="http://server"
    )

    async def post(body):
        before = [planner.options for planner in planners]
        answer = await http.post(PATH, content=body, headers=OPERATOR)
        seen[answer.status_code] += 1
        found = strictly(answer.content)
        if answer.status_code in (400, 413):
            assert [planner.options for planner in planners] == before
            assert 0 < len(found["error"]["message"]) < 1000
            return
        assert answer.status_code == 200
        expected = [options.changed(json.loads(body)) for options in before]
        for planner, options in zip(planners, expected, strict=True):
            assert planner.options.policy != "auto"
            assert planner.options == options.model_copy(update={"policy": planner.options.policy})
            decide(planner)
        for path in (PATH, "/metrics"):
            assert (await http.get(path, headers=OPERATOR)).status_code == 200
        for planner in planners:
            planner.change(live)

    with asyncio.Runner() as runner:

        @settings(
            max_examples=BODIES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(bodies)
        def check(body):
            runner.run(post(body))

        check()
        runner.run(http.aclose())
    assert seen.total() >= BODIES
    assert seen[200] > BODIES / 20, seen
