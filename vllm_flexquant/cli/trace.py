# SPDX-License-Identifier: Apache-2.0
"""`flexquant trace` and `flexquant replay`."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from vllm_flexquant.telemetry.replay import replay
from vllm_flexquant.telemetry.steps import Trace

_SECONDS = 60
OPERATOR_HEADER = "X-FlexQuant-Key"


def fetch(url: str, api_key: str, operator_key: str, out: Path) -> str:
    """Write a server's trace to `out`; returns a line about it.

    Raises:
        ValueError: no server answers there, or it refuses; or a key that no header can hold.
    """
    address = f"{url.rstrip('/')}/v1/flexquant/trace"
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"--url is {url!r}; give http://HOST:PORT")
    request = urllib.request.Request(address)
    if api_key:
        request.add_unredirected_header("Authorization", _header("--api-key", f"Bearer {api_key}"))
    if operator_key:
        request.add_unredirected_header(OPERATOR_HEADER, _header("--operator-key", operator_key))
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            content = answer.read()
    except urllib.error.HTTPError as error:
        raise ValueError(f"{address} answers {error.code}: {_reason(error)}") from None
    except OSError as error:
        raise ValueError(
            f"{address} cannot be reached ({error}); is the server up, with VLLM_PLUGINS=flexquant?"
        ) from None
    trace = Trace.load(content, address)
    out.write_bytes(content)
    return f"{out}: {len(trace.steps)} steps, {len(content) / 1e3:.0f} kB"


def _header(option: str, value: str) -> str:
    if not (value.isascii() and value.isprintable()):
        raise ValueError(f"{option} has a character that no header can hold; give the key alone")
    return value


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return "is it a vLLM server with VLLM_PLUGINS=flexquant, and --api-key right?"


def replayed(recorded: Path, changes: Sequence[str], as_json: bool) -> Iterator[str]:
    """Lines about a replay.

    Raises:
        ValueError: a bad file or option.
    """
    if wrong := [change for change in changes if "=" not in change]:
        raise ValueError(f"--set is {wrong[0]!r}; give OPTION=VALUE, as in budget=0.03")
    if not recorded.is_file():
        raise ValueError(f"{recorded} is no file; make one with `flexquant trace`")
    options = {name: value for name, _, value in (c.partition("=") for c in changes)}
    found = replay(Trace.load(recorded.read_bytes(), str(recorded)), options).summary()
    if as_json:
        yield json.dumps(found, indent=1)
        return
    for name, value in found.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        yield f"{name.replace('_', ' ')}: {'-' if value is None else shown}"
