# SPDX-License-Identifier: Apache-2.0
"""What the planner tells those that watch it; it knows none of them."""

from __future__ import annotations

from collections.abc import Callable

from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.planner.step import RanAt
from vllm_flexquant.policy.arrays import Array


class Watcher:
    """Takes note of nothing; a watcher overrides what it wants to hear."""

    def check(self, options: FlexQuantOptions) -> None:
        """Other options are asked for.

        Raises:
            ValueError: they cannot be gone by; nothing is changed.
        """

    def changed(self, options: FlexQuantOptions) -> None:
        """Other options are in force."""

    def ran(self, step: RanAt) -> None:
        """A step of decoding alone has run."""

    def deciding(self) -> None:
        """A step is about to be decided; the state is as the one before left it."""

    def began(self) -> None:
        """A step begins: its bounds and first level are in the planner's state."""

    def ended(self, entropy: Array, booked: bool) -> None:
        """The logits of the step are known.

        Args:
            entropy: fp32 nats by place in the batch, valid until the next step.
            booked: they went into the accounts.
        """


class Watchers:
    """All that watch a planner, by what each of them wants to hear."""

    def __init__(self) -> None:
        self.check: list[Callable[[FlexQuantOptions], None]] = []
        self.changed: list[Callable[[FlexQuantOptions], None]] = []
        self.ran: list[Callable[[RanAt], None]] = []
        self.deciding: list[Callable[[], None]] = []
        self.began: list[Callable[[], None]] = []
        self.ended: list[Callable[[Array, bool], None]] = []

    def add(self, watcher: Watcher) -> None:
        """From now on it is told."""
        for event, told in vars(self).items():
            if getattr(type(watcher), event) is not getattr(Watcher, event):
                told.append(getattr(watcher, event))
