# SPDX-License-Identifier: Apache-2.0
"""What `flexquant kernels` prints: instruction sets, kernels by layout and dtype, library, GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from flexquant_kernels import gpu, ops
from flexquant_kernels.cpu import build as cpu_build
from flexquant_kernels.cpu import native

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SHAPE = (4096, 4096)  # any that fits: the log names the layers that do not
_GROUP_SIZE = 64
_OTHER_LAYOUT = (4, 4)


def report(build: bool) -> Iterator[str]:
    """Lines about this machine; the kernels are built first if `build` and not cached."""
    status = ops.load_native(build=build)
    yield f"native CPU kernels: {status.reason}"
    if status.path is not None:
        compiler = cpu_build.read_record(Path(status.path)).get("compiler", "unknown")
        yield f"library:            {status.path}"
        yield f"made by:            {compiler}"
    else:
        yield f"library:            none in {cpu_build.cache_dir()}"
    compiler_here = cpu_build.find_compiler()
    yield f"compiler here:      {' '.join(compiler_here) if compiler_here else 'none'}"
    cuda = torch.device("cuda")
    missing = gpu.why_no_triton(cuda)
    found = f"none here: {missing}" if missing else f"for {gpu.target_of(cuda)}, untested on GPUs"
    yield f"Triton kernels:     {found}"
    yield ""
    yield from _table(
        ("instruction set", "state"),
        [(isa, _state(isa, status.isa)) for isa in native.ISAS],
    )
    if status.loaded:
        yield f"{native.ISA_VARIABLE}=NAME chooses another."
    yield ""
    layouts = [*sorted(ops.NATIVE_LAYOUTS, reverse=True), _OTHER_LAYOUT]
    choices = {
        layout: [ops.dispatch("cpu", dtype, *_SHAPE, _GROUP_SIZE, layout) for dtype in _DTYPES]
        for layout in layouts
    }
    yield from _table(
        ("layout", *(str(dtype).removeprefix("torch.") for dtype in _DTYPES)),
        [(_layout_name(layout), *(c.name for c in found)) for layout, found in choices.items()],
    )
    if status.loaded:
        yield f"reference: {choices[_OTHER_LAYOUT][0].reason}"
    yield ""
    yield from _table(("rows at once", f"what runs with {status.isa}"), ops.row_paths(status.isa))


def _state(isa: str, selected: str) -> str:
    if isa == selected:
        return "selected"
    if isa in ops.supported_isas():
        return "supported"
    lacks = native.why_not(isa)
    if lacks:
        return f"not supported: {lacks}"
    if ops.native_status().loaded:
        return "not supported: the operating system does not offer it"
    return "the processor has it; not loaded"


def _layout_name(layout: tuple[int, ...]) -> str:
    return "any other" if layout == _OTHER_LAYOUT else "|".join(map(str, layout))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for cells in (head, *rows):
        yield "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip()
