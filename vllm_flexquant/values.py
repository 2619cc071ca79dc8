# SPDX-License-Identifier: Apache-2.0
"""Kinds of values that options have, each with its bounds, and how messages show them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from vllm_flexquant.format.layout import PARENT_BITS, PlaneLayout

LOWEST_BITS = 2

MOST_DRAFTS = 16
"""Longer drafts than this are never worth it."""

T = TypeVar("T")
LIVE = "live"
Live = Annotated[T, LIVE]
"""An option that may be changed while serving."""


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("give a number, not true or false")
    return value


def _read_layout(value: Any) -> PlaneLayout:
    if isinstance(value, str) and len(value) > 2 * PARENT_BITS:
        raise ValueError("write plane widths in bits, most significant first, as in 4|2|2")
    if isinstance(value, list | tuple) and not (
        len(value) <= PARENT_BITS and all(type(plane) is int for plane in value)
    ):
        raise ValueError("give plane widths in bits, most significant first, as in [4, 2, 2]")
    if not isinstance(value, str | list | tuple | PlaneLayout):
        raise ValueError("write it as in 4|2|2")
    return PlaneLayout.parse(value)


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("names hold printable characters only")
    return value


def split(value: Any) -> Any:
    """A comma-separated text as a list of what is not empty; anything else as it is."""
    return [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is there twice; name it once")
        found[name] = value
    return found


def finite(value: Any) -> Any:
    """The same with None in place of numbers that are none, which JSON does not have."""
    match value:
        case dict():
            return {name: finite(inner) for name, inner in value.items()}
        case list() | tuple():
            return [finite(inner) for inner in value]
        case float() if not math.isfinite(value):
            return None
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number that can be used")


def from_json(value: Any) -> Any:
    """The value of a JSON text; anything else as it is.

    Raises:
        ValueError: no JSON, a name that is there twice, or NaN or Infinity.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


_NUMBER = BeforeValidator(_no_bool)

Bits = Annotated[int, _NUMBER, Field(ge=LOWEST_BITS, le=PARENT_BITS)]
Level = Annotated[int, _NUMBER, Field(ge=0, le=65_535)]
Count = Annotated[int, _NUMBER, Field(ge=0, le=2**31 - 1)]
Positive = Annotated[int, _NUMBER, Field(ge=1, le=2**31 - 1)]
Nats = Annotated[float, _NUMBER, Field(ge=1e-6, le=100, allow_inf_nan=False)]
"""A budget, per token."""
Entropy = Annotated[float, _NUMBER, Field(ge=0, le=100, allow_inf_nan=False)]
"""Nats."""
Millis = Annotated[float, _NUMBER, Field(ge=1e-3, le=3.6e6, allow_inf_nan=False)]
MeanBits = Annotated[float, _NUMBER, Field(ge=LOWEST_BITS, le=PARENT_BITS, allow_inf_nan=False)]
Drafts = Annotated[int, _NUMBER, Field(ge=0, le=MOST_DRAFTS)]
Steps = Annotated[int, _NUMBER, Field(ge=0, le=100_000)]
"""What their records take stays near a GB at a hundred sequences."""
Share = Annotated[float, _NUMBER, Field(ge=0, le=1, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)]
Names = Annotated[tuple[Name, ...], BeforeValidator(split)]
_LayerName = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_printable)]
LayerNames = Annotated[tuple[_LayerName, ...], BeforeValidator(split)]
Layout = Annotated[
    PlaneLayout, BeforeValidator(_read_layout), PlainSerializer(str, when_used="json")
]


def printed(text: str, most: int = 60) -> str:
    """ASCII without control characters, cut to `most` characters."""
    text = text[: most + 1].encode("unicode_escape").decode("ascii")
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shown(value: Any) -> str:
    """A value for a message, whatever it is: ASCII, at most 60 characters."""
    if isinstance(value, str):
        return f"'{printed(value, 58)}'"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


def unknown_name(kind: str, name: str, known: Iterable[str], prefix: str = "") -> str:
    """That a name is unknown, and which is meant. prefix: what all of them begin with."""
    from difflib import get_close_matches

    ends = [end.removeprefix(prefix) for end in known]
    close = get_close_matches(str(name).removeprefix(prefix)[:64], ends, 1)
    meant = f"did you mean {prefix}{close[0]}?" if close else f"{kind}s are "
    rest = "" if close else ", ".join(f"{prefix}{end}" for end in ends)
    return f"unknown {kind} {shown(name)}; {meant}{rest}"
