# SPDX-License-Identifier: Apache-2.0
"""Everything a user may set, in one place.

Options reach an engine from four sources; a later one wins:

1. the defaults below,
2. environment variables, `VLLM_FLEXQUANT_<OPTION>`,
3. `--additional-config '{"flexquant": {...}}'`,
4. for a checkpoint that is quantized while it loads,
   `--hf-overrides '{"quantization_config": {"quant_method": "flexquant", ...}}'`.

A saved flexquant checkpoint fixes its own format options (`FORMAT_OPTIONS`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from vllm_flexquant.format.layout import GROUP_SIZES, PARENT_BITS, PlaneLayout, ScaleMode

METHOD = "flexquant"
ENV_PREFIX = "VLLM_FLEXQUANT_"

PROCESS_ENV = {
    "VLLM_FLEXQUANT_DISABLE": "1: the plugin registers nothing in this process",
    "VLLM_FLEXQUANT_CACHE": "folder of the compiled CPU kernels (default: the user's cache folder)",
    "VLLM_FLEXQUANT_ISA": "highest instruction set that the CPU kernels may use, a name that "
    "`flexquant kernels` lists (default: the best of the machine)",
}
"""Environment variables that are not options of an engine."""

XARG_MIN_BITS = "flexquant_min_bits"
XARG_BUDGET = "flexquant_budget"
XARG_CLASS = "flexquant_class"
XARGS = {
    XARG_MIN_BITS: "no layer runs below so many bits in the steps that the request is part of",
    XARG_BUDGET: "mean KL that the request may cost, nats per token",
    XARG_CLASS: "the operator's class whose promises it gets",
}
"""The `vllm_xargs` keys of a request."""

LOWEST_BITS = 2

MOST_DRAFTS = 16
"""Longer drafts than this are never worth it."""

Policy = Literal["auto", "budget", "entropy", "progressive", "load", "static", "manual"]
Signal = Literal["probe", "entropy", "both", "none"]
Gate = Literal["gain", "entropy", "fixed"]
PINNED = ("static", "manual")
"""Policies whose level does not depend on the step."""

Bits = Annotated[int, Field(ge=LOWEST_BITS, le=PARENT_BITS)]
Millis = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Nats = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Layout = Annotated[PlaneLayout, BeforeValidator(PlaneLayout.parse)]


def _split(value: Any) -> Any:
    return [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value


def _from_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


class RequestClass(BaseModel):
    """What the operator promises to a class of requests.

    budget: mean KL in nats per token, the engine's if None. min_bits: no layer runs below it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget: Nats | None = None
    min_bits: Bits = LOWEST_BITS


CLASSES = {
    "exact": RequestClass(min_bits=PARENT_BITS),
    "balanced": RequestClass(),
    "fast": RequestClass(budget=0.1),
}


