# SPDX-License-Identifier: Apache-2.0
"""Our environment variables, and those that others put beside them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from vllm_flexquant.values import printed, unknown_name

logger = logging.getLogger(f"vllm.{__name__}")

ENV_PREFIX = "VLLM_FLEXQUANT_"

PROCESS_ENV = {
    "VLLM_FLEXQUANT_DISABLE": "1: the plugin registers nothing in this process",
    "VLLM_FLEXQUANT_CACHE": "folder of the compiled CPU kernels (default: the user's cache folder)",
    "VLLM_FLEXQUANT_ISA": "highest instruction set that the CPU kernels may use, a name that "
    "`flexquant kernels` lists (default: the best of the machine)",
}
"""Environment variables that are not options of an engine."""

ENVIRONMENT = "environment"
"""How messages name this source of options."""

_INJECTED = re.compile(
    r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
    r"|NAME|ENV_\w+"
)
"""After our prefix: what Kubernetes sets for a service named vllm-flexquant, or one whose name
begins so, and Docker for a linked container."""


def injected(environ: Mapping[str, str]) -> list[str]:
    """Variables with our prefix that a container platform sets."""
    ours = (v for v in environ if v.startswith(ENV_PREFIX))
    return sorted(v for v in ours if _INJECTED.fullmatch(v.removeprefix(ENV_PREFIX)))


def read_environment(options: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The options that have a variable, as text. A variable that is empty is unset.

    Raises:
        ValueError: a variable with our prefix that is unknown.
    """
    names = {f"{ENV_PREFIX}{option.upper()}": option for option in options}
    known = [*names, *PROCESS_ENV]
    ours = {v: text.strip() for v, text in environ.items() if v.startswith(ENV_PREFIX)}
    passed_over = [v for v in injected(environ) if v not in known]
    for variable in sorted(ours.keys() - {*known, *passed_over}):
        if ours[variable]:
            unknown = unknown_name("variable", variable, known, ENV_PREFIX)
            raise ValueError(f"{ENVIRONMENT}: {unknown}")
    if passed_over:
        _note_injected(tuple(passed_over))
    return {names[v]: text for v, text in ours.items() if v in names and text}


@lru_cache(maxsize=8)  # one line, however often the environment is read
def _note_injected(variables: tuple[str, ...]) -> None:
    logger.info(
        "flexquant: passing over %s, which Kubernetes or Docker sets for a service of that name",
        printed(", ".join(variables), 400),
    )
