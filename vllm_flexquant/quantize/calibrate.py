# SPDX-License-Identifier: Apache-2.0
"""The pipeline of `flexquant quantize`: text, rounding, sensitivities, ladder, checkpoint.

Every stage leaves its result in a `WorkFolder`, from which an interrupted run goes on.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from vllm_flexquant.format.checkpoint import OUTPUT_LAYER, hash_file
from vllm_flexquant.format.layout import ScaleMode
from vllm_flexquant.format.record import (
    CalibrationRecord,
    DraftsRecord,
    LadderRecord,
    RungRecord,
    StepRecord,
    UnitRecord,
)
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.quantize import (
    calibration,
    drafts,
    evaluate,
    parallel,
    search,
    sensitivity,
    signals,
)
from vllm_flexquant.quantize.blocks import BlockModel, Unit
from vllm_flexquant.quantize.cost import KernelTimes, read_kernel_times
from vllm_flexquant.quantize.pipeline import (
    Rounded,
    check_paths,
    check_widths,
    choose_layers,
    quantize_checkpoint,
    unquantized_bytes,
)
from vllm_flexquant.quantize.rounding import (
    Method,
    RoundingOptions,
    block_file,
    read_block,
    round_blocks,
    round_output,
)
from vllm_flexquant.quantize.rtn import QuantizedWeight
from vllm_flexquant.quantize.rungs import Sizes, rung_records
from vllm_flexquant.quantize.workfolder import WorkFolder, to_tensors

Advance = Callable[[str, float], None]
"""Called with a stage's name and the share of it that is done."""

Search = Literal["greedy", "tree"]

ESTIMATE_SHARE, SAMPLE_SHARE, RUNG_SHARE = 0.5, 0.25, 0.5
"""Share of the held-back sequences on which sensitivities are estimated, a sample of them measured,
and rungs measured: what is measured for many choices makes do with less text."""

DRAFT_SHARE = 0.5
"""Share of the held-back sequences on which levels are measured as drafts: about 8,000 tokens of
the built-in text, on which an acceptance of 0.8 has a standard error below 0.005."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What `flexquant quantize` can be told besides the format.

    text: as `calibration.read_text`. cost: file of kernel times that order the ladder at cost_rows
    rows (`cost.read_kernel_times`); bytes read if empty. sequences of length tokens calibrate, a
    third as many more measure. store_output: an output layer that is tied to the embedding gets
    planes of its own in the checkpoint, rounded by its inputs; else it is rounded to nearest from
    the embedding when it is served. keep_widths: in bits, ascending, what the checkpoint keeps; all
    of the layout's if empty. measured_rungs: levels whose KL is measured. measured_units: widths of
    units whose KL is measured beside the estimate. ray: address as `parallel.connect` takes it; the
    results do not depend on it.
    """

    text: str = calibration.BUILT_IN
    method: Method = "gptq"
    search: Search = "greedy"
    branch: int = 4
    stem: int = 2
    cost: str = ""
    cost_rows: int = 1
    sequences: int = 96
    length: int = 512
    store_output: bool = False
    keep_widths: tuple[int, ...] = ()
    measured_rungs: int = 16
    measured_units: int = 24
    seed: int = 0
    device: str = "cpu"
    ray: str | None = None


