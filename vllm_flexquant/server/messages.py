# SPDX-License-Identifier: Apache-2.0
"""What is read from and written to clients. Any bytes may come; only valid JSON goes out."""

from __future__ import annotations

import json
import math
from typing import Any

from vllm_flexquant.values import finite, from_json, shown

BODY_BYTES = 65_536
TEXT_CHARACTERS = 64
"""No option takes a longer text."""


def to_json(content: Any) -> bytes:
    """JSON in ASCII; numbers that are not finite become null."""
    return json.dumps(finite(content), allow_nan=False).encode("ascii")


def read_changes(body: bytes) -> dict[str, Any]:
    """The changes that a body asks for, by name: null, booleans, finite numbers of 64 bits at most
    and short texts, so that they reach the engine. What they are good for is the engine's to say.

    Raises:
        ValueError: in one sentence, which repeats little of the body.
    """
    try:
        found = from_json(body.decode())
    except ValueError as error:
        raise ValueError(f"the body is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f'the body is {shown(found)}; give an object, as in {{"width": 6}}')
    for name, value in found.items():
        if not (_can_be_sent(name) and _can_be_sent(value)):
            raise ValueError(
                f"option {shown(name)} is {shown(value)}; give a number, a short text, true, false "
                "or null"
            )
    return found


def _can_be_sent(value: Any) -> bool:
    match value:
        case None | bool():
            return True
        case int():
            return -(2**63) <= value < 2**63
        case float():
            return math.isfinite(value)
        case str():
            return len(value) <= TEXT_CHARACTERS and value.isprintable()
    return False
