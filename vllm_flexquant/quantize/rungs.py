# SPDX-License-Identifier: Apache-2.0
"""Levels of a ladder: what each of them reads, what a checkpoint that ends there weighs, its KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_flexquant.format.layout import bytes_read, choose_group_size
from vllm_flexquant.format.record import RungRecord
from vllm_flexquant.quantize import search
from vllm_flexquant.quantize.blocks import Unit
from vllm_flexquant.quantize.cost import KernelTimes, unit_prices

_PAIR_BYTES = 4
"""A scale and an offset of a group, fp16."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of units at the widths in bits that are kept.

    group_size: the largest; that of a unit is the largest one that divides its inputs. unstored:
    units whose planes are made at load. other: bytes of all tensors that are not in planes.
    """

    units: Sequence[Unit]
    group_size: int
    widths: Sequence[int]
    unstored: frozenset[str] = frozenset()
    other: int = 0

    @property
    def weights(self) -> dict[str, int]:
        """Number of weights of each unit."""
        return {unit.name: unit.weights for unit in self.units}

    def prices(self, times: KernelTimes | None = None) -> dict[str, dict[int, float]]:
        """What each unit costs per step at each width: seconds, or bytes read without `times`."""
        return {
            unit.name: unit_prices(
                sum(unit.rows), unit.columns, self._group_size(unit), self.widths, times
            )
            for unit in self.units
        }

    def read(self, widths: Mapping[str, int]) -> int:
        """Bytes of planes and scales that a step reads at `widths` of units."""
        return sum(self._read(unit, widths[unit.name]) for unit in self.units)

    def stored(self, tops: Mapping[str, int]) -> int:
        """Bytes of a checkpoint whose units have no planes above `tops`."""
        total = self.other
        for unit in self.units:
            if unit.name not in self.unstored:
                sets = sum(width <= tops[unit.name] for width in self.widths)
                groups = unit.weights // self._group_size(unit)
                total += self._read(unit, tops[unit.name]) + (sets - 1) * groups * _PAIR_BYTES
        return total

    def _read(self, unit: Unit, width: int) -> int:
        return bytes_read(sum(unit.rows), unit.columns, self._group_size(unit), width)

    def _group_size(self, unit: Unit) -> int:
        group_size = choose_group_size(unit.columns, self.group_size)
        assert group_size is not None, "layers without a group size are not chosen"
        return group_size


def rung_records(
    steps: Sequence[search.Step], sizes: Sizes, known: Mapping[int, tuple[float, float]]
) -> tuple[RungRecord, ...]:
    """A record for every level, from no step down to all of them.

    KL that was not measured is interpolated linearly along the sum of sensitivities, which adds up
    to KL but for a factor that changes slowly. Where a step lowers a large layer, neighbouring
    levels lie far apart, and any other curve makes bargains of those between measured ones.

    Args:
        known: measured KL in nats and its standard error, by number of steps, both ends among them.
    """
    sums = [0.0]
    for step in steps:
        sums.append(sums[-1] + max(step.kl, 0.0))
    records = []
    weights = sizes.weights
    for number, widths in enumerate(search.rungs(dict.fromkeys(weights, sizes.widths[-1]), steps)):
        below = max(n for n in known if n <= number)
        above = min(n for n in known if n >= number)
        low, high = known[below][0], known[above][0]
        span = sums[above] - sums[below]
        share = (sums[number] - sums[below]) / span if span > 0 else 0.0
        measured = number in known
        records.append(
            RungRecord(
                steps=number,
                mean_bits=search.mean_bits(weights, widths),
                bytes_read=sizes.read(widths),
                bytes_stored=sizes.stored(widths),
                kl_nats=known[number][0] if measured else low + share * (high - low),
                error=known[number][1] if measured else None,
                measured=measured,
            )
        )
    return tuple(records)
