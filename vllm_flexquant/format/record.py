# SPDX-License-Identifier: Apache-2.0
"""What calibration found, as `flexquant.json` holds it beside the weights.

Every part is optional: a checkpoint that was rounded to nearest has none of them. Unknown keys are
ignored, so that a newer minor version can be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_flexquant.format.layout import PARENT_BITS


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class UnitRecord(_Part):
    """Layers that are given the same input and so share a width.

    `sensitivity` is by width in bits: KL of the model's output in nats per token with only this
    unit at that width, and its standard error. `highest`: width in bits at the top of the ladder.
    """

    layers: tuple[str, ...] = Field(min_length=1)
    weights: int = Field(ge=1)
    sensitivity: dict[int, tuple[float, float]] = {}
    highest: int = Field(PARENT_BITS, ge=2, le=PARENT_BITS)

    @property
    def name(self) -> str:
        """The first layer's name stands for the unit."""
        return self.layers[0]


class StepRecord(_Part):
    """A step down the ladder: unit number `unit` goes to `width` bits."""

    unit: int = Field(ge=0)
    width: int = Field(ge=2, le=PARENT_BITS)


class RungRecord(_Part):
    """Level after so many `steps`, cheapest last.

    `bytes_stored`: of a checkpoint that is pruned to this level, 0 where nobody knows. `kl_nats` is
    `measured` on held-back text, with its standard error, or interpolated.
    """

    steps: int = Field(ge=0)
    mean_bits: float
    bytes_read: int
    bytes_stored: int = 0
    kl_nats: float
    error: float | None = None
    measured: bool


class LadderRecord(_Part):
    """`steps` from all bits down to the lowest width everywhere; a level is a number of steps.

    `cost`: what the order saves most of for its KL.
    """

    search: str
    cost: str = "bytes read"
    steps: tuple[StepRecord, ...]
    rungs: tuple[RungRecord, ...]

    @model_validator(mode="after")
    def _one_rung_per_level(self) -> LadderRecord:
        if [rung.steps for rung in self.rungs] != list(range(len(self.steps) + 1)):
            raise ValueError("there must be one rung per level, from 0 steps on")
        return self


class ProbeRecord(_Part):
    """Tells which tokens need precision: score = exp(weight · x + bias), mean 1, where x is what
    `layer` is given.

    relative_kl: KL when the half of the tokens that scores lowest runs at level `levels[0]` and the
    rest at `levels[1]`, over that of a random half; correlation: Spearman's, of score and KL; both
    on text that the probe was not fitted to. candidates: relative_kl of every layer tried. levels:
    None once a checkpoint has been pruned and has not both of them any more.
    """

    layer: str
    weight: tuple[float, ...]
    bias: float
    levels: tuple[int, int] | None
    relative_kl: float
    correlation: float
    candidates: dict[str, float] = {}


class NeedRecord(_Part):
    """What entropy tells of a token's need, its KL over that of the average token.

    by_entropy: mean need of the tokens whose own logits have an entropy in each bin of `bin_nats`,
    the last one open; by_average: of those whose sequence has an average before them in the bin,
    with weight `decay` of the past.
    """

    bin_nats: float = Field(gt=0)
    by_entropy: tuple[float, ...] = Field(min_length=1)
    by_average: tuple[float, ...] = Field(min_length=1)
    decay: float = 0.5


Share = Annotated[float, Field(ge=0, le=1)]


class DraftLevelRecord(_Part):
    """How tokens that one level drafts fare when the best level verifies them, by the entropy of
    the draft's logits.

    steps: down the ladder. kl_nats: KL(best || draft) in nats per token. By bins of entropy: share
    of the tokens in it; greedy, of the draft's most likely tokens the share that are the best
    level's as well; sampled, of the tokens drawn from the draft at temperature 1 the share that
    rejection sampling keeps, the mean of sum_v min(p_best(v), p_draft(v)). greedy and sampled are
    smoothed over neighbouring bins, so that empty ones have a value too. mean_greedy, mean_sampled:
    over all tokens.
    """

    steps: int = Field(ge=0)
    kl_nats: float
    mean_greedy: Share
    mean_sampled: Share
    share: tuple[Share, ...] = Field(min_length=1)
    greedy: tuple[Share, ...]
    sampled: tuple[Share, ...]

    @model_validator(mode="after")
    def _same_bins(self) -> DraftLevelRecord:
        if not len(self.share) == len(self.greedy) == len(self.sampled):
            raise ValueError(
                f"share, greedy and sampled must have as many bins, not {len(self.share)}, "
                f"{len(self.greedy)} and {len(self.sampled)}"
            )
        return self


class DraftsRecord(_Part):
    """How some levels do as drafts for the best one, best first.

    bin_nats: width of the bins of the draft's entropy, the last one open. Levels of a pruned
    checkpoint were measured against the best level of the whole ladder.
    """

    bin_nats: float = Field(gt=0)
    levels: tuple[DraftLevelRecord, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _down_the_ladder(self) -> DraftsRecord:
        steps = [level.steps for level in self.levels]
        if steps != sorted(set(steps)):
            raise ValueError(f"the levels' steps must ascend, not be {steps}")
        return self


class CalibrationRecord(_Part):
    """All that calibration found, and on which text (`text`, with its sha256).

    `int8_activations`: KL in nats per token that the CPU kernels' int8 activations add, and its
    standard error.
    """

    text: dict[str, Any] = {}
    units: tuple[UnitRecord, ...] = ()
    uniform_kl: dict[int, tuple[float, float]] = {}
    ladder: LadderRecord | None = None
    probe: ProbeRecord | None = None
    need: NeedRecord | None = None
    int8_activations: tuple[float, float] | None = None
    drafts: DraftsRecord | None = None

    @model_validator(mode="after")
    def _units_and_levels_exist(self) -> CalibrationRecord:
        steps = self.ladder.steps if self.ladder else ()
        if wrong := [step.unit for step in steps if step.unit >= len(self.units)]:
            raise ValueError(f"the ladder names unit {wrong[0]} of {len(self.units)}")
        last = self.drafts.levels[-1].steps if self.drafts else 0
        if last > len(steps):
            raise ValueError(f"drafts name a level {last} steps down a ladder of {len(steps)}")
        return self

    def draft_levels(self) -> Iterator[tuple[DraftLevelRecord, int, float]]:
        """What is known of drafts, each with its level and that one's mean bits, cheapest first."""
        rungs = self.ladder.rungs if self.ladder else ()
        for draft in reversed(self.drafts.levels if self.drafts else ()):
            yield draft, len(rungs) - 1 - draft.steps, rungs[draft.steps].mean_bits

    def widths_after(self, steps: int) -> dict[str, int]:
        """Width of each unit, by name, after so many steps down the ladder."""
        widths = {unit.name: unit.highest for unit in self.units}
        for step in self.ladder.steps[:steps] if self.ladder else ():
            widths[self.units[step.unit].name] = step.width
        return widths


def read_calibration(sidecar: Mapping[str, Any]) -> CalibrationRecord | None:
    """The calibration in the content of `flexquant.json`, None if it has none.

    Raises:
        ValueError: it cannot be understood; the message names the key.
    """
    if "calibration" not in sidecar:
        return None
    try:
        return CalibrationRecord.model_validate(sidecar["calibration"])
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, ("calibration", *problem["loc"])))
        raise ValueError(
            f"flexquant.json: {key}: {problem['msg']}; copy the file again or quantize again"
        ) from None
