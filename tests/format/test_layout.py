# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flexquant.format import GROUP_SIZES, PlaneLayout, choose_group_size
from vllm_flexquant.format.layout import width_at_least, width_at_most


@pytest.mark.parametrize(
    ("text", "widths"), [("4|2|2", (4, 6, 8)), ("2|2|4", (2, 4, 8)), ("2|1|1|2|2", (2, 3, 4, 6, 8))]
)
def test_widths_are_prefixes_of_planes(text, widths):
    layout = PlaneLayout.parse(text)
    assert layout.widths == widths
    assert str(layout) == text
    assert PlaneLayout.parse(layout) is layout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3|5", "not 1, 2 or 4 bits wide"),
        ("4|2|1", "has 7 bits"),
        ("1|1|2|4", "starts with a 1-bit plane"),
        ("4-2-2", "cannot be read"),
        (7, "cannot be read"),
    ],
)
def test_bad_layouts_name_value_and_remedy(text, message):
    with pytest.raises(ValueError, match=message) as error:
        PlaneLayout.parse(text)
    assert "4|2|2" in str(error.value) or "2|1|1|2|2" in str(error.value)


@given(st.integers(1, 9), st.sampled_from(["4|2|2", "2|2|4", "2|1|1|2|2"]))
def test_rounding_to_a_width_of_the_layout(bits, text):
    layout = PlaneLayout.parse(text)
    above, below = width_at_least(layout.widths, bits), width_at_most(layout.widths, bits)
    assert above in layout.widths
    assert below in layout.widths
    assert above >= min(bits, 8)
    assert below <= max(bits, layout.lowest)


@given(st.integers(1, 20000), st.sampled_from(GROUP_SIZES))
def test_group_size_divides_and_is_largest(columns, preferred):
    chosen = choose_group_size(columns, preferred)
    fitting = [g for g in GROUP_SIZES if g <= preferred and columns % g == 0]
    assert chosen == (max(fitting) if fitting else None)
