# SPDX-License-Identifier: Apache-2.0
"""Worker classes: vLLM's own, with planner, telemetry and speculation set up around them, and
reachable by RPC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed import get_tp_group, get_world_group, tensor_model_parallel_all_reduce
from vllm.logger import init_logger

from flexquant_kernels import ops
from vllm_flexquant.host import checkpoint_files, contract, draft_setup, v1, v2
from vllm_flexquant.host.linear import FlexLinearMethod
from vllm_flexquant.host.quant_config import FlexQuantConfig
from vllm_flexquant.planner import probe_op
from vllm_flexquant.planner.planner import Planner
from vllm_flexquant.planner.table import LayerRecord, WeightError
from vllm_flexquant.telemetry.snapshot import Snapshots
from vllm_flexquant.telemetry.steps import Recorder
from vllm_flexquant.telemetry.sums import Sums

logger = init_logger(f"vllm.{__name__}")

_BASES = {
    "FlexCPUWorker": ("vllm.v1.worker.cpu_worker", "CPUWorker"),
    "FlexGPUWorker": ("vllm.v1.worker.gpu_worker", "Worker"),
}

WORKERS = {f"{module}.{base}": f"{__name__}.{flex}" for flex, (module, base) in _BASES.items()}
"""vLLM's worker classes by qualified name, and what takes their place."""


class FlexWorkerMixin:
    """To be put before a vLLM worker class.

    Methods that begin with `flexquant_` are called through `collective_rpc`.
    """

    vllm_config: Any
    model_runner: Any
    device: torch.device
    local_rank: int

    @property
    def _config(self) -> FlexQuantConfig:
        return self.vllm_config.quant_config

    def init_device(self) -> None:
        super().init_device()  # type: ignore[misc]
        if self.device.type == "cpu" and torch.cpu._is_amx_tile_supported():
            # Linux wants to be asked before a process uses AMX tiles. vLLM's CPU attention (0.32)
            # uses them without asking and relies on oneDNN, which asks at its first matrix product;
            # with all linear layers in planes there is none, and attention would die of SIGILL.
            torch.cpu._init_amx()
        # outside of load_model, whose allocations sleep mode may discard
        scheduler = self.vllm_config.scheduler_config
        self._config.planner.allocate(
            self.device, scheduler.max_num_seqs, scheduler.max_num_batched_tokens
        )
        if draft_setup.drafts_itself(self.vllm_config):
            draft_setup.put_drafter(self.model_runner, self.vllm_config)

    def load_model(self, **kwargs: Any) -> None:
        config, planner = self._config, self._config.planner
        if self.device.type == "cpu":
            ops.load_native()
        if config.stored is not None and self.local_rank == 0:
            checkpoint_files.check_download(
                self.vllm_config.model_config, self.vllm_config.load_config, config.options.verify
            )
        super().load_model(**kwargs)  # type: ignore[misc]
        for line in sorted(config.left_alone):
            logger.info("flexquant: unquantized %s", line)
        errors = _errors_of_all_ranks(config.table.layers)
        if not errors:
            raise ValueError(
                f"flexquant found no layer that it can quantize in {config.model}: "
                f"{'; '.join(sorted(config.left_alone)) or 'it has no linear layers'}; "
                "serve it without --quantization flexquant"
            )
        ranks = get_world_group().world_size
        planner.start(
            errors, config.calibration, config.packed_modules_mapping, ranks, _agreement()
        )
        speculation = draft_setup.start(self.model_runner, planner, ranks)
        on_v2 = hasattr(self.model_runner, "model_state")
        if not on_v2:
            v1.install(self.model_runner, planner, drafts_itself=speculation is not None)
        self._install_probe(planner)
        self._speculation = speculation
        steps = planner.options.trace_steps
        self._recorder = Recorder(planner, steps) if steps else None
        self._snapshots = Snapshots(
            planner,
            Sums(planner),
            speculation,
            runner="V2" if on_v2 else "V1",
            vllm=contract.vllm_version(),
            unquantized=sorted(config.left_alone),
        )
        self._compile()
        self._announce()

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM's. V2 warms up with requests of its own, which are no steps to be booked."""
        done = super().compile_or_warm_up_model()  # type: ignore[misc]
        if hasattr(self.model_runner, "model_state"):
            v2.install(self.model_runner, self._config.planner)
        return done

    def _install_probe(self, planner: Planner) -> None:
        """Let the layer that the probe listens to call it, where this rank has that layer."""
        listening = planner.model.listening
        if listening is None:
            return
        probe_op.connect(planner)
        for layer in self.model_runner.model.modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, FlexLinearMethod) and method.index == listening.layer:
                columns = layer.flexquant_columns
                if columns != len(listening.weight):
                    raise ValueError(
                        f"the probe of flexquant.json reads {len(listening.weight)} numbers, but "
                        f"{method.prefix} is given {columns}; copy the checkpoint again"
                    )
                method.probes = True

    def _compile(self) -> None:
        """Compile the Triton kernels for any number of rows, where they run the layers."""
        layers = [
            triton_layer
            for layer in self.model_runner.model.modules()
            if isinstance(method := getattr(layer, "quant_method", None), FlexLinearMethod)
            for triton_layer in method.triton_layers(layer)
        ]
        if layers:
            from flexquant_kernels import triton

            triton.warm_up(layers, self.vllm_config.scheduler_config.max_num_batched_tokens)
            vocabulary = self.vllm_config.model_config.get_vocab_size()
            torch.ops.flexquant.entropy(torch.zeros(1, vocabulary, device=self.device))

    def _announce(self) -> None:
        view = self.flexquant_snapshot()
        options, layers = view["options"], view["layers"]
        kernels = sorted({layer["kernel"] for layer in layers})
        stored = sum(layer.bytes_read(layer.widths[-1]) for layer in self._config.table.layers)
        logger.info(
            "flexquant: %d layers in planes %s, %.1f MB per step at all bits (%.1f MB at the "
            "lowest), %d levels, ladder by %s; policy %s, prefill %s, bounds %d to %d bits; kernel "
            "%s: %s",
            len(layers),
            options["layout"],
            stored / 1e6,
            view["ladder"]["bytes_read_per_step"][0] / 1e6,
            view["levels"],
            view["ladder"]["source"],
            options["policy"],
            options["prefill"],
            options["min_bits"],
            options["max_bits"],
            ", ".join(kernels),
            layers[0]["why"] if layers else "no layer on this rank",
        )

    # ---- RPC

    def flexquant_snapshot(self, fresh: bool = False) -> dict[str, Any]:
        """As `Snapshots.take`."""
        return self._snapshots.take(fresh)

    def flexquant_change(self, changes: dict[str, Any], apply: bool = True) -> str:
        """Change the policy; returns the reason if it was refused, else an empty text.

        All ranks hold the same ladder and options, so they all refuse or none does.

        Args:
            apply: False only to see whether it would be refused.
        """
        try:
            self._config.planner.change(changes, apply)
        except ValueError as error:
            return str(error)
        return ""

    def flexquant_records(self, clear: bool = False) -> list[dict[str, Any]]:
        """The last `trace_steps` steps, oldest first."""
        return [] if self._recorder is None else self._recorder.views(clear)

    def flexquant_trace(self) -> bytes | str:
        """The last `trace_steps` steps as the content of a file that `flexquant replay` reads; the
        reason as text if there is none."""
        if self._recorder is None:
            return "no steps are recorded; start the server with trace_steps, say 10000"
        return self._recorder.trace().dump()

    def flexquant_drafts(self) -> list[dict[str, Any]]:
        """As `SelfSpeculation.trace`; empty without self-speculation."""
        return [] if self._speculation is None else self._speculation.trace()


