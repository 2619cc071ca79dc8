# SPDX-License-Identifier: Apache-2.0
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flexquant import environment
from vllm_flexquant.options import (
    ENV_PREFIX,
    MOST_CLASSES,
    PROCESS_ENV,
    FlexQuantOptions,
    RequestClass,
    Sources,
    environment_names,
    environment_options,
    live_options,
)

README = Path(__file__).parent.parent / "README.md"
KEY = "a-secret-of-some-length"


def from_variables(**variables):
    """Options of an environment, without the prefix."""
    found = environment_options({f"{ENV_PREFIX}{name}": text for name, text in variables.items()})
    return Sources(environment=found).resolve()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "3|5"}, "option 'layout' is '3|5'"),
        ({"layout": "4|" * 5000}, "option 'layout' is '4|4|.*: write plane widths"),
        ({"layout": [4, None]}, "option 'layout' is a list: give plane widths"),
        ({"layout": 422}, "option 'layout' is 422: write it as in 4|2|2"),
        ({"width": 5, "policy": "static"}, "width 5 is not in layout 4|2|2; it has 4, 6, 8"),
        ({"width": 9, "policy": "static"}, "option 'width' is 9"),
        ({"policy": "guess"}, "option 'policy' is 'guess'.*entropy.*static"),
        ({"bits": 5}, "unknown option 'bits'; did you mean min_bits?"),
        ({"strategy": 5}, "unknown option 'strategy'; options are layout"),
        ({"group_size": 48}, "group size 48 is not supported; use 128, 64 or 32"),
        ({"min_bits": 6, "max_bits": 4}, "min_bits 6 is above max_bits 4"),
        ({"width": 6}, "width 6 has no effect under policy auto"),
        ({"policy": "static", "width": 6, "level": 3}, "width 6 and level 3 are both set"),
        ({"draft_width": 6, "draft_level": 3}, "draft_level 3 and draft_width 6 are both set"),
        ({"entropy_low": 3.0}, "entropy_low 3.0 is not below entropy_high 2.5"),
        ({"policy": "load"}, "policy load has no target; set target_ms"),
        ({"request_classes": ["silver"]}, "request_classes silver is not one of the classes"),
        ({"request_floor": 9}, "option 'request_floor' is 9: give allow, deny or bits from 2 to 8"),
        ({"request_budget": "no"}, "option 'request_budget' is 'no': give allow, deny or nats"),
        ({"ignore": ["a", "\n"]}, r"option 'ignore.1' is '..': names hold printable"),
        ({"trace_steps": 1_000_000}, "option 'trace_steps' is 1000000: .* equal to 100000"),
    ],
)
def test_bad_options_name_source_value_and_remedy(changes, message):
    with pytest.raises(ValueError, match=re.escape("here: ")) as error:
        FlexQuantOptions().updated(changes, "here")
    assert re.search(message.replace("|", r"\|").replace("?", r"\?"), str(error.value))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


# ---- environment


def test_environment_is_read_and_checked():
    options = from_variables(POLICY="static", WIDTH="6", IGNORE="a, b", OUTPUT_LAYER="0")
    assert (options.policy, options.width, options.ignore) == ("static", 6, ("a", "b"))
    assert options.output_layer is False
    with pytest.raises(ValueError, match=r"environment: option 'width' is '6.5'"):
        from_variables(WIDTH="6.5")
    with pytest.raises(
        ValueError,
        match="environment: unknown variable 'VLLM_FLEXQUANT_POLICIES'; "
        r"did you mean VLLM_FLEXQUANT_POLICY\?",
    ):
        from_variables(POLICIES="6")
    with pytest.raises(ValueError, match=r"'VLLM_FLEXQUANT_XYZZY'; variables are VLLM_.*, VLLM_"):
        from_variables(XYZZY="6")


def test_an_empty_variable_is_unset():
    empty = {name: text for name in environment_names() for text in ("", "  ")}
    assert environment_options(empty) == {}
    assert from_variables(CLASSES="", LAYOUT=" ", WIDTH="") == FlexQuantOptions()
    assert environment_options({"VLLM_FLEXQUANT_POLICIES": ""}) == {}


