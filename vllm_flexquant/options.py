# SPDX-License-Identifier: Apache-2.0
"""Everything a user may set, in one place.

Options reach an engine from four sources; a later one wins:

1. the defaults below,
2. environment variables, `VLLM_FLEXQUANT_<OPTION>`; an empty one is unset,
3. `--additional-config '{"flexquant": {...}}'`,
4. for a checkpoint that is quantized while it loads,
   `--hf-overrides '{"quantization_config": {"quant_method": "flexquant", ...}}'`.

A saved flexquant checkpoint fixes its own format options (`FORMAT_OPTIONS`). All meet in `Sources`.
Imports neither torch nor vLLM.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from vllm_flexquant.environment import ENV_PREFIX, ENVIRONMENT, PROCESS_ENV, read_environment
from vllm_flexquant.format.layout import GROUP_SIZES, PARENT_BITS, PlaneLayout, ScaleMode
from vllm_flexquant.values import (
    LIVE,
    LOWEST_BITS,
    Bits,
    Count,
    Drafts,
    Entropy,
    LayerNames,
    Layout,
    Level,
    Live,
    MeanBits,
    Millis,
    Name,
    Names,
    Nats,
    Positive,
    Share,
    Steps,
    from_json,
    printed,
    shown,
    unknown_name,
)

METHOD = "flexquant"
XARG_MIN_BITS = "flexquant_min_bits"
XARG_BUDGET = "flexquant_budget"
XARG_CLASS = "flexquant_class"
XARGS = {
    XARG_MIN_BITS: "no layer runs below so many bits in the steps that the request is part of",
    XARG_BUDGET: "mean KL that the request may cost, nats per token",
    XARG_CLASS: "the operator's class whose promises it gets",
}
"""The `vllm_xargs` keys of a request."""

OWN = "own"
"""What the accounts of budgets that requests asked for themselves are called together."""

MOST_CLASSES = 47
"""So that the ledger has lines left for budgets that requests ask for."""

SHORTEST_KEY = 8
"""Characters of the operator's key."""

