# SPDX-License-Identifier: Apache-2.0
"""llama.cpp through its Python package, on the weights that everything else is measured on.

    python -m benchmarks.peers.llama        # builds it and makes the files: 10 to 20 minutes

The package is compiled for this machine's processor, in an environment of its own. The model's
weights become an F16 GGUF file (for the demo's model, its own GGUF dequantized, so the reference's
weights), which llama.cpp quantizes to the other types by itself.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.environment import ToolError, build_environment, built
from benchmarks.provenance import ROOT
from demo.get_model import MODEL, ModelError, download, get_model

PACKAGE = "llama-cpp-python==0.3.36"
INSTALLS = (("--no-binary=llama-cpp-python", PACKAGE),)
STAMP = "flexquant-llama-cpp.json"
FOLDER = ROOT / ".cache" / "peers"
VENV = FOLDER / "llama-cpp"
WORKER = Path(__file__).with_name("llama_worker.py")

TYPES = {"f16": 1, "q8_0": 7, "q4_k_m": 15, "q4_0": 2}
"""By the name that users know: llama.cpp's number of the file type."""

F16 = "f16"

NOTE = (
    "The reference's weights lay on Q4_1's grid of 32 weights once (they are a dequantized GGUF): "
    "Q4_K_M, whose 4-bit blocks of 32 have a scale and a minimum too, is nearer to them than it "
    "would be to weights as they were trained. Rows that 256 does not divide (576 inputs here) get "
    "other types than K-quants: `files` counts the tensors of each type."
)


def python(build: bool) -> Path:
    """The Python that has llama.cpp.

    Args:
        build: whether to build it where it is missing.

    Raises:
        ToolError: it is missing and cannot be built, or should not.
    """
    if found := built(VENV, STAMP, INSTALLS):
        return found
    if not build:
        raise ToolError("llama.cpp is not built; `python -m benchmarks.peers.llama` builds it")
    return build_environment(
        VENV, STAMP, INSTALLS, "it needs a C and C++ compiler, and pip its index"
    )


def gguf_file(model: Path, kind: str, tool: Path) -> Path:
    """The model as GGUF of a type; made unless it is there.

    Args:
        model: a checkpoint folder: the demo's model, whose GGUF can be had.
        tool: as `python` returns.

    Raises:
        ToolError: another model, or a file that cannot be made.
    """
    if model.name != MODEL:
        raise ToolError(f"no GGUF of {model.name} is at hand, only one of {MODEL}")
    path = FOLDER / f"{MODEL}-{kind}.gguf"
    if path.is_file():
        return path
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
        made = Path(temporary) / path.name
        if kind == F16:
            try:
                dequantize(download(Path(temporary), model), made)
            except ModelError as error:
                raise ToolError(str(error)) from None
        else:
            source = gguf_file(model, F16, tool)
            command = [str(tool), str(WORKER), "quantize", str(source), str(made), str(TYPES[kind])]
            run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if run.returncode:
                raise ToolError(f"llama.cpp made no {kind}: {run.stderr[-400:]}")
        made.rename(path)
    return path


def dequantize(source: Path, target: Path) -> None:
    """Write a GGUF file whose matrices are F16 and whose vectors are F32."""
    import numpy as np
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize as values_of

    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, inner)
    writer.add_file_type(TYPES[F16])
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        values = values_of(tensor.data, tensor.tensor_type).reshape(shape)
        writer.add_tensor(tensor.name, values.astype(np.float16 if len(shape) > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(path: Path) -> dict[str, Any]:
    """Bytes of the tensors, bits per weight of the matrices, tensors of each type."""
    from gguf import GGUFReader

    tensors = GGUFReader(path).tensors
    matrices = [t for t in tensors if len(t.shape) > 1]
    bits = 8 * sum(int(t.n_bytes) for t in matrices)
    return {
        "bytes": sum(int(t.n_bytes) for t in tensors),
        "bits_per_weight": bits / sum(int(t.n_elements) for t in matrices),
        "tensor_types": dict(Counter(t.tensor_type.name for t in tensors)),
    }


def main() -> None:
    """Build what is missing, and say what there is."""
    try:
        tool = python(build=True)
        model = get_model()
        for kind in TYPES:
            path = gguf_file(model, kind, tool)
            found = describe(path)
            print(f"{path.name}: {found['bits_per_weight']:.2f} bits, {found['tensor_types']}")
    except (ToolError, ModelError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