def calibrate_checkpoint(
    model: Path,
    out: Path,
    options: FlexQuantOptions,
    settings: CalibrationOptions,
    resume: bool = False,
    advance: Advance | None = None,
) -> CalibrationRecord:
    """Quantize `model` into the new folder `out`, with a ladder ordered by KL.

    Raises:
        ValueError: as `quantize_checkpoint`, or the calibration text or the tokenizer cannot be
            used, an interrupted run stands in the way, or the Ray cluster is of no use.
    """
    check_paths(model, out)
    if options.scales is not ScaleMode.PER_WIDTH:
        raise ValueError(
            f"scales '{options.scales}' cannot be calibrated; use per_width, or --method rtn"
        )
    check_widths(settings.keep_widths, options.layout)
    chosen, ignored = choose_layers(model, options)
    if not chosen:
        raise ValueError(f"{model} has no layer that can be quantized ({'; '.join(ignored)})")
    times = (
        read_kernel_times(Path(settings.cost), options.layout, settings.cost_rows)
        if settings.cost
        else None
    )
    text = calibration.read_text(settings.text)
    tokens = calibration.cut_tokens(
        text, calibration.load_tokenizer(model), settings.sequences, settings.length
    )
    facts = {
        "model": {f.name: hash_file(f) for f in sorted(model.glob("*.safetensors"))},
        "text": calibration.describe(text, tokens),
        "format": {
            "layout": str(options.layout),
            "group_size": options.group_size,
            "ignore": list(options.ignore),
            "output_layer": options.output_layer,
        },
        "settings": {k: v for k, v in vars(settings).items() if k not in ("text", "ray")},
        "torch": torch.__version__,
    }
    with parallel.connect(settings.ray) as workers:
        work = WorkFolder(out.absolute(), facts, resume)
        workers.share(model.absolute() / "config.json", work.facts_file)
        run = _Run(
            model.absolute(), options, settings, chosen, tokens, work, times, advance, workers
        )
        record = run.record(facts["text"])
    names = {"gptq": "nested GPTQ", "rtn": "round to nearest"}
    rounded = Rounded(run.read_layer, names[settings.method], record, run.resources())
    with run.stage("writing") as report:
        quantize_checkpoint(
            model, out, options, lambda _, i, n: report(i / n), rounded, settings.keep_widths
        )
    run.work.remove()
    return record