def test_what_kubernetes_and_docker_inject_is_passed_over_with_one_line(caplog):
    service = {
        "VLLM_FLEXQUANT_SERVICE_HOST": "10.0.0.1",
        "VLLM_FLEXQUANT_SERVICE_PORT": "8000",
        "VLLM_FLEXQUANT_SERVICE_PORT_HTTP_METRICS": "8000",
        "VLLM_FLEXQUANT_PORT": "tcp://10.0.0.1:8000",
        "VLLM_FLEXQUANT_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "VLLM_FLEXQUANT_PORT_8000_TCP_PROTO": "tcp",
        "VLLM_FLEXQUANT_PORT_8000_TCP_PORT": "8000",
        "VLLM_FLEXQUANT_PORT_8000_TCP_ADDR": "10.0.0.1",
        "VLLM_FLEXQUANT_ROUTER_SERVICE_HOST": "10.0.0.2",
        "VLLM_FLEXQUANT_NAME": "/web/vllm_flexquant",
        "VLLM_FLEXQUANT_ENV_LANG": "C",
    }
    environment.logger.addHandler(caplog.handler)  # vLLM's loggers may not propagate
    try:
        with caplog.at_level("INFO", environment.logger.name):
            for _ in range(3):
                found = environment_options(service | {"VLLM_FLEXQUANT_MIN_BITS": "4"})
                assert found == {"min_bits": "4"}
    finally:
        environment.logger.removeHandler(caplog.handler)
    lines = {id(record): record for record in caplog.records}
    (line,) = lines.values()
    assert "passing over VLLM_FLEXQUANT_ENV_LANG, VLLM_FLEXQUANT_NAME" in line.getMessage()


def test_classes_come_as_json():
    options = from_variables(CLASSES='{"gold": {"budget": 0.002}, "b": {}}', DEFAULT_CLASS="b")
    assert options.classes == {"gold": RequestClass(budget=0.002), "b": RequestClass()}
    with pytest.raises(ValueError, match=r"default_class silver is not one of .* gold, b"):
        from_variables(CLASSES='{"gold": {}, "b": {}}', DEFAULT_CLASS="silver")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{gold", "option 'classes' is '{gold'"),
        ('{"a": {}, "a": {}}', "'a' is there twice"),
        ('{"a": {"budget": NaN}}', "NaN is no number"),
        ('{"a": {"budget": 1e400}}', "option 'classes.a.budget' is inf"),
        ('{"a": {"min_bits": true}}', "option 'classes.a.min_bits' is True: give a number"),
        ('{"a": {"bits": 4}}', "option 'classes.a.bits' is 4: Extra inputs"),
        ('{"": {}}', "option 'classes.*': String should have at least 1 character"),
        ('{"a\\n": {}}', "names hold printable characters only"),
        (json.dumps({"a" * 65: {}}), "should have at most 64 characters"),
        ("[" * 100_000, "nested too deeply"),
        (json.dumps({f"c{n}": {} for n in range(MOST_CLASSES + 1)}), "at most 47 items"),
    ],
)
def test_bad_classes_are_refused(text, message):
    with pytest.raises(ValueError, match=f"^environment: .*{message}") as error:
        from_variables(CLASSES=text, DEFAULT_CLASS="a")
    assert len(str(error.value)) < 500


# ---- sources


def test_of_two_sources_the_later_one_wins():
    additional, overrides = {"min_bits": 3, "max_bits": 7}, {"min_bits": 4}
    variables = {"min_bits": "2", "max_bits": "6", "dwell": "5"}
    options = Sources(variables, additional, overrides).resolve()
    assert (options.min_bits, options.max_bits, options.dwell) == (4, 7, 5)
    assert Sources({"target_ms": "50"}, {"target_ms": None}).resolve().target_ms is None
    assert Sources().resolve() == FlexQuantOptions()


def test_options_of_several_sources_are_checked_together():
    variables = {"classes": '{"gold": {}}'}
    with pytest.raises(ValueError, match=r"^environment: default_class balanced is not one"):
        Sources(variables).resolve()
    options = Sources(variables, {"default_class": "gold"}).resolve()
    assert (options.default_class, list(options.classes)) == ("gold", ["gold"])
    with pytest.raises(
        ValueError, match=r"^environment and --additional-config flexquant: min_bits 6 is above"
    ):
        Sources({"min_bits": "6"}, {"max_bits": 5}).resolve()
    with pytest.raises(ValueError, match=r"^--hf-overrides quantization_config: option 'dwell'"):
        Sources({"dwell": "3"}, {"dwell": 2}, {"dwell": 0}).resolve()
    with pytest.raises(ValueError, match=r"^--additional-config flexquant: unknown option 'bits'"):
        Sources(additional={"bits": 3}).resolve()


