# SPDX-License-Identifier: Apache-2.0
"""The kernels outside of torch (`driver.cpp`): under guard pages, and emulated.

- Natively, for each instruction set of this machine, with every buffer beside pages that fault:
  also catches what AddressSanitizer does not see, masked and tile loads and stores.
- AVX2 on an emulated processor that has nothing above it: natively, an instruction that belongs to
  a better set would go unnoticed.
- NEON, cross-compiled, on an emulated Arm processor.
"""

import hashlib
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import flexquant_kernels as fk
from flexquant_kernels.cpu import build
from flexquant_kernels.cpu import native as native_isas

DRIVER = Path(__file__).parent / "driver.cpp"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [(4, 2, 2), (2, 2, 4), (2, 1, 1, 2, 2)]
COMPILERS = {"aarch64": "aarch64-linux-gnu-g++", "x86_64": "x86_64-linux-gnu-g++"}
EMULATED = {
    "avx2": ("x86_64", "Haswell"),
    "neon_dotprod": ("aarch64", "cortex-a76"),
}
"""Machine, and an emulated processor of it that has the instruction set and none above."""
LACKING = {"x86_64": "Nehalem", "aarch64": "cortex-a53"}
"""Emulated processors that have no instruction set of ours."""

pytestmark = pytest.mark.slow  # compiles


def _compiler(machine: str) -> list[str]:
    """Of this machine the one that the kernels are built with, else a cross compiler; or skip."""
    found = build.find_compiler() if machine == native_isas.machine() else None
    if found is None:
        name = COMPILERS[machine]
        if shutil.which(name) is None:
            pytest.skip(f"no compiler for {machine}: install {name}")
        found = [name]
    return found


def _emulator(machine: str, processor: str) -> list[str]:
    name = f"qemu-{machine}"
    found = shutil.which(name) or shutil.which(f"{name}-static")
    if found is None:
        pytest.skip(f"no emulator of {machine}: install {name} (Debian, Ubuntu: qemu-user)")
    return [found, "-cpu", processor]


def _build_driver(folder: Path, machine: str) -> Path:
    """The driver for `machine`, compiled with the flags of the library; kept by hash."""
    compiler = _compiler(machine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("platform.machine", lambda: machine)
        sources = [DRIVER, *(s for s in build.source_files() if s.name != "binding.cpp")]
        headers = sorted(build._source_dir().glob("*.h"))
    flags = [*build._compile_flags(), f"-I{build._source_dir()}"]
    digest = hashlib.sha256(repr((build._run([*compiler, "--version"]), flags)).encode())
    for path in (*sources, *headers):
        digest.update(path.name.encode() + path.read_bytes())
    driver = folder / f"{machine}_{digest.hexdigest()[:20]}"
    if driver.exists():
        return driver
    for old in folder.glob(f"{machine}_*"):
        old.unlink()
    with tempfile.TemporaryDirectory(dir=folder) as work:
        objects = [f"{work}/{source.stem}.o" for source in sources]
        commands = [
            [*compiler, *flags, "-c", str(source), "-o", target]
            for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(build.parallelism()) as pool:
            list(pool.map(build._run, commands))
        link = ["-fopenmp", *([] if machine == native_isas.machine() else ["-static"])]
        build._run([*compiler, *objects, *link, "-o", f"{work}/driver"])
        Path(work, "driver").rename(driver)
    return driver


@pytest.fixture(scope="session")
def driver(request) -> Callable[[str], Path]:
    """Path of the driver for a machine, built once and kept in pytest's cache folder."""
    folder = request.config.cache.mkdir("kernel_driver")
    return lambda machine: _build_driver(Path(folder), machine)


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stderr[-500:]}"
    return done.stdout.strip()


def _bytes(t: torch.Tensor) -> bytes:
    return t.contiguous().flatten().view(torch.uint8).numpy().tobytes() if t.numel() else b""


def _numbers(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, "little", signed=True) for value in values)


def _case(fields: Sequence[int], buffers: Sequence[bytes]) -> bytes:
    """One case as `Case::read` of the driver takes it."""
    parts = [_numbers(*fields, len(buffers))]
    for buffer in buffers:
        parts += [_numbers(len(buffer)), buffer]
    return b"".join(parts)


def _linear_case(weight, x: torch.Tensor, width: int, bias: torch.Tensor | None) -> bytes:
    used = fk.planes_for_width(weight.layout, width)
    shared = weight.tiled_scales.shape[0] == 1
    fields = (
        0,
        DTYPES.index(x.dtype),
        -1 if bias is None else DTYPES.index(bias.dtype),
        LAYOUTS.index(weight.layout),
        used,
        x.shape[0],
        weight.k,
        weight.n,
        weight.group_size,
        2,
        2 ** (8 - width) if shared else 1,
    )
    scales = weight.tiled_scales[0 if shared else used - 1]
    planes = [_bytes(plane) for plane in weight.tiled[:used]]
    return _case(
        fields, [_bytes(x), b"" if bias is None else _bytes(bias), _bytes(scales), *planes]
    )


