# SPDX-License-Identifier: Apache-2.0
"""Worker classes: vLLM's own, with the controller set up around them and reachable by RPC."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed import get_world_group
from vllm.logger import init_logger

from flexquant_kernels import ops
from vllm_flexquant.host import draft_setup
from vllm_flexquant.host import runners as hooks
from vllm_flexquant.host.linear import FlexLinearMethod
from vllm_flexquant.host.quant_config import FlexQuantConfig
from vllm_flexquant.planner import probe_op as probe
from vllm_flexquant.planner.table import WeightError

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

    @property
    def _config(self) -> FlexQuantConfig:
        return self.vllm_config.quant_config

    def init_device(self) -> None:
        if speculates := draft_setup.drafts_itself(self.vllm_config):
            self.vllm_config = draft_setup.without_processor(self.vllm_config)
        super().init_device()  # type: ignore[misc]
        if self.device.type == "cpu" and torch.cpu._is_amx_tile_supported():
            # Linux wants to be asked before a process uses AMX tiles. vLLM's CPU attention (0.32)
            # uses them without asking and relies on oneDNN, which asks at its first matrix product;
            # with all linear layers in planes there is none, and attention would die of SIGILL.
            torch.cpu._init_amx()
        # outside of load_model, whose allocations sleep mode may discard
        scheduler = self.vllm_config.scheduler_config
        self._config.controller.allocate(
            self.device, scheduler.max_num_seqs, scheduler.max_num_batched_tokens
        )
        if speculates:
            draft_setup.put_drafter(self.model_runner, self.vllm_config)

    def load_model(self, **kwargs: Any) -> None:
        if self.device.type == "cpu":
            ops.load_native()
        super().load_model(**kwargs)  # type: ignore[misc]
        controller = self._config.controller
        assert controller.table is not None
        for line in self._config.left_alone:
            logger.info("flexquant: unquantized %s", line)
        errors = _errors_of_all_ranks(controller.table.layers)
        if not errors:
            raise ValueError(
                f"flexquant found no layer that it can quantize in {self._config.model}: "
                f"{'; '.join(self._config.left_alone) or 'it has no linear layers'}; "
                "serve it without --quantization flexquant"
            )
        controller.start(
            errors,
            self._config.calibration,
            self._config.packed_modules_mapping,
            get_world_group().world_size,
        )
        draft_setup.start(self.model_runner, controller, get_world_group().world_size)
        self._install_probe()
        hooks.install(self.model_runner, controller)
        self._compile()
        self._announce()

    def _install_probe(self) -> None:
        """Let the layer that the probe listens to call it, where this rank has that layer."""
        controller = self._config.controller
        listening = None if controller.budget is None else controller.budget.listening
        if listening is None:
            return
        probe.connect(controller)
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
        status = self.flexquant_status()
        options, layers = status["options"], status["layers"]
        kernels = sorted({layer["kernel"] for layer in layers})
        stored = sum(layer.bytes_read(layer.widths[-1]) for layer in self._config.table.layers)
        logger.info(
            "flexquant: %d layers in planes %s, %.1f MB per step at all bits (%.1f MB at the "
            "lowest), %d levels, ladder by %s; policy %s, prefill %s, bounds %d to %d bits; kernel "
            "%s: %s",
            len(layers),
            options["layout"],
            stored / 1e6,
            status["ladder"]["bytes_read_per_step"][0] / 1e6,
            status["levels"],
            status["ladder"]["source"],
            options["policy"],
            options["prefill"],
            options["min_bits"],
            options["max_bits"],
            ", ".join(kernels),
            layers[0]["why"] if layers else "no layer on this rank",
        )

    # ---- RPC

    def flexquant_status(self) -> dict[str, Any]:
        """As `Controller.status`, with what was left unquantized."""
        return self._config.controller.status() | {"unquantized": self._config.left_alone}

    def flexquant_update(self, changes: dict[str, Any]) -> str:
        """Change the policy; returns the reason if it was refused, else an empty text.

        All ranks hold the same ladder and options, so they all refuse or none does.
        """
        try:
            self._config.controller.update(changes)
        except ValueError as error:
            return str(error)
        return ""

    def flexquant_metrics(self) -> dict[str, Any]:
        """As `Controller.metrics`."""
        return self._config.controller.metrics()

    def flexquant_trace(self, clear: bool = False) -> list[dict[str, Any]]:
        """As `Controller.trace`."""
        return self._config.controller.trace(clear)

    def flexquant_drafts_trace(self) -> list[dict[str, Any]]:
        """As `SelfSpeculation.trace`; empty without self-speculation."""
        speculation = self._config.controller.speculation
        return [] if speculation is None else speculation.trace()

    def flexquant_steps_trace(self) -> bytes | str:
        """As `Controller.steps_trace`; the reason as text if there is none."""
        try:
            return self._config.controller.steps_trace()
        except ValueError as error:
            return str(error)


def _errors_of_all_ranks(layers: list) -> dict[str, WeightError]:
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