def test_a_saved_checkpoint_fixes_its_format():
    stored = {"layout": "2|2|4", "group_size": 32, "scales": "shared"}
    options = Sources({"layout": "4|2|2", "min_bits": "4"}, {"dwell": 2}, {}, stored).resolve()
    assert (str(options.layout), options.min_bits, options.dwell) == ("2|2|4", 4, 2)
    for given_to in ("additional", "overrides"):
        with pytest.raises(ValueError, match=r"option 'layout' is fixed .* \(2\|2\|4\); drop it"):
            Sources(**{given_to: {"layout": "4|2|2"}}, stored=stored).resolve()


def test_the_process_environment_is_read(monkeypatch):
    monkeypatch.setenv("VLLM_FLEXQUANT_MIN_BITS", "4")
    assert Sources.from_environment({"max_bits": 6}).resolve().min_bits == 4


# ---- the operator's key


def test_the_operators_key_is_in_the_environment_only_and_never_shown():
    options = from_variables(OPERATOR_KEY=KEY, MIN_BITS="4")
    sources = Sources(environment={"operator_key": KEY})
    assert options.operator_key.get_secret_value() == KEY
    assert options.changed({"min_bits": 2}).operator_key == options.operator_key
    assert pickle.loads(pickle.dumps(options)) == options
    seen = [options, options.plain(), options.model_dump(), options.model_dump_json(), sources]
    for text in (f"{seen!r} {[str(what) for what in seen]}", str(vars(options))):
        assert KEY not in text
    assert "operator_key" not in options.plain()
    assert from_variables(OPERATOR_KEY="").operator_key is None
    for given_to in ("additional", "overrides"):
        with pytest.raises(ValueError, match="set VLLM_FLEXQUANT_OPERATOR_KEY") as error:
            Sources(**{given_to: {"operator_key": KEY}}).resolve()
        assert KEY not in str(error.value)
    with pytest.raises(ValueError, match="option 'operator_key' cannot be changed") as error:
        options.changed({"operator_key": KEY})
    assert KEY not in str(error.value)


@pytest.mark.parametrize("bad", ["sh0rtky", "with a space", "with-ümlaut", "x" * 257, "a\nlonger1"])
def test_a_bad_key_is_refused_without_saying_it(bad):
    bad = bad[:7] if bad == "sh0rtky" else bad
    with pytest.raises(ValueError, match="option 'operator_key': give 8 to 256") as error:
        from_variables(OPERATOR_KEY=bad)
    assert bad not in str(error.value)
    with pytest.raises(ValueError, match="operator_key") as direct:
        FlexQuantOptions(operator_key=bad)
    assert bad not in str(direct.value)
    assert FlexQuantOptions(operator_key="12345678").operator_key is not None


# ---- changes while serving


def test_a_change_pins_and_unpins():
    options = FlexQuantOptions()
    pinned = options.changed({"width": 6})
    assert (pinned.policy, pinned.width) == ("manual", 6)
    levelled = pinned.changed({"level": 3})
    assert (levelled.policy, levelled.width, levelled.level) == ("manual", None, 3)
    assert levelled.changed({"width": None, "dwell": 2}).level == 3
    assert levelled.changed({"policy": "static"}).level == 3
    free = levelled.changed({"policy": "entropy", "min_bits": 4})
    assert (free.policy, free.width, free.level, free.min_bits) == ("entropy", None, None, 4)
    with pytest.raises(ValueError, match=r"^width 5 is not in layout"):
        options.changed({"width": 5})
    with pytest.raises(ValueError, match=r"^width 6 and level 3 are both set"):
        options.changed({"width": 6, "level": 3})


def test_a_null_takes_away_what_may_be_absent():
    options = FlexQuantOptions(target_ms=50, draft_level=2, budget=0.1)
    assert options.changed({"target_ms": None}).target_ms is None
    assert options.changed({"budget": None}) == options
    assert options.changed({"draft_level": None}).draft_level is None
    at_width = options.changed({"draft_width": 4})
    assert (at_width.draft_level, at_width.draft_width) == (None, 4)
    assert at_width.changed({"draft_level": None}).draft_width is None
    assert at_width.changed({"min_bits": 4}).draft_width == 4
    with pytest.raises(ValueError, match=r"^policy load has no target"):
        options.changed({"policy": "load"}).changed({"target_ms": None})


