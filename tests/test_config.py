# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import pytest

from vllm_flexquant.config import (
    ENV_PREFIX,
    PROCESS_ENV,
    FlexQuantOptions,
    PolicyUpdate,
    options_from_environment,
    request_floor,
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
        ({"width": 6}, "width 6 has no effect under policy entropy"),
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


@pytest.mark.parametrize("value", [1, 9, "4", 4.0, True, None, [4]])
def test_bad_floor_is_refused(value):
    with pytest.raises(ValueError, match=r"flexquant_min_bits is .*; give an integer from 2 to 8"):
        request_floor({"flexquant_min_bits": value})


def test_floor_of_a_request():
    assert request_floor(None) == 0
    assert request_floor({"other": 1}) == 0
    assert request_floor({"flexquant_min_bits": 6}) == 6
    with pytest.raises(ValueError, match="unknown key 'flexquant_bits'"):
        request_floor({"flexquant_bits": 6})


def test_readme_lists_every_option_and_variable():
    text = README.read_text()
    for name, field in FlexQuantOptions.model_fields.items():
        assert f"| `{name}` | `{ENV_PREFIX}{name.upper()}` |" in text, name
        assert field.description
        assert field.description in text, name
    for name, meaning in PROCESS_ENV.items():
        assert f"| `{name}` | {meaning} |" in text