Policy = Literal["auto", "budget", "entropy", "progressive", "load", "static", "manual"]
Signal = Literal["probe", "entropy", "both", "none"]
Gate = Literal["gain", "entropy", "fixed"]
PINNED = ("static", "manual")
"""Policies whose level does not depend on the step."""


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

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, hide_input_in_errors=True
    )

    layout: Layout = Field(
        PlaneLayout(), description="plane widths in bits, most significant first"
    )
    group_size: Positive = Field(
        64,
        description="largest group of weights that share a scale: 128, 64 or 32; a layer takes the "
        "largest of these that divides its input dimension",
    )
    scales: ScaleMode = Field(ScaleMode.PER_WIDTH, description="per_width or shared")
    output_layer: bool = Field(True, description="quantize the output layer (lm_head)")
    ignore: LayerNames = Field(
        (),
        max_length=1000,
        description="names or name endings of layers to leave unquantized, comma-separated",
    )
    verify: bool = Field(
        True, description="check the hashes of a saved checkpoint before it is loaded"
    )

    policy: Live[Policy] = Field(
        "auto",
        description="budget, entropy, progressive, load, static or manual; auto: budget for a "
        "calibrated checkpoint, else entropy; all bits beside speculation",
    )
    budget: Live[Nats] = Field(
        0.02, description="mean KL per token under policy budget, nats; classes may have their own"
    )
    budget_horizon: Live[Positive] = Field(
        256, description="tokens of a class over which its mean is to meet its budget"
    )
    signal: Live[Signal] = Field(
        "probe",
        description="what tells policy budget what a token needs: probe, entropy (of the steps "
        "before), both or none",
    )
    classes: Annotated[dict[Name, RequestClass], BeforeValidator(from_json)] = Field(
        CLASSES,
        max_length=MOST_CLASSES,
        description="classes of requests, a JSON object of objects with budget and min_bits",
    )
    default_class: Name = Field(
        "balanced", description="class of requests that name none, as `flexquant_class` would"
    )
    request_classes: Names | None = Field(
        None,
        description="classes that a request may name, comma-separated (default: all of them)",
    )
    request_budget: Literal["allow", "deny"] | Nats = Field(
        "allow",
        description="whether a request may ask for a budget of its own: allow, deny, or the lowest "
        "that it may ask for, nats per token",
    )
    request_floor: Literal["allow", "deny"] | Bits = Field(
        "allow",
        description="whether a request may ask for a lowest width: allow, deny, or the most bits "
        "that it may ask for",
    )
    operator_key: SecretStr | None = Field(
        None,
        repr=False,
        exclude=True,
        description="with it an operator changes the policy and reads traces, by HTTP; at least "
        f"{SHORTEST_KEY} characters, by the environment only (default: nobody may)",
    )
    target_ms: Live[Millis | None] = Field(
        None,
        description="time per output token that load is kept to, by lower levels when it must be; "
        "policy load runs at the best level that keeps it; syncs a GPU",
    )
    rank_first: Live[Literal["load", "budget"]] = Field(
        "load", description="which of target_ms and policy budget wins where both cannot be kept"
    )
    up_for_free: Live[bool] = Field(
        True,
        description="all bits at numbers of rows where low widths were measured to save no time",
    )
    progressive_tokens: Live[Positive] = Field(
        256, description="tokens over which policy progressive lowers an answer's level"
    )
    progressive_full: Live[Count] = Field(
        16, description="first tokens of an answer at the best level, under progressive"
    )
    progressive_bits: Live[MeanBits] = Field(
        LOWEST_BITS, description="mean bits at which policy progressive ends"
    )
    speculate: Live[Drafts] = Field(
        0,
        description="tokens that the model drafts at most, at a cheap level of its own, before a "
        "step verifies them; 0: no self-speculation",
    )
    draft_level: Live[Level | None] = Field(
        None,
        description="level of the ladder at which drafts run (default: by calibration, else about "
        "4 bits)",
    )
    draft_width: Live[Bits | None] = Field(
        None, description="bits of every layer in drafts, instead of a level"
    )
    draft_gate: Live[Gate] = Field(
        "gain",
        description="what ends a draft: gain, what it is expected to gain by its entropies and the "
        "times measured; entropy, one above draft_entropy; fixed, only its length. With fixed "
        "drafts are never off",
    )
    draft_entropy: Live[Entropy] = Field(
        1.5,
        description="nats of a draft above which drafting stops, under draft_gate=entropy",
    )
    width: Live[Bits | None] = Field(
        None, description="bits of every layer under static and manual (default: all bits)"
    )
    level: Live[Level | None] = Field(
        None, description="level of the ladder under static and manual, instead of a width"
    )
    min_bits: Live[Bits] = Field(LOWEST_BITS, description="no layer runs below this many bits")
    max_bits: Live[Bits] = Field(PARENT_BITS, description="no layer runs above this many bits")
    prefill: Live[Literal["full", "policy"]] = Field(
        "full",
        description="width of steps that hold prompt tokens: all bits, or as the policy says. "
        "`policy` is not booked in a budget: what prompts lose comes on top",
    )
    aggregate: Live[Literal["mean", "quantile", "max"]] = Field(
        "mean", description="how what the rows of the running batch need becomes one need"
    )
    quantile: Live[Share] = Field(0.9, description="which one, under aggregate=quantile")
    entropy_low: Live[Entropy] = Field(
        0.5, description="nats at and below which the cheapest level runs"
    )
    entropy_high: Live[Entropy] = Field(
        2.5, gt=0, description="nats at and above which the best level runs"
    )
    entropy_decay: Live[Share] = Field(
        0.5, lt=1, description="weight of the past in a sequence's moving average"
    )
    hysteresis: Live[Share] = Field(
        0.05, description="share of the ladder that a change must exceed"
    )
    dwell: Live[Positive] = Field(1, description="steps between two changes of level at least")
    trace_steps: Steps = Field(
        0,
        description="last steps kept for inspection, about 100 bytes each for a running sequence "
        "and 8 for a layer; syncs a GPU if not 0",
    )

    @field_validator("group_size")
    @classmethod
    def _known_group_size(cls, value: int) -> int:
        if value not in GROUP_SIZES:
            raise ValueError(f"group size {value} is not supported; use 128, 64 or 32")
        return value

    @field_validator("request_budget", "request_floor", mode="wrap")
    @classmethod
    def _is_allowed(
        cls, value: Any, read: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> Any:
        try:
            return read(value)
        except ValidationError:
            bits = f"bits from {LOWEST_BITS} to {PARENT_BITS}"
            what = bits if info.field_name == "request_floor" else "nats from 1e-06 to 100"
            raise ValueError(f"give allow, deny or {what}") from None

    @field_validator("operator_key", mode="before")
    @classmethod
    def _is_a_key(cls, value: Any) -> Any:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if text is None or text == "":
            return None
        if not (isinstance(text, str) and re.fullmatch(rf"[!-~]{{{SHORTEST_KEY},256}}", text)):
            raise ValueError(
                f"give {SHORTEST_KEY} to 256 characters of ASCII without spaces, as of "
                "`openssl rand -hex 16`"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> FlexQuantOptions:
        if OWN in self.classes:
            raise ValueError(
                f"a class is called '{OWN}', as the budgets of requests' own are; rename it"
            )
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
        named = [("default_class", self.default_class)]
        named += [("request_classes", name) for name in self.request_classes or ()]
        for option, name in named:
            if name not in self.classes:
                raise ValueError(
                    f"{option} {name} is not one of the classes, which are "
                    f"{', '.join(self.classes) or 'none'}"
                )
        return self

    def plain(self) -> dict[str, Any]:
        """JSON values of all options but the operator's key."""
        return self.model_dump(mode="json")

    def updated(self, changes: Mapping[str, Any], source: str) -> FlexQuantOptions:
        """A copy with `changes` applied.

        Raises:
            ValueError: an unknown option or a bad value; the message names `source`, the option,
                the value and the remedy.
        """
        check_names(changes, source)
        try:
            return type(self).model_validate({**dict(self), **changes})
        except ValidationError as error:
            raise ValueError(f"{source}: {describe(error)}") from None

    def changed(self, changes: Mapping[str, Any]) -> FlexQuantOptions:
        """A copy as an operator asks for it while serving.

        `width` or `level` without `policy` selects `manual`. `target_ms: null` takes the target
        away, and null for `draft_level` or `draft_width` goes back to the level by calibration; any
        other null leaves the option as it is.

        Raises:
            ValueError: an option that is unknown or not live, or a bad value, in one sentence.
        """
        live = live_options()
        if wrong := next((name for name in changes if name not in live), None):
            known = wrong in type(self).model_fields
            text = "option {} cannot be changed while serving" if known else "unknown option {}"
            raise ValueError(
                f"{text.format(shown(wrong))}; options that can be changed are {', '.join(live)}"
            )
        given = {k: v for k, v in changes.items() if v is not None or k in _NULLABLE}
        if given.keys() & {"width", "level"}:
            given = {"policy": "manual", "width": None, "level": None} | given
        elif given.get("policy", "manual") not in PINNED:
            given |= {"width": None, "level": None}
        if given.keys() & {"draft_level", "draft_width"}:
            given = {"draft_level": None, "draft_width": None} | given
        try:
            return type(self).model_validate({**dict(self), **given})
        except ValidationError as error:
            raise ValueError(describe(error)) from None


_NULLABLE = ("target_ms", "draft_level", "draft_width")

FORMAT_OPTIONS = ("layout", "group_size", "scales")
"""Options that a saved checkpoint fixes."""

SECRET = "operator_key"
"""By the environment only: vLLM logs its arguments."""

ADDITIONAL = "--additional-config flexquant"
OVERRIDES = "--hf-overrides quantization_config"
STORED = "config.json"


@cache
def live_options() -> tuple[str, ...]:
    """Names of the options that may be changed while serving."""
    fields = FlexQuantOptions.model_fields.items()
    return tuple(name for name, info in fields if LIVE in info.metadata)


def check_names(given: Iterable[str], source: str) -> None:
    """Raises ValueError: a name is no option, or is not to come from this source."""
    known = FlexQuantOptions.model_fields
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{source}: {unknown_name('option', unknown[0], known)}")
    if SECRET in given and source != ENVIRONMENT:
        raise ValueError(
            f"{source}: option '{SECRET}' is read from the environment only, because arguments are "
            f"logged; set {ENV_PREFIX}{SECRET.upper()}"
        )


def describe(error: ValidationError) -> str:
    """The first problem of a pydantic error in one sentence: option, value, what was expected."""
    problem = error.errors(include_url=False)[0]
    message = printed(problem["msg"].removeprefix("Value error, "), 400)
    if not problem["loc"]:
        return message
    name = printed(".".join(map(str, problem["loc"])))
    value = "" if problem["loc"][0] == SECRET else f" is {shown(problem['input'])}"
    return f"option '{name}'{value}: {message}"


@dataclass(frozen=True)
class Sources:
    """Where options come from, as they were given. stored: what a saved checkpoint fixes."""

    environment: Mapping[str, Any] = field(default_factory=dict, repr=False)
    additional: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    stored: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_environment(
        cls,
        additional: Mapping[str, Any] | None = None,
        overrides: Mapping[str, Any] | None = None,
        stored: Mapping[str, Any] | None = None,
    ) -> Sources:
        """With the environment of this process."""
        return cls(environment_options(), additional or {}, overrides or {}, stored or {})

    def resolve(self) -> FlexQuantOptions:
        """The options in force: of two sources the later one wins, and all are checked together.

        Raises:
            ValueError: as `FlexQuantOptions.updated`, or an option that the checkpoint fixes.
        """
        merged: dict[str, Any] = {}
        origin: dict[str, str] = {}
        for source, given in {
            ENVIRONMENT: self.environment,
            ADDITIONAL: self.additional,
            OVERRIDES: self.overrides,
            STORED: self.stored,
        }.items():
            check_names(given, source)
            fixed = [name for name in FORMAT_OPTIONS if name in given and name in self.stored]
            if fixed and source in (ADDITIONAL, OVERRIDES):
                raise ValueError(
                    f"{source}: option '{fixed[0]}' is fixed by the saved checkpoint "
                    f"({printed(str(self.stored[fixed[0]]))}); drop it or quantize again"
                )
            merged |= given
            origin |= dict.fromkeys(given, source)
        try:
            return FlexQuantOptions.model_validate(merged)
        except ValidationError as error:
            place = error.errors(include_url=False)[0]["loc"]
            concerned = [origin[str(place[0])]] if place else dict.fromkeys(origin.values())
            raise ValueError(f"{' and '.join(concerned)}: {describe(error)}") from None


def environment_names() -> tuple[str, ...]:
    """All variables that this package reads."""
    options = (f"{ENV_PREFIX}{name.upper()}" for name in FlexQuantOptions.model_fields)
    return (*options, *PROCESS_ENV)


def environment_options(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The options among environment variables, as text; an empty one is unset.

    Raises:
        ValueError: a variable with our prefix that is unknown.
    """
    found: dict[str, Any] = dict(read_environment(FlexQuantOptions.model_fields, environ))
    return found | ({SECRET: SecretStr(found[SECRET])} if SECRET in found else {})
