# SPDX-License-Identifier: Apache-2.0
"""The kernels that `aot.py` compiles, as their launchers call them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.kernels.command_line import layout_name
from flexquant_kernels import layout_widths


@dataclass(frozen=True)
class Linear:
    """The linear kernel, as it is launched for so many rows of x."""

    rows: int = 8
    layout: tuple[int, ...] = (4, 2, 2)
    group_size: int = 64
    dtype: str = "bf16"
    shared: bool = False
    bias: bool = False
    even_k: bool = True

    @property
    def name(self) -> str:
        """As in `4|2|2 g64 bf16, 8 rows`."""
        extras = "".join(f", {x}" for x in ("shared", "bias") if getattr(self, x))
        extras += "" if self.even_k else ", odd k"
        return (
            f"{layout_name(self.layout)} g{self.group_size} {self.dtype}, {self.rows} rows{extras}"
        )


QUICK_LINEAR = [Linear()]
LINEAR = [
    *QUICK_LINEAR,
    Linear(group_size=128),
    Linear(group_size=32),
    Linear(dtype="fp16"),
    Linear(shared=True, bias=True, even_k=False),
    Linear(layout=(2, 2, 4)),
    Linear(layout=(2, 1, 1, 2, 2)),
    Linear(rows=16),
    Linear(rows=32),
    Linear(rows=32, layout=(2, 1, 1, 2, 2)),
]


@dataclass(frozen=True)
class Case:
    """One compilation.

    types: of the arguments that are no constants, as Triton writes them. odd: those of them that
        are not known to be multiples of 16. ones: arguments that are 1, and so constants.
    loops: widths whose loops over K are counted, and weights of one round of each.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    odd: frozenset[str]
    warps: int
    ones: frozenset[str] = frozenset()
    options: Mapping[str, Any] = field(default_factory=dict)
    loops: tuple[int, ...] = ()
    weights: int = 0
    wide: tuple[int, ...] = ()
    """Widths whose loops must load 16 bytes at a time: those that read a plane of 4 bits."""


def _weight_types(*more: str) -> dict[str, str]:
    words = ("p0", "p1", "p2", "p3", "p4", "scales_ptr", "width_ptr", "zero_ptr")
    return dict.fromkeys(words, "*i32") | dict.fromkeys(more, "i32")


def linear_case(variant: Linear, target: str) -> Case:
    """The linear kernel with K split."""
    from flexquant_kernels.triton.kernel import linear_kernel
    from flexquant_kernels.triton.layout import BLOCK_K
    from flexquant_kernels.triton.linear import BN
    from flexquant_kernels.triton.tuning import STAGES, WARPS, compiler_options

    types = _weight_types("M", "N", "K", "blocks", "n_pad", "top")
    types |= {"counters_ptr": "*i32", "partial_ptr": "*fp32"}
    types |= dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), f"*{variant.dtype}")
    widths = layout_widths(variant.layout)
    first = next((w for w, p in zip(widths, variant.layout, strict=True) if p == 4), 9)
    return Case(
        variant.name,
        linear_kernel,
        types,
        {
            "LAYOUT": int("".join(map(str, variant.layout))),
            "SHARED": variant.shared,
            "HAS_BIAS": variant.bias,
            "SPLIT": True,
            "G": variant.group_size,
            "EVEN_K": variant.even_k,
            "BM": variant.rows,
            "BN": BN,
            "UPCAST": False,
        },
        frozenset({"M", "N", "blocks", "top", "zero_ptr", "width_ptr", "bias_ptr"}),
        WARPS[variant.rows],
        options={
            "num_stages": STAGES,
            **compiler_options(variant.rows, variant.group_size, target),
        },
        loops=widths,
        weights=BN * BLOCK_K,
        wide=tuple(w for w in widths if w >= first),
    )


def _dequantize(layout: tuple[int, ...]) -> Case:
    from flexquant_kernels.triton.dequantize import WARPS, dequantize_kernel
    from flexquant_kernels.triton.layout import PAD_ROWS

    types = _weight_types("N", "K", "blocks", "n_pad", "first", "top") | {"out_ptr": "*bf16"}
    constants = {"LAYOUT": int("".join(map(str, layout))), "SHARED": False, "G": 64, "BN": PAD_ROWS}
    return Case(
        f"dequantize {layout_name(layout)} g64 bf16",
        dequantize_kernel,
        types,
        constants,
        frozenset({"N", "blocks", "first", "top", "zero_ptr", "width_ptr"}),
        WARPS,
    )