class _Run:
    """State of one run, stage by stage."""

    def __init__(
        self,
        folder: Path,
        options: FlexQuantOptions,
        settings: CalibrationOptions,
        chosen: Mapping[str, tuple[int, int]],
        tokens: calibration.CalibrationTokens,
        work: WorkFolder,
        times: KernelTimes | None,
        advance: Advance | None,
        workers: parallel.Workers,
    ) -> None:
        self.folder, self.options, self.settings = folder, options, settings
        self.tokens, self.work, self.workers = tokens, work, workers
        self.widths = settings.keep_widths or options.layout.widths
        self.times = times
        self.model = BlockModel(folder, settings.device)
        self.rounding = RoundingOptions(
            options.layout, options.group_size, settings.method, frozenset(chosen)
        )
        self.advance = advance
        self.output = (
            Unit((OUTPUT_LAYER,), (chosen[OUTPUT_LAYER][0],), chosen[OUTPUT_LAYER][1])
            if OUTPUT_LAYER in chosen
            else None
        )
        config = self.model.model.config.get_text_config()
        tied = bool(getattr(config, "tie_word_embeddings", False))
        self.stores_output = settings.store_output or not tied
        self.seconds: dict[str, float] = {}
        self._block_of: dict[str, int] = {}
        self._cached: tuple[int, Mapping[str, QuantizedWeight]] | None = None

    @contextmanager
    def stage(self, name: str) -> Any:
        """A stage; gives a function that reports the share of it that is done."""

        def report(share: float) -> None:
            if self.advance:
                self.advance(name, share)

        report(0.0)
        began = time.monotonic()
        yield report
        self.seconds[name] = time.monotonic() - began
        report(1.0)

    def resources(self) -> dict[str, Any]:
        """What this process took: seconds by stage, and its peak memory so far in bytes."""
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        found = {
            "seconds": self.seconds,
            "peak_memory_bytes": peak,
            "device": str(self.model.device),
        }
        if self.model.device.type == "cuda":
            found["peak_device_bytes"] = torch.cuda.max_memory_allocated(self.model.device)
        return found

    def read_layer(self, name: str) -> QuantizedWeight | None:
        """A layer's codes and scales from the work folder."""
        if name not in self._block_of:
            return None
        index = self._block_of[name]
        if self._cached is None or self._cached[0] != index:
            self._cached = (index, read_block(self.work, index))
        return self._cached[1][name]

    def record(self, text: dict[str, Any]) -> CalibrationRecord:
        """All stages but the writing."""
        blocks = len(self.model)
        with self.stage("rounding") as report:
            self.blocks = round_blocks(
                self.model, self.tokens.fit, self.rounding, self.work,
                lambda i: report(i / blocks), self.workers.quantize,
            )  # fmt: skip
            if self.output:
                self._round_output()
        self.nested = evaluate.NestedModel(
            self.model, self.blocks, self.options.layout, partial(read_block, self.work)
        )
        self._block_of = {
            name: index
            for index, units in enumerate(self.blocks)
            for unit in units
            for name in unit.members
        }
        if self.output and self.stores_output:
            self._block_of[OUTPUT_LAYER] = evaluate.OUTPUT_INDEX
        self.units = [*chain(*self.blocks), *([self.output] if self.output else [])]
        unstored = () if self.stores_output else (OUTPUT_LAYER,)
        self.sizes = Sizes(
            self.units,
            self.options.group_size,
            self.widths,
            frozenset(unstored),
            unquantized_bytes(self.folder, self.rounding.chosen),
        )
        costs, checked = self._sensitivities()
        steps = self._search({n: {w: by[w].kl for w in self.widths} for n, by in costs.items()})
        uniform, measured = self._measure_rungs(steps)
        rungs = rung_records(steps, self.sizes, measured)
        found = self._signals(steps, rungs)
        number = {unit.name: i for i, unit in enumerate(self.units)}
        return CalibrationRecord(
            text=text | {"estimate_checked": checked},
            units=tuple(
                UnitRecord(
                    layers=unit.members,
                    weights=unit.weights,
                    sensitivity={w: (c.kl, c.error) for w, c in costs[unit.name].items()},
                    highest=self.widths[-1],
                )
                for unit in self.units
            ),
            uniform_kl=uniform,
            ladder=LadderRecord(
                search=self.settings.search,
                cost=self.times.source if self.times else "bytes read",
                steps=tuple(StepRecord(unit=number[s.unit], width=s.width) for s in steps),
                rungs=rungs,
            ),
            probe=found.probe if found else None,
            need=found.need if found else None,
            int8_activations=found.int8_activations if found else None,
            drafts=self._drafts(steps, rungs),
        )

    def _round_output(self) -> None:
        file = block_file(evaluate.OUTPUT_INDEX)
        if not self.work.has_tensors(file):
            options = self.rounding
            if not self.stores_output:
                # as it will be when the served model quantizes it from the embedding
                options = replace(options, method="rtn")
            rounded = round_output(self.model, self.tokens.fit, options, self.work, OUTPUT_LAYER)
            self.work.write_tensors(file, to_tensors({OUTPUT_LAYER: rounded}))

    def _divergence(
        self,
        choices: Sequence[Mapping[str, int]],
        report: Callable[[float], None],
        share: float,
    ) -> torch.Tensor:
        return self.workers.compare(self.nested, self._held_back(share), choices, report)[0]

    def _held_back(self, share: float) -> torch.Tensor:
        return calibration.take_evenly(self.tokens.held_back, share)

    def _sensitivities(
        self,
    ) -> tuple[dict[str, dict[int, sensitivity.Cost]], dict[str, Any]]:
        """By unit and width, and how well the estimate ranks where both were taken."""
        stored = self.work.read_json("sensitivity")
        if stored is None:
            with self.stage("sensitivity, estimated") as report:
                costs = self.workers.estimate(
                    self.nested, self._held_back(ESTIMATE_SHARE), self.settings.seed, report
                )
            picked = self._sample(costs)
            choices: list[dict[str, int]] = [{name: width} for name, width in picked]
            if self.output:
                choices += [{self.output.name: w} for w in self.options.layout.widths]
            with self.stage("sensitivity, measured") as report:
                found = self._divergence(choices, report, SAMPLE_SHARE)
            kl = [evaluate.mean_and_error(values) for values in found]
            pairs = [
                {"unit": n, "width": w, "estimated": costs[n][w].kl, "measured": kl[i][0]}
                for i, (n, w) in enumerate(picked)
            ]
            if self.output:
                of_output = kl[len(picked) :]
                costs[self.output.name] = {
                    w: sensitivity.Cost(*c)
                    for w, c in zip(self.options.layout.widths, of_output, strict=True)
                }
            stored = {
                "costs": {
                    n: {w: (c.kl, c.error) for w, c in by.items()} for n, by in costs.items()
                },
                "pairs": pairs,
            }
            self.work.write_json("sensitivity", stored)
        costs = {
            n: {int(w): sensitivity.Cost(*c) for w, c in by.items()}
            for n, by in stored["costs"].items()
        }
        pairs = stored["pairs"]
        estimated, measured = ([p[k] for p in pairs] for k in ("estimated", "measured"))
        checked = {
            "pairs": pairs,
            "rank_correlation": sensitivity.rank_correlation(estimated, measured),
        }
        return costs, checked

    def _sample(self, costs: Mapping[str, Mapping[int, Any]]) -> list[tuple[str, int]]:
        """(unit, width) evenly over the range of the estimates, the highest width left out."""
        every = sorted(
            (cost.kl, name, width)
            for name, by in costs.items()
            for width, cost in by.items()
            if width != self.widths[-1] and width in self.widths
        )
        count = min(self.settings.measured_units, len(every))
        return [every[i * len(every) // count][1:] for i in range(count)]

    def _search(self, costs: search.Costs) -> list[search.Step]:
        stored = self.work.read_json("search")
        prices = self.sizes.prices(self.times)
        if stored is None:
            with self.stage(f"ladder, {self.settings.search}") as report:
                if self.settings.search == "greedy":
                    steps = search.greedy(costs, prices)
                else:
                    steps = search.tree(
                        costs,
                        prices,
                        lambda c: (
                            self._divergence(c, lambda _: None, SAMPLE_SHARE).mean(-1).tolist()
                        ),
                        self.settings.branch,
                        self.settings.stem,
                        advance=report,
                    )
            stored = [(s.unit, s.width, s.kl) for s in steps]
            self.work.write_json("search", stored)
        return [search.Step(*s) for s in stored]

    def _widths_after(self, steps: Sequence[search.Step]) -> list[dict[str, int]]:
        return search.rungs(dict.fromkeys(self.sizes.weights, self.widths[-1]), steps)

    def _measure_rungs(
        self, steps: Sequence[search.Step]
    ) -> tuple[dict[int, tuple[float, float]], dict[int, tuple[float, float]]]:
        """KL and standard error by uniform width, and by number of steps at some levels."""
        stored = self.work.read_json("rungs")
        if stored is None:
            every = self._widths_after(steps)
            count = min(self.settings.measured_rungs, len(every))
            numbers = [i * (len(every) - 1) // max(count - 1, 1) for i in range(count)]
            choices = [dict.fromkeys(self.sizes.weights, w) for w in self.widths]
            choices += [every[number] for number in numbers]
            with self.stage("ladder, measured") as report:
                found = self._divergence(choices, report, RUNG_SHARE)
            kl = [evaluate.mean_and_error(values) for values in found]
            stored = {
                "uniform": list(zip(self.widths, kl, strict=False)),
                "steps": list(zip(numbers, kl[len(self.widths) :], strict=True)),
            }
            self.work.write_json("rungs", stored)
        uniform, by_steps = (
            {number: (kl, error) for number, (kl, error) in stored[key]}
            for key in ("uniform", "steps")
        )
        return uniform, by_steps

    def _signals(
        self, steps: Sequence[search.Step], rungs: Sequence[RungRecord]
    ) -> signals.Signals | None:
        if not signals.probe_blocks(self.nested):
            return None
        stored = self.work.read_json("signals")
        if stored is None:
            with self.stage("probe") as report:
                stored = signals.measure_signals(
                    self.nested,
                    self.workers,
                    self.tokens,
                    rungs,
                    self._widths_after(steps),
                    self.options.group_size,
                    report,
                ).dump()
            self.work.write_json("signals", stored)
        return signals.Signals.load(stored)

    def _drafts(
        self, steps: Sequence[search.Step], rungs: Sequence[RungRecord]
    ) -> DraftsRecord | None:
        levels = drafts.draft_levels(rungs)
        if not levels:
            return None
        stored = self.work.read_json("drafts")
        if stored is None:
            every = self._widths_after(steps)
            with self.stage("drafts") as report:
                found = drafts.measure_drafts(
                    self.nested,
                    self.workers,
                    self._held_back(DRAFT_SHARE),
                    every[0],
                    {n: every[n] for n in levels},
                    report,
                )
            stored = found.model_dump(mode="json")
            self.work.write_json("drafts", stored)
        return DraftsRecord.model_validate(stored)
