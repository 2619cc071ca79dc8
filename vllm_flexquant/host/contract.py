# SPDX-License-Identifier: Apache-2.0
"""What we rely on in vLLM: every patch goes through `wrap`, which looks before it leaps.

A patch that does not find what it knows raises `ContractError` when it is installed, not in the
middle of a step. `README.md` beside this file is the ledger: each patch with its reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Any

SUPPORTED = "0.31 to 0.33"
"""Versions of vLLM whose source the patches were written by."""

_MARK = "_flexquant_patches"


class ContractError(RuntimeError):
    """This vLLM is not as a patch knows it."""


@dataclass(frozen=True)
class Patch:
    """owner: class, module or type of the object that was changed; name: of its attribute."""

    owner: str
    name: str
    why: str


_installed: dict[tuple[str, str], Patch] = {}


def installed() -> tuple[Patch, ...]:
    """The patches of this process, in the order in which they came; of several objects of a type
    the first."""
    return tuple(_installed.values())


def vllm_version() -> str:
    """As vLLM gives it, `unknown` if it does not."""
    try:
        from vllm import __version__
    except ImportError:
        return "unknown"
    return str(__version__)


def require(owner: Any, paths: Iterable[str], why: str) -> None:
    """Check that `owner` has attributes, given as paths like `input_batch.req_ids`.

    Raises:
        ContractError: the first that is missing, in one sentence.
    """
    for path in paths:
        found = owner
        for name in path.split("."):
            if not hasattr(found, name):
                raise ContractError(
                    f"vLLM {vllm_version()} has no {_name(owner)}.{path}, which flexquant needs to "
                    f"{why}; use vLLM {SUPPORTED}"
                )
            found = getattr(found, name)


def wrap(
    owner: Any,
    name: str,
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    why: str,
    parameters: Iterable[str] = (),
) -> bool:
    """Put `make(original)` in the place of `owner.name`, once for each owner.

    What others put over ours meanwhile stays, and ours below it.

    Args:
        owner: class, module or object; of the last, the original is bound and only it is changed.
        parameters: of the original that the replacement relies on.

    Returns:
        whether anything was changed.

    Raises:
        ContractError: there is no such attribute or parameter.
    """
    require(owner, [name], why)
    done: frozenset[str] = vars(owner).get(_MARK, frozenset())
    if name in done:
        return False
    original = getattr(owner, name)
    _require_parameters(original, f"{_name(owner)}.{name}", parameters, why)
    setattr(owner, name, wraps(original)(make(original)))
    _note(owner, name, done, why)
    return True


def wrap_call(
    owner: Any, make: Callable[[Callable[..., Any]], Callable[..., Any]], why: str
) -> None:
    """As `wrap` for what an object does when it is called, which Python looks up in its class.

    The object gets a class of its own, derived from the one it had.
    """
    require(owner, ["__call__"], why)
    done: frozenset[str] = vars(owner).get(_MARK, frozenset())
    if "__call__" in done:
        return
    made = make(owner.__call__)
    base = type(owner)
    members = {"__call__": lambda self, *args, **kwargs: made(*args, **kwargs)}
    owner.__class__ = type(base.__name__, (base,), members | {"__module__": base.__module__})
    _note(owner, "__call__", done, why)


def put(owner: Any, name: str, value: Any, why: str) -> None:
    """Put another object in the place of `owner.name`.

    Raises:
        ContractError: there is no such attribute.
    """
    require(owner, [name], why)
    setattr(owner, name, value)
    _note(owner, name, vars(owner).get(_MARK, frozenset()), why)


def _note(owner: Any, name: str, done: frozenset[str], why: str) -> None:
    setattr(owner, _MARK, done | {name})
    patch = Patch(_name(owner), name, why)
    _installed.setdefault((patch.owner, name), patch)


def _require_parameters(
    original: Callable[..., Any], name: str, parameters: Iterable[str], why: str
) -> None:
    wanted = list(parameters)
    if not wanted:
        return
    found = inspect.signature(original).parameters
    # another plugin's wrapper may take anything
    if any(p.kind is p.VAR_KEYWORD for p in found.values()):
        return
    for parameter in wanted:
        if parameter not in found:
            raise ContractError(
                f"{name} of vLLM {vllm_version()} takes no {parameter}, which flexquant needs to "
                f"{why}; use vLLM {SUPPORTED}"
            )


def _name(owner: Any) -> str:
    named = owner if hasattr(owner, "__name__") else type(owner)
    return getattr(named, "__qualname__", named.__name__)
