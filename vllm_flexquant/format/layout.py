# SPDX-License-Identifier: Apache-2.0
"""Plane layouts, scale modes and group sizes. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import accumulate

PARENT_BITS = 8
"""Bits of a parent code."""

GROUP_SIZES = (128, 64, 32)
"""Weights along the input dimension that share a scale and an offset, largest first."""

_PLANE_BITS = (1, 2, 4)


class ScaleMode(StrEnum):
    """How scales are stored."""

    SHARED = "shared"
    """One scale and offset per group; a width below the parent's derives its own from them
    (half-step offset)."""
    PER_WIDTH = "per_width"
    """One scale and offset per group and width, each fitted to the weights at that width."""


@dataclass(frozen=True)
class PlaneLayout:
    """How the bits of a parent code are cut into planes, most significant first.

    `planes` are the plane widths in bits: `(4, 2, 2)` can be read at 4, 6 and 8 bits.

    Raises:
        ValueError: the widths do not add up to 8, or a plane is not 1, 2 or 4 bits wide, or the
            first plane alone has fewer than 2 bits.
    """

    planes: tuple[int, ...] = (4, 2, 2)

    def __post_init__(self) -> None:
        text = "|".join(map(str, self.planes))
        if any(plane not in _PLANE_BITS for plane in self.planes):
            raise ValueError(
                f"plane layout '{text}' has a plane that is not 1, 2 or 4 bits wide; "
                "use 4|2|2, 2|2|4 or 2|1|1|2|2"
            )
        if sum(self.planes) != PARENT_BITS:
            raise ValueError(
                f"plane layout '{text}' has {sum(self.planes)} bits; planes must add up to "
                f"{PARENT_BITS}, as in 4|2|2, 2|2|4 or 2|1|1|2|2"
            )
        if self.planes[0] < 2:
            raise ValueError(
                f"plane layout '{text}' starts with a 1-bit plane; the lowest width is 2 bits, "
                "as in 2|1|1|2|2"
            )

    @classmethod
    def parse(cls, text: str | Iterable[int] | PlaneLayout) -> PlaneLayout:
        """Read `"4|2|2"` (or an iterable of plane widths)."""
        if isinstance(text, PlaneLayout):
            return text
        if isinstance(text, str):
            parts = text.split("|")
            if not all(part.strip().isdigit() for part in parts):
                raise ValueError(
                    f"plane layout '{text}' cannot be read; write plane widths in bits, most "
                    "significant first, as in 4|2|2"
                )
            return cls(tuple(int(part) for part in parts))
        if not isinstance(text, Iterable):
            raise ValueError(f"plane layout {text!r} cannot be read; write it as in 4|2|2")
        return cls(tuple(int(part) for part in text))

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """The widths in bits that can be read, ascending."""
        return tuple(accumulate(self.planes))

    @property
    def lowest(self) -> int:
        return self.widths[0]

    def __str__(self) -> str:
        return "|".join(map(str, self.planes))


def width_at_least(widths: Sequence[int], bits: int) -> int:
    """The smallest of ascending `widths` that is at least `bits` (the highest if none is)."""
    return next((width for width in widths if width >= bits), widths[-1])


def width_at_most(widths: Sequence[int], bits: int) -> int:
    """The largest of ascending `widths` that is at most `bits` (the lowest if none is)."""
    return next((width for width in reversed(widths) if width <= bits), widths[0])


def bytes_read(rows: int, columns: int, group_size: int, width: int) -> int:
    """Bytes that one pass over a layer [rows, columns] reads at `width` bits: planes, and a fp16
    scale and offset per group."""
    return rows * columns * width // PARENT_BITS + rows * (columns // group_size) * 4


def choose_group_size(input_size: int, preferred: int = GROUP_SIZES[0]) -> int | None:
    """The largest group size not above `preferred` that divides `input_size`.

    Args:
        input_size: input dimension of the (sharded) weight, so that no group straddles a shard.
        preferred: 32, 64 or 128.

    Returns:
        32, 64 or 128, or None if none of them divides `input_size`.
    """
    return next((g for g in GROUP_SIZES if g <= preferred and input_size % g == 0), None)
