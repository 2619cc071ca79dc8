# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import pytest

from vllm_flexquant.options import (
    ENV_PREFIX,
    PROCESS_ENV,
    FlexQuantOptions,
    PolicyUpdate,
    RequestClass,
    options_from_environment,
)

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "3|5"}, "option 'layout' is '3|5'"),
        ({"width": 5, "policy": "static"}, "width 5 is not in layout 4|2|2; it has 4, 6, 8"),
        ({"width": 9, "policy": "static"}, "option 'width' is 9"),
        ({"policy": "guess"}, "option 'policy' is 'guess'.*entropy.*static"),
        ({"bits": 5}, "unknown option 'bits'; options are layout"),
        ({"group_size": 48}, "group size 48 is not supported; use 128, 64 or 32"),
        ({"min_bits": 6, "max_bits": 4}, "min_bits 6 is above max_bits 4"),
        ({"width": 6}, "width 6 has no effect under policy auto"),
        ({"policy": "static", "width": 6, "level": 3}, "width 6 and level 3 are both set"),
        ({"entropy_low": 3.0}, "entropy_low 3.0 is not below entropy_high 2.5"),
    ],
)
def test_bad_options_name_source_value_and_remedy(changes, message):
    with pytest.raises(ValueError, match=re.escape("here: ")) as error:
        FlexQuantOptions().updated(changes, "here")
    assert re.search(message.replace("|", r"\|"), str(error.value))
    assert "\n" not in str(error.value)


def test_environment_is_read_and_checked(monkeypatch):
    monkeypatch.setenv("VLLM_FLEXQUANT_POLICY", "static")
    monkeypatch.setenv("VLLM_FLEXQUANT_WIDTH", "6")
    monkeypatch.setenv("VLLM_FLEXQUANT_IGNORE", "a, b")
    monkeypatch.setenv("VLLM_FLEXQUANT_OUTPUT_LAYER", "0")
    options = options_from_environment()
    assert (options.policy, options.width, options.ignore) == ("static", 6, ("a", "b"))
    assert options.output_layer is False
    monkeypatch.setenv("VLLM_FLEXQUANT_POLICIES", "6")
    with pytest.raises(ValueError, match="unknown variable VLLM_FLEXQUANT_POLICIES"):
        options_from_environment()


def test_update_pins_and_unpins():
    options = FlexQuantOptions()
    pinned = PolicyUpdate(width=6).apply(options)
    assert (pinned.policy, pinned.width) == ("manual", 6)
    levelled = PolicyUpdate(level=3).apply(pinned)
    assert (levelled.policy, levelled.width, levelled.level) == ("manual", None, 3)
    free = PolicyUpdate(policy="entropy", min_bits=4).apply(levelled)
    assert (free.policy, free.width, free.level, free.min_bits) == ("entropy", None, None, 4)
    with pytest.raises(ValueError, match="width 5 is not in layout"):
        PolicyUpdate(width=5).apply(options)


def test_classes_come_as_json(monkeypatch):
    monkeypatch.setenv("VLLM_FLEXQUANT_CLASSES", '{"gold": {"budget": 0.002}, "bulk": {}}')
    monkeypatch.setenv("VLLM_FLEXQUANT_DEFAULT_CLASS", "bulk")
    options = options_from_environment()
    assert options.classes["gold"].budget == 0.002
    assert options.classes["bulk"] == RequestClass()
    monkeypatch.setenv("VLLM_FLEXQUANT_DEFAULT_CLASS", "silver")
    with pytest.raises(ValueError, match=r"default_class silver is not one of .* gold, bulk"):
        options_from_environment()
    monkeypatch.setenv("VLLM_FLEXQUANT_CLASSES", "{gold")
    with pytest.raises(ValueError, match=r"environment: option .classes. is .\{gold"):
        options_from_environment()


def test_readme_lists_every_option_and_variable():
    text = README.read_text()
    for name, field in FlexQuantOptions.model_fields.items():
        assert f"| `{name}` | `{ENV_PREFIX}{name.upper()}` |" in text, name
        assert field.description
        assert field.description in text, name
    for name, meaning in PROCESS_ENV.items():
        assert f"| `{name}` | {meaning} |" in text