@pytest.mark.parametrize("name", ["layout", "trace_steps", "classes", "request_floor"])
def test_an_option_that_is_not_live_is_refused(name):
    assert name not in live_options()
    with pytest.raises(
        ValueError,
        match=f"^option '{name}' cannot be changed while serving; options that can be changed are "
        "policy, budget, ",
    ):
        FlexQuantOptions().changed({name: 4})
    with pytest.raises(
        ValueError, match=r"^unknown option 'bits\\n'; options that can be .* dwell"
    ):
        FlexQuantOptions().changed({"bits\n": 4})


NO_NUMBERS = [True, False, "", "nan", "1e400", "\ud800", "\x00\u2028é", "9" * 5000, "x" * 100_000]
NO_NUMBERS += [10**30, -(10**30), 10**400, -1, 1e308, float("nan"), float("inf"), float("-inf")]
NO_NUMBERS += [[], {}, [6], {"a": 1}, b"x"]
HOSTILE = [*NO_NUMBERS, 2**31, 0, 9, 6.5, 5e-324, "6\n"]
CHOOSE = ["policy", "signal", "rank_first", "up_for_free", "draft_gate", "prefill", "aggregate"]


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("name", live_options())
def test_no_value_gets_past_its_bounds(name):
    for value in [*HOSTILE, nested(5000)]:
        check_change(FlexQuantOptions(), {name: value})
    if name not in CHOOSE:
        for value in [*NO_NUMBERS, nested(5000)]:
            assert f"option '{name}' is " in str(outcome(FlexQuantOptions(), {name: value}))


def outcome(options, body):
    """The changed options, or why they are refused."""
    try:
        return options.changed(body)
    except ValueError as error:
        return str(error)


def check_change(old, body):
    """A change is made as asked or refused with a short plain sentence; the old options stay."""
    before = pickle.dumps(old)
    new = outcome(old, body)
    assert pickle.dumps(old) == before
    if isinstance(new, str):
        assert new.isascii()
        assert new.isprintable()
        assert len(new) < 700
        return
    named = set(body)
    for group in ({"policy", "width", "level"}, {"draft_level", "draft_width"}):
        named |= group if group & named else set()
    for name in FlexQuantOptions.model_fields.keys() - named:
        assert getattr(new, name) == getattr(old, name)
    text = json.dumps(new.plain(), allow_nan=False)
    assert FlexQuantOptions().updated(json.loads(text), "here") == new


NUMBERS = st.integers() | st.integers(0, 10) | st.floats() | st.floats(0, 3) | st.booleans()
TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)
CHOICES = st.sampled_from(
    ["auto", "budget", "entropy", "load", "static", "manual", "none", "gain", "policy", "max", "6"]
)
VALUES = st.recursive(
    st.none() | NUMBERS | TEXTS | CHOICES | st.sampled_from(HOSTILE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(live_options())
FITTING = st.integers(2, 8) | st.floats(0.01, 1) | CHOICES
BODIES = (
    st.dictionaries(NAMES, FITTING, max_size=2)
    | st.dictionaries(NAMES, NUMBERS | CHOICES | st.none(), max_size=4)
    | st.dictionaries(
        NAMES | st.sampled_from(list(FlexQuantOptions.model_fields)) | TEXTS, VALUES, max_size=4
    )
)
STARTS = [
    FlexQuantOptions(),
    FlexQuantOptions(policy="load", target_ms=50, draft_width=4, layout="2|1|1|2|2"),
    FlexQuantOptions(policy="static", width=6, draft_level=3),
]


@settings(max_examples=3000, deadline=None)
@given(st.sampled_from(STARTS), BODIES)
def test_any_body_changes_what_it_names_or_is_refused(old, body):
    check_change(old, body)


def test_options_import_neither_torch_nor_vllm():
    code = "import sys, vllm_flexquant.options; print({'torch', 'vllm', 'numpy'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "set()"


# ---- README


def readme_row(name, field):
    default = FlexQuantOptions().plain().get(name)
    plain = str(default).lower() if isinstance(default, bool) else default
    cell = "as above" if name == "classes" else f"`{plain}`" if plain not in (None, []) else "-"
    live = "yes" if name in live_options() else "-"
    cells = (f"`{name}`", f"`{ENV_PREFIX}{name.upper()}`", cell, live, field.description)
    return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"


def test_readme_has_the_table_of_options():
    rows = [readme_row(*item) for item in FlexQuantOptions.model_fields.items()]
    assert "\n".join(rows) in README.read_text()


def test_readme_has_the_variables_of_the_process():
    rows = [f"| `{name}` | {meaning} |" for name, meaning in PROCESS_ENV.items()]
    assert "\n".join(rows) in README.read_text()
