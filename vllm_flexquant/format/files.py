# SPDX-License-Identifier: Apache-2.0
"""Writing files that may not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """What fails inside is a failure to write `file`.

    Raises:
        ValueError: it cannot be written; nothing of it is left.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        file.unlink(missing_ok=True)
        raise ValueError(
            f"cannot write {file}: {error}; make room for it, then run the same again "
            "(with --resume, calibration goes on where it was)"
        ) from None
