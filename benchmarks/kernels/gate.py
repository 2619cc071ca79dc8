# SPDX-License-Identifier: Apache-2.0
"""Correctness before speed: no time is taken of a kernel that is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch

from benchmarks.kernels.contenders import Call, Contender, Nested
from flexquant_kernels import reference

TIGHT = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (2.0**-8, 2e-3)}
"""Largest error to the int8 reference: of one value, relative to the largest; and relative
Frobenius. In bf16 two values that differ in their last fp32 bits may round apart, by one unit."""

CHECKED_ROWS = 24
"""Rows of a product that are compared: the first 16, and others up to the last."""

SAMPLE = 48
"""Output features at either end that the quick check compares."""


def pick_rows(rows: int) -> torch.Tensor:
    """Indices of the rows to compare in a product of `rows` rows."""
    if rows <= CHECKED_ROWS:
        return torch.arange(rows)
    first = torch.arange(16)
    spread = torch.linspace(16, rows - 1, CHECKED_ROWS - 16, dtype=torch.float64).long()
    return torch.cat([first, spread])


def pick_features(n: int, everything: bool) -> torch.Tensor:
    """Indices of the output features to compare."""
    if everything or n <= 2 * SAMPLE:
        return torch.arange(n)
    return torch.cat([torch.arange(SAMPLE), torch.arange(n - SAMPLE, n)])


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error in the Frobenius norm; NaN when either holds one."""
    want = want.float()
    return float((got.float() - want).norm() / want.norm())


def largest(errors: Sequence[float]) -> float | None:
    """The largest error; None when one is NaN, which JSON has not."""
    return None if any(math.isnan(error) for error in errors) else max(errors)


def is_tight(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether they agree within `TIGHT`; a NaN never does."""
    value, frobenius = TIGHT[want.dtype]
    worst = float((got.float() - want.float()).abs().max() / want.float().abs().max())
    return worst <= value and relative(got, want) <= frobenius


def _output(call: Call, x: torch.Tensor) -> torch.Tensor:
    out = call(x)
    assert isinstance(out, torch.Tensor)
    return out


def check_nested(
    nested: Nested,
    x: torch.Tensor,
    rows: Sequence[int],
    features: torch.Tensor,
    threads: Sequence[int],
) -> list[dict[str, Any]]:
    """Our kernel at each width against the reference: once per width.

    Args:
        x: bf16 [at least max(rows), K].
        rows: each is run, in bf16 and fp32; of the rows of the product, `pick_rows` are compared.
        features: output features that are compared.
        threads: each is run; the process has its own number of threads again afterwards.

    Returns:
        `int8_reference_error` against the emulation of the kernel's arithmetic, the largest of all
        rows, types and threads; `int8_activation_error` against fp32 activations, from fp32 values
        throughout; `passed`.
    """
    compared = pick_rows(max(rows))
    some = x[compared].float()
    before = torch.get_num_threads()
    found = []
    for width, contender in nested.contenders.items():
        emulated = nested.reference(reference.linear_int8, some, width, features)
        truth = nested.reference(reference.linear, some, width, features)
        call = contender.copies[0]
        passed, errors = True, []
        for number, count in product(threads, rows):
            torch.set_num_threads(number)
            here = compared[compared < count]
            for given in (x[:count], x[:count].float()):
                got = _output(call, given)[here][:, features]
                want = emulated[: len(here)].to(given.dtype)
                passed = passed and is_tight(got, want)
                errors.append(relative(got, want))
        torch.set_num_threads(before)
        error = relative(_output(call, some)[:, features], truth)
        found.append(
            {
                "contender": contender.name,
                "width": width,
                "threads": list(threads),
                "int8_reference_error": largest(errors),
                "int8_activation_error": largest([error]),
                "passed": passed and error <= contender.bound,
            }
        )
    return found


def check_baseline(
    contender: Contender, x: torch.Tensor, rows: Sequence[int], features: torch.Tensor
) -> dict[str, Any]:
    """A kernel against an fp32 product of the weight that it holds, itself dequantized."""
    assert contender.dequantized is not None
    compared = pick_rows(max(rows))
    weight = contender.dequantized(features)
    errors = []
    for count in rows:
        here = compared[compared < count]
        got = _output(contender.copies[0], x[:count].to(contender.activations))
        want = x[here].float() @ weight.T
        errors.append(relative(got[here][:, features], want))
    return {
        "contender": contender.name,
        "threads": [torch.get_num_threads()],
        "error": largest(errors),
        "bound": contender.bound,
        "passed": all(error <= contender.bound for error in errors),
    }


def failures(checks: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each check that is red."""
    return [f"{check['contender']}: {check}" for check in checks if not check["passed"]]
