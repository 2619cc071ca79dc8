#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Check a vLLM's sources for every name, signature and field that we use of it.

    python tools/check_vllm.py [FOLDER]

FOLDER is a folder `vllm` of sources, say of another version; default: the one that is installed
beside this Python. Nothing is imported, so that a version need not run here. Standard library only.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = ROOT / "vllm_flexquant"

CALLED: dict[str, dict[str, tuple[str, ...]]] = {
    "engine/arg_utils.py": {
        "EngineArgs.create_engine_config": (),
        "EngineArgs.create_speculative_config": ("target_model_config",),
    },
    "plugins/__init__.py": {"load_general_plugins": ()},
    "v1/engine/input_processor.py": {
        "InputProcessor.process_inputs": ("request_id", "prompt", "params"),
    },
    "entrypoints/generate/beam_search/online.py": {
        "BeamSearchOnlineMixin.beam_search": ("prompt", "request_id", "params"),
    },
    "entrypoints/openai/chat_completion/protocol.py": {
        "ChatCompletionRequest.to_beam_search_params": (),
    },
    "entrypoints/openai/completion/protocol.py": {"CompletionRequest.to_beam_search_params": ()},
    "v1/engine/core_client.py": {"AsyncMPClient.call_utility_all_async": ("method",)},
    "v1/engine/async_llm.py": {"AsyncLLM.collective_rpc": ("method", "args")},
    "v1/worker/worker_base.py": {"WorkerBase.compile_or_warm_up_model": ()},
    "v1/sample/rejection_sampler.py": {
        "expand_batch_to_tokens": (
            "x",
            "cu_num_tokens",
            "num_tokens",
            "replace_from",
            "replace_to",
        ),
    },
    "v1/worker/gpu_model_runner.py": {
        "GPUModelRunner._update_states": ("scheduler_output",),
        "GPUModelRunner._model_forward": (),
        "GPUModelRunner._sample": ("logits", "spec_decode_metadata"),
    },
    "v1/worker/gpu/model_runner.py": {"GPUModelRunner.add_requests": ("scheduler_output",)},
    "v1/worker/gpu/states.py": {"RequestState.remove_request": ("req_id",)},
    "v1/worker/gpu/model_states/interface.py": {"ModelState.prepare_inputs": ("input_batch",)},
}
"""What we wrap or call, by file: functions and methods, and the parameters that we rely on."""

FIELDS = {
    "envs.py": ("environment_variables",),
    "v1/engine/core_client.py": ("engine_ranks_managed",),
    "v1/worker/gpu_model_runner.py": (
        *("max_num_reqs", "requests", "input_batch", "query_start_loc", "discard_request_mask"),
        *("drafter", "attn_groups"),
    ),
    "v1/worker/gpu_input_batch.py": (
        *("num_reqs", "req_ids", "num_computed_tokens_cpu", "num_prompt_tokens", "spec_token_ids"),
        *("block_table", "req_id_to_index"),
    ),
    "v1/worker/block_table.py": ("block_tables", "num_blocks_per_row", "block_size"),
    "v1/core/sched/output.py": ("finished_req_ids", "scheduled_new_reqs", "sampling_params"),
    "v1/worker/gpu/model_runner.py": (
        *("sampler", "rejection_sampler", "req_states", "model_state"),
    ),
    "v1/worker/gpu/states.py": ("req_id_to_index", "prompt_len"),
    "v1/worker/gpu/input_batch.py": (
        *("req_ids", "num_reqs", "idx_mapping_np", "expanded_idx_mapping", "query_start_loc_np"),
        *("num_computed_tokens_np", "num_computed_prefill_tokens_np", "num_scheduled_tokens"),
        *("num_draft_tokens", "num_draft_tokens_per_req", "prefill_len_np", "is_prefilling_np"),
    ),
    "sampling_params.py": ("extra_args", "skip_reading_prefix_cache"),
}
"""What we read, by the file that sets it."""


@cache
def parsed(path: Path) -> ast.Module | None:
    """The module in a file, None if there is none."""
    return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None


def file_of(vllm: Path, module: str) -> Path:
    """Where a module `vllm.a.b` is: a file, or the `__init__` of a folder."""
    path = vllm.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def bound(path: Path) -> Iterator[str]:
    """Names that a module binds, also within `if` and `try`; and those that it only mentions as
    texts, as a lazy module does."""
    for node in ast.walk(parsed(path) or ast.Module([], [])):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name
        elif isinstance(node, ast.ImportFrom) and node.level and node.names[0].name == "*":
            inside = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            yield from bound(
                inside / "__init__.py" if inside.is_dir() else inside.with_suffix(".py")
            )
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def imported() -> Iterator[tuple[str, str, str]]:
    """(our file, vLLM's module, name) of every import of vLLM in our package."""
    for path in sorted(OURS.rglob("*.py")):
        tree = parsed(path)
        assert tree is not None
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    yield path.relative_to(ROOT).as_posix(), node.module or "", alias.name
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "vllm":
                        yield path.relative_to(ROOT).as_posix(), alias.name, ""


def parameters(tree: ast.Module, name: str) -> set[str] | None:
    """Parameters of a function, or of a method `Class.method` in whichever class of the file has
    it; None if there is none. `**` stands for any."""
    wanted = name.rpartition(".")[2]
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == wanted:
            given = node.args
            found = {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
            return found | ({"**"} if given.kwarg else set())
    return None


def attributes(tree: ast.Module) -> set[str]:
    """Attributes that a file sets: of `self`, of classes, properties and methods."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, (ast.FunctionDef, ast.Name)):
            found.add(node.name if isinstance(node, ast.FunctionDef) else node.id)
    return found


def missing(vllm: Path) -> Iterator[str]:
    """A sentence for each thing that these sources lack."""
    for ours, module, name in imported():
        path = file_of(vllm, module)
        if not path.is_file():
            yield f"{module} is not there, which {ours} imports"
        elif name not in {"", *bound(path)} and not file_of(vllm, f"{module}.{name}").is_file():
            yield f"{module} has no {name}, which {ours} imports"
    for file, functions in CALLED.items():
        tree = parsed(vllm / file)
        for function, wanted in functions.items():
            found = None if tree is None else parameters(tree, function)
            if found is None:
                yield f"{file} has no {function}"
                continue
            for parameter in wanted:
                if parameter not in found and "**" not in found:
                    yield f"{function} in {file} takes no {parameter}"
    for file, names in FIELDS.items():
        tree = parsed(vllm / file)
        has = set() if tree is None else attributes(tree)
        yield from (f"{file} sets no {name}" for name in names if name not in has)


def main() -> int:
    """Print what is missing; 1 if anything is."""
    installed = Path(sysconfig.get_paths()["purelib"]) / "vllm"
    vllm = Path(sys.argv[1]) if len(sys.argv) > 1 else installed
    if not vllm.is_dir():
        print(f"{vllm} is no folder of vLLM's sources; give one")
        return 2
    found = list(missing(vllm))
    print("\n".join(found) or f"all {len(set(imported()))} imports, and what is wrapped and read")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