def _chunk(dtype: str) -> Case:
    from flexquant_kernels.triton.entropy import CHUNK, CHUNK_WARPS, chunk_kernel

    return Case(
        f"entropy of a chunk, {dtype}",
        chunk_kernel,
        {"logits_ptr": f"*{dtype}", "partial_ptr": "*fp32"}
        | dict.fromkeys(("V", "stride_row", "stride_v"), "i32"),
        {"CHUNK": CHUNK},
        frozenset(),
        CHUNK_WARPS,
        ones=frozenset({"stride_v"}),
    )


def _join() -> Case:
    from flexquant_kernels.triton.entropy import join_kernel

    return Case(
        "entropy, 16 chunks joined",
        join_kernel,
        {"slots_ptr": "*i64", "seen_ptr": "*i1", "chunks": "i32", "discard": "i32", "decay": "fp32"}
        | dict.fromkeys(("partial_ptr", "entropy_ptr", "average_ptr"), "*fp32"),
        {"CHUNKS": 16, "TRACK": True},
        frozenset({"chunks", "discard", "decay"}),
        1,
    )


def _decision() -> Case:
    from flexquant_kernels.triton.decision import LAYERS_AT_A_TIME, WARPS, decision_kernel

    numbers = ("rows", "levels", "layers")
    words = (
        "facts_ptr", "choices_ptr", "limits_ptr", "ladder_ptr", "allowed_ptr", "level_ptr",
        "held_ptr", "bounds_ptr", "table_ptr",
    )  # fmt: skip
    return Case(
        "decision, 256 rows",
        decision_kernel,
        dict.fromkeys(words, "*i32")
        | dict.fromkeys(numbers, "i32")
        | {"average_ptr": "*fp32", "seen_ptr": "*i1", "thresholds_ptr": "*fp64"},
        {"ROWS": 256, "LAYERS": LAYERS_AT_A_TIME},
        frozenset({"levels", "layers"}),
        WARPS,
        options={"enable_fp_fusion": False},
    )


def _probe() -> Case:
    from flexquant_kernels.triton.decision import LAYERS_AT_A_TIME
    from flexquant_kernels.triton.probe import BLOCK_H, ROWS_AT_A_TIME, WARPS, probe_kernel

    words = ("ladder_ptr", "allowed_ptr", "bounds_ptr", "counter_ptr", "level_ptr", "table_ptr")
    floats = ("weight_ptr", "bias_ptr", "kl_ptr", "budget_ptr", "scores_ptr")
    numbers = ("stride_row", "H", "levels", "layers", "first")
    return Case(
        "probe, bf16",
        probe_kernel,
        {"x_ptr": "*bf16", "live_ptr": "*i1"}
        | dict.fromkeys(words, "*i32")
        | dict.fromkeys(floats, "*fp32")
        | dict.fromkeys(numbers, "i32"),
        {
            "MAXIMUM": False,
            "BLOCK_H": BLOCK_H,
            "ROWS": ROWS_AT_A_TIME,
            "LEVELS": 256,
            "LAYERS": LAYERS_AT_A_TIME,
        },
        frozenset({"levels", "layers", "first"}),
        WARPS,
    )


def small_cases(quick: bool) -> list[Case]:
    """All kernels but the linear one."""
    layouts = [(4, 2, 2)] if quick else [(4, 2, 2), (2, 2, 4), (2, 1, 1, 2, 2)]
    dtypes = ["fp32"] if quick else ["fp32", "bf16", "fp16"]
    return [
        *(_dequantize(layout) for layout in layouts),
        *(_chunk(dtype) for dtype in dtypes),
        _join(),
        _decision(),
        _probe(),
    ]


def cases(target: str, quick: bool) -> list[Case]:
    """What is compiled for a target: with the rows that the launcher gives a program there."""
    from flexquant_kernels.triton.tuning import row_block

    variants = QUICK_LINEAR if quick else LINEAR
    fitted = dict.fromkeys(replace(v, rows=row_block(v.rows, target)) for v in variants)
    return [*(linear_case(one, target) for one in fitted), *small_cases(quick)]
