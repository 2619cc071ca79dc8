# SPDX-License-Identifier: Apache-2.0
"""Linear kernels beside others: on CPUs (`run_cpu.py`) or on a GPU (`run_gpu.py`).

    python -m benchmarks.kernels.run --device cpu|cuda [--interpret] [--help]

`--interpret` runs what `--device cuda` does on this CPU, in Triton's interpreter: whether it
works, not how fast.
"""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Hand over to the device's benchmark, with all arguments."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--interpret", action="store_true")
    known, _ = parser.parse_known_args(given)
    # Each needs packages that machines of the other kind may not have.
    if known.device == "cuda" or known.interpret:
        from benchmarks.kernels import run_gpu

        return run_gpu.main(given)
    from benchmarks.kernels import run_cpu

    return run_cpu.main(given)


if __name__ == "__main__":
    raise SystemExit(main())