def _agreement() -> Callable[[torch.Tensor], torch.Tensor] | None:
    """From int32 values of this rank to those of the first one of its tensor-parallel group, None
    where it is alone. May be called within a forward pass and within a captured graph."""
    group = get_tp_group()
    if group.world_size == 1:
        return None
    first = group.rank_in_group == 0

    def agree(values: torch.Tensor) -> torch.Tensor:
        # in halves, since vLLM reduces floats, and fp32 has 24 bits
        halves = torch.stack((values >> 15, values & 0x7FFF)).float()
        high, low = tensor_model_parallel_all_reduce(halves if first else halves * 0).int()
        return (high << 15) | low

    return agree


def _errors_of_all_ranks(layers: list[LayerRecord]) -> dict[str, WeightError]:
    """Weight errors of every layer of the model, shards added up, the same on every rank."""
    own = [(layer.name, layer.error) for layer in layers]
    group = get_world_group()
    shares: list[Any] = [None] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(shares, own, group=group.cpu_group)
    else:
        shares = [own]
    errors: dict[str, WeightError] = {}
    for share in shares:
        for name, error in share:
            errors[name] = errors[name] + error if name in errors else error
    return errors


def __getattr__(name: str) -> type:
    """`FlexCPUWorker` and `FlexGPUWorker`, each importing only its own platform's worker."""
    if name not in _BASES:
        raise AttributeError(name)
    module, base = _BASES[name]
    worker = getattr(__import__(module, fromlist=[base]), base)
    globals()[name] = type(name, (FlexWorkerMixin, worker), {"__module__": __name__})
    return globals()[name]