def _entropy_case(logits: torch.Tensor) -> bytes:
    rows, vocabulary = logits.shape
    fields = (1, DTYPES.index(logits.dtype), -1, 0, 0, rows, vocabulary, 0, 0, 2, 1)
    return _case(fields, [_bytes(logits)])


class Cases:
    """Inputs for the driver, what torch says of them, and what this machine's kernels say."""

    def __init__(self, make_weight: Callable) -> None:
        self.input = b""
        self.wanted: list[tuple[str, torch.Tensor]] = []
        self.native: list[torch.Tensor] = []
        have_native = fk.load_native().loaded
        generator = torch.Generator().manual_seed(3)
        shapes = [(1, 32, 32), (15, 96, 32), (17, 128, 64), (33, 384, 128), (20, 8192 + 128, 64)]
        for i, (n, k, group_size) in enumerate(shapes):
            for j, layout in enumerate(LAYOUTS):
                weight = make_weight(n, k, group_size, layout, shared=(i + j) % 2 == 0)
                for rows in (1, 2, 3, 4, 5, 7, 16, 17, 33) if k < 8192 else (1, 9):
                    dtype = DTYPES[(rows + i) % 3]
                    x = torch.randn(rows, k, generator=generator).to(dtype)
                    bias = torch.randn(n, generator=generator).to(DTYPES[rows % 3])
                    b = bias if rows % 2 else None
                    width = weight.widths[(rows + j) % len(weight.widths)]
                    self.input += _linear_case(weight, x, width, b)
                    want = fk.linear_int8(x, width=width, **weight.storage_args(b))
                    self.wanted.append((f"linear {n, k, group_size, layout, rows, width}", want))
                    if have_native:
                        self.native.append(weight.op(x, width, b))
        self.linear_count = len(self.wanted)
        for rows, vocabulary in ((1, 1), (3, 7), (2, 4097), (5, 9001)):
            for dtype in DTYPES:
                logits = (torch.randn(rows, vocabulary, generator=generator) * 4).to(dtype)
                self.input += _entropy_case(logits)
                want = fk.entropy(logits.double())
                self.wanted.append((f"entropy {rows, vocabulary, dtype}", want.float()))

    def check(self, output: bytes) -> None:
        """Compare with the emulation in torch, and bit by bit with what this machine computes."""
        at = 0
        for i, (name, want) in enumerate(self.wanted):
            size = want.numel() * want.element_size()
            raw = bytearray(output[at : at + size])
            at += size
            got = torch.frombuffer(raw, dtype=want.dtype).view(want.shape)
            if i >= self.linear_count:
                torch.testing.assert_close(got, want, rtol=3e-6, atol=3e-6, msg=name)
                continue
            # Half types: one unit in the last place of the largest output.
            bound = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[want.dtype]
            assert float((got - want).abs().max()) <= bound * float(want.abs().max()), name
            if self.native:
                assert torch.equal(got, self.native[i]), name
        assert at == len(output)


@pytest.fixture(scope="session")
def cases(make_weight) -> Cases:
    return Cases(make_weight)


def _check(cases: Cases, driver: Sequence[str | Path], isa: str, folder: Path) -> None:
    (folder / "input").write_bytes(cases.input)
    _run([*driver, isa, folder / "input", folder / "output"])
    cases.check((folder / "output").read_bytes())


def test_guard_pages_stop_an_overrun(driver) -> None:
    """So that the tests below can fail."""
    done = subprocess.run([driver(native_isas.machine()), "overrun"], check=False)
    assert done.returncode == -signal.SIGSEGV


def test_within_guard_pages(isa, driver, cases, tmp_path) -> None:
    _check(cases, [driver(native_isas.machine())], isa, tmp_path)


@pytest.mark.parametrize("isa", EMULATED)
def test_emulated(isa: str, driver, cases, tmp_path) -> None:
    machine, processor = EMULATED[isa]
    command = [*_emulator(machine, processor), driver(machine)]
    assert _run([*command, "isas"]) == isa
    _check(cases, command, isa, tmp_path)


@pytest.mark.parametrize("machine", LACKING)
def test_emulated_processor_without_any_instruction_set(machine: str, driver, tmp_path) -> None:
    command = [*_emulator(machine, LACKING[machine]), driver(machine)]
    assert _run([*command, "isas"]) == ""
    (tmp_path / "input").write_bytes(b"")
    known = next(isa for isa, (of, _) in EMULATED.items() if of == machine)
    refused = subprocess.run(
        [*command, known, tmp_path / "input", tmp_path / "output"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (refused.returncode, refused.stderr.strip()) == (
        2,
        "driver: the instruction set is not supported",
    )
