# SPDX-License-Identifier: Apache-2.0
"""What a layer costs at each width: bytes read, or the time that kernels were measured to take.

Times come from a file that `python -m benchmarks.kernels.run` wrote on the machine that will serve.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from vllm_flexquant.format.layout import PlaneLayout, bytes_read


@dataclass(frozen=True)
class KernelTimes:
    """Seconds of a linear layer by width in bits and by number of weights.

    by_width: (weights, seconds), ascending in weights. source: where they are from, in words.
    """

    by_width: Mapping[int, Sequence[tuple[int, float]]]
    source: str

    def seconds(self, weights: int, width: int) -> float:
        """Of a layer of so many weights, interpolated geometrically between measured ones.

        Beyond them time goes with the number of weights.
        """
        points = self.by_width[width]
        if weights <= points[0][0] or weights >= points[-1][0]:
            size, seconds = points[0] if weights <= points[0][0] else points[-1]
            return seconds * weights / size
        (below, first), (above, second) = next(
            pair for pair in pairwise(points) if pair[0][0] <= weights <= pair[1][0]
        )
        share = math.log(weights / below) / math.log(above / below)
        return first * (second / first) ** share


def read_kernel_times(file: Path, layout: PlaneLayout, rows: int) -> KernelTimes:
    """Times of `layout` at `rows` rows of activations, or the measured number nearest to it.

    Of what was measured, that from memory is taken, on the most threads.

    Raises:
        ValueError: no such file, no results of the kernel benchmark, or none of this layout.
    """
    try:
        cells: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["results"][
            "cells"
        ]
    except FileNotFoundError:
        raise ValueError(
            f"cost table {file} is no file; write one with `python -m benchmarks.kernels.run`"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"cost table {file} has no results of `python -m benchmarks.kernels.run`"
        ) from None
    cells = [cell for cell in cells if cell["residence"] == "memory"]
    names = {f"flexquant {layout} at {width} bit": width for width in layout.widths}
    cells = [cell for cell in cells if names.keys() <= cell["time_us"].keys()]
    if not cells:
        raise ValueError(
            f"cost table {file} has no times of layout {layout} from memory; measure them with "
            "`python -m benchmarks.kernels.run`"
        )
    threads = max(cell["threads"] for cell in cells)
    nearest = min({cell["rows"] for cell in cells}, key=lambda n: abs(math.log(n / rows)))
    chosen = [c for c in cells if c["threads"] == threads and c["rows"] == nearest]
    found: dict[int, list[tuple[int, float]]] = {width: [] for width in layout.widths}
    for cell in chosen:
        weights = math.prod(int(part) for part in cell["shape"].split("x"))
        for name, width in names.items():
            found[width].append((weights, cell["time_us"][name]["median"] * 1e-6))
    return KernelTimes(
        {width: sorted(points) for width, points in found.items()},
        f"time of kernels at {nearest} rows, {threads} threads ({file.name})",
    )


def unit_prices(
    rows: int, columns: int, group_size: int, widths: Sequence[int], times: KernelTimes | None
) -> dict[int, float]:
    """What a layer [rows, columns] costs per step by width: seconds, or bytes without `times`."""
    if times is None:
        return {width: float(bytes_read(rows, columns, group_size, width)) for width in widths}
    return {width: times.seconds(rows * columns, width) for width in widths}