class FlexQuantOptions(BaseModel):
    """Options of one engine."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    layout: Layout = Field(
        PlaneLayout(), description="plane widths in bits, most significant first"
    )
    group_size: int = Field(
        64,
        description="largest group of weights that share a scale: 128, 64 or 32; a layer takes the "
        "largest of these that divides its input dimension",
    )
    scales: ScaleMode = Field(ScaleMode.PER_WIDTH, description="per_width or shared")
    output_layer: bool = Field(True, description="quantize the output layer (lm_head)")
    ignore: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field(
        (), description="names or name endings of layers to leave unquantized, comma-separated"
    )
    verify: bool = Field(
        True, description="check the hashes of a saved checkpoint before it is loaded"
    )

    policy: Policy = Field(
        "auto",
        description="budget, entropy, progressive, load, static or manual; auto: budget for a "
        "calibrated checkpoint, else entropy; all bits beside speculation",
    )
    budget: Nats = Field(
        0.02, description="mean KL per token under policy budget, nats; classes may have their own"
    )
    budget_horizon: int = Field(
        256, ge=1, description="tokens of a class over which its mean is to meet its budget"
    )
    signal: Signal = Field(
        "probe",
        description="what tells policy budget what a token needs: probe, entropy (of the steps "
        "before), both or none",
    )
    classes: Annotated[dict[str, RequestClass], BeforeValidator(_from_json)] = Field(
        CLASSES,
        description="classes of requests, a JSON object of objects with budget and min_bits",
    )
    default_class: str = Field(
        "balanced", description="class of requests that name none, as `flexquant_class` would"
    )
    target_ms: Millis | None = Field(
        None,
        description="time per output token that load is kept to, by lower levels when it must be; "
        "policy load runs at the best level that keeps it; syncs a GPU",
    )
    rank_first: Literal["load", "budget"] = Field(
        "load", description="which of target_ms and policy budget wins where both cannot be kept"
    )
    up_for_free: bool = Field(
        True,
        description="all bits at numbers of rows where low widths were measured to save no time",
    )
    progressive_tokens: int = Field(
        256, ge=1, description="tokens over which policy progressive lowers an answer's level"
    )
    progressive_full: int = Field(
        16, ge=0, description="first tokens of an answer at the best level, under progressive"
    )
    progressive_bits: float = Field(
        LOWEST_BITS, description="mean bits at which policy progressive ends"
    )
    speculate: int = Field(
        0,
        ge=0,
        le=MOST_DRAFTS,
        description="tokens that the model drafts at most, at a cheap level of its own, before a "
        "step verifies them; 0: no self-speculation",
    )
    draft_level: int | None = Field(
        None,
        ge=0,
        description="level of the ladder at which drafts run (default: by calibration, else about "
        "4 bits)",
    )
    draft_width: Bits | None = Field(
        None, description="bits of every layer in drafts, instead of a level"
    )
    draft_gate: Gate = Field(
        "gain",
        description="what ends a draft: gain, what it is expected to gain by its entropies and the "
        "times measured; entropy, one above draft_entropy; fixed, only its length. With fixed "
        "drafts are never off",
    )
    draft_entropy: float = Field(
        1.5,
        ge=0,
        description="nats of a draft above which drafting stops, under draft_gate=entropy",
    )
    width: Bits | None = Field(
        None, description="bits of every layer under static and manual (default: all bits)"
    )
    level: int | None = Field(
        None, ge=0, description="level of the ladder under static and manual, instead of a width"
    )
    min_bits: Bits = Field(LOWEST_BITS, description="no layer runs below this many bits")
    max_bits: Bits = Field(PARENT_BITS, description="no layer runs above this many bits")
    prefill: Literal["full", "policy"] = Field(
        "full",
        description="width of steps that hold prompt tokens: all bits, or as the policy says",
    )
    aggregate: Literal["mean", "quantile", "max"] = Field(
        "mean", description="how what the rows of the running batch need becomes one need"
    )
    quantile: float = Field(0.9, ge=0, le=1, description="which one, under aggregate=quantile")
    entropy_low: float = Field(
        0.5, ge=0, description="nats at and below which the cheapest level runs"
    )
    entropy_high: float = Field(
        2.5, gt=0, description="nats at and above which the best level runs"
    )
    entropy_decay: float = Field(
        0.5, ge=0, lt=1, description="weight of the past in a sequence's moving average"
    )
    hysteresis: float = Field(
        0.05, ge=0, le=1, description="share of the ladder that a change must exceed"
    )
    dwell: int = Field(1, ge=1, description="steps between two changes of level at least")
    trace_steps: int = Field(
        0, ge=0, le=1_000_000, description="last steps kept for inspection; syncs a GPU if not 0"
    )

    @field_validator("group_size")
    @classmethod
    def _known_group_size(cls, value: int) -> int:
        if value not in GROUP_SIZES:
            raise ValueError(f"group size {value} is not supported; use 128, 64 or 32")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> FlexQuantOptions:
        if self.min_bits > self.max_bits:
            raise ValueError(
                f"min_bits {self.min_bits} is above max_bits {self.max_bits}; lower one of them"
            )
        if self.entropy_low >= self.entropy_high:
            raise ValueError(
                f"entropy_low {self.entropy_low} is not below entropy_high {self.entropy_high}"
            )
        if self.width is not None and self.level is not None:
            raise ValueError(
                f"width {self.width} and level {self.level} are both set; set one of them"
            )
        if self.draft_level is not None and self.draft_width is not None:
            raise ValueError(
                f"draft_level {self.draft_level} and draft_width {self.draft_width} are both set; "
                "set one of them"
            )
        for name, width in (("width", self.width), ("draft_width", self.draft_width)):
            if width is not None and width not in self.layout.widths:
                raise ValueError(
                    f"{name} {width} is not in layout {self.layout}; "
                    f"it has {', '.join(map(str, self.layout.widths))}"
                )
        if self.policy not in PINNED and (self.width is not None or self.level is not None):
            pinned = "width" if self.width is not None else "level"
            raise ValueError(
                f"{pinned} {getattr(self, pinned)} has no effect under policy {self.policy}; "
                "set policy to static or manual, or use min_bits and max_bits"
            )
        if self.policy == "load" and self.target_ms is None:
            raise ValueError("policy load has no target; set target_ms, the time per output token")
        if self.default_class not in self.classes:
            raise ValueError(
                f"default_class {self.default_class} is not one of the classes, which are "
                f"{', '.join(self.classes) or 'none'}"
            )
        return self

    def updated(self, changes: Mapping[str, Any], source: str) -> FlexQuantOptions:
        """A copy with `changes` applied.

        Raises:
            ValueError: an unknown option or a bad value; the message names `source`, the option,
                the value and the remedy.
        """
        if unknown := sorted(set(changes) - set(type(self).model_fields)):
            known = ", ".join(type(self).model_fields)
            raise ValueError(f"{source}: unknown option '{unknown[0]}'; options are {known}")
        try:
            return type(self).model_validate({**dict(self), **changes})
        except ValidationError as error:
            raise ValueError(f"{source}: {describe(error)}") from None


FORMAT_OPTIONS = ("layout", "group_size", "scales")
"""Options that a saved checkpoint fixes."""


def describe(error: ValidationError) -> str:
    """The first problem of a pydantic error in one sentence: option, value, what was expected."""
    problem = error.errors()[0]
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name, value = problem["loc"][0], problem["input"]
    return f"option '{name}' is {value!r}: {message}"


def options_from_environment() -> FlexQuantOptions:
    """Defaults overridden by `VLLM_FLEXQUANT_*`."""
    fields = FlexQuantOptions.model_fields
    names = {f"{ENV_PREFIX}{name.upper()}": name for name in fields}
    for variable in os.environ:
        if (
            variable.startswith(ENV_PREFIX)
            and variable not in names
            and variable not in PROCESS_ENV
        ):
            raise ValueError(
                f"environment: unknown variable {variable}; variables are "
                f"{', '.join([*names, *PROCESS_ENV])}"
            )
    found = {
        name: os.environ[variable] for variable, name in names.items() if variable in os.environ
    }
    return FlexQuantOptions().updated(found, "environment")


class PolicyUpdate(BaseModel):
    """What `POST /v1/flexquant` may change; a field that is absent stays as it is.

    `width` or `level` without `policy` selects `manual`. `target_ms: null` takes the target away,
    and null for `draft_level` or `draft_width` goes back to the level by calibration.
    """

    model_config = ConfigDict(extra="forbid")

    policy: Policy | None = None
    budget: Nats | None = None
    budget_horizon: int | None = Field(None, ge=1)
    signal: Signal | None = None
    width: Bits | None = None
    level: int | None = Field(None, ge=0)
    min_bits: Bits | None = None
    max_bits: Bits | None = None
    prefill: Literal["full", "policy"] | None = None
    aggregate: Literal["mean", "quantile", "max"] | None = None
    quantile: float | None = Field(None, ge=0, le=1)
    entropy_low: float | None = Field(None, ge=0)
    entropy_high: float | None = Field(None, gt=0)
    entropy_decay: float | None = Field(None, ge=0, lt=1)
    hysteresis: float | None = Field(None, ge=0, le=1)
    dwell: int | None = Field(None, ge=1)
    target_ms: Millis | None = None
    rank_first: Literal["load", "budget"] | None = None
    up_for_free: bool | None = None
    progressive_tokens: int | None = Field(None, ge=1)
    progressive_full: int | None = Field(None, ge=0)
    progressive_bits: float | None = None
    speculate: int | None = Field(None, ge=0, le=MOST_DRAFTS)
    draft_level: int | None = Field(None, ge=0)
    draft_width: Bits | None = None
    draft_gate: Gate | None = None
    draft_entropy: float | None = Field(None, ge=0)

    @classmethod
    def read(cls, changes: Mapping[str, Any]) -> PolicyUpdate:
        """Check what was asked for, by itself.

        Raises:
            ValueError: an unknown option or a bad value, in one sentence.
        """
        if unknown := sorted(set(changes) - set(cls.model_fields)):
            raise ValueError(
                f"unknown option '{unknown[0]}'; options that can be changed are "
                f"{', '.join(cls.model_fields)}"
            )
        try:
            return cls.model_validate(dict(changes))
        except ValidationError as error:
            raise ValueError(describe(error)) from None

    def apply(self, options: FlexQuantOptions) -> FlexQuantOptions:
        """The options after this update.

        Raises:
            ValueError: as `FlexQuantOptions.updated`.
        """
        changes: dict[str, Any] = self.model_dump(exclude_none=True)
        if "target_ms" in self.model_fields_set:
            changes["target_ms"] = self.target_ms
        if "width" in changes or "level" in changes:
            changes.setdefault("policy", "manual")
            changes.setdefault("width", None)
            changes.setdefault("level", None)
        elif changes.get("policy", "manual") not in PINNED:
            changes |= {"width": None, "level": None}
        if self.model_fields_set & {"draft_level", "draft_width"}:
            changes.setdefault("draft_level", None)
            changes.setdefault("draft_width", None)
        return options.updated(changes, "request")
