# SPDX-License-Identifier: Apache-2.0
"""Between which widths the layers of a step run."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_flexquant.format.layout import width_at_least, width_at_most
from vllm_flexquant.options import PINNED, FlexQuantOptions


class Bounds:
    """The operator's bounds, below which a promise of a request is not broken.

    widths: at which some layer can run, ascending.
    """

    def __init__(self, options: FlexQuantOptions, widths: Sequence[int]) -> None:
        self.widths = widths
        low, high = options.min_bits, options.max_bits
        if options.policy in PINNED and options.width is not None:
            low = high = options.width
        self._low, self._high = low, high
        self._found: dict[int, tuple[int, int]] = {}

    def of(self, floor: int) -> tuple[int, int]:
        """Lowest and highest width in bits; not below `floor`, which wins over the operator's."""
        found = self._found.get(floor)
        if found is None:
            low = width_at_least(self.widths, max(self._low, floor))
            found = self._found[floor] = low, max(width_at_most(self.widths, self._high), low)
        return found

    @property
    def all(self) -> tuple[int, int]:
        """The bounds that exclude no level."""
        return self.widths[0], self.widths[-1]
