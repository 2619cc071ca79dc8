# SPDX-License-Identifier: Apache-2.0
"""What tests run inside the vLLM worker."""

import re
import threading
from pathlib import Path

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_flexquant.host.worker import FlexWorkerMixin


def anonymous_bytes() -> int:
    """Resident memory of this process that is not a mapped file."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024


class MeasuringWorker(FlexWorkerMixin, CPUWorker):
    """Notes how much memory loading takes."""

    def load_model(self, **kwargs):
        # code that loading imports, and threads that it starts, are not the model's memory
        import vllm.model_executor.model_loader.default_loader
        import vllm.model_executor.models.llama  # noqa: F401

        torch.ones(256, 256) @ torch.ones(256, 256)
        before, self.peak, done = anonymous_bytes(), 0, threading.Event()

        def watch():
            while not done.wait(0.002):
                self.peak = max(self.peak, anonymous_bytes() - before)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            super().load_model(**kwargs)
        finally:
            done.set()
            thread.join()
        self.kept = anonymous_bytes() - before

    def memory(self):
        """(peak while loading, kept after it) in bytes, beyond what the worker had before."""
        return self.peak, self.kept


def watch_layers(worker, names):
    """Keep inputs and outputs of some quantized layers from now on (eager engines)."""
    model = worker.model_runner.get_model()
    worker.seen = {name: [] for name in names}
    worker.watching = []
    for name in names:
        layer = model.get_submodule(name)

        def keep(module, inputs, output, name=name):
            y = output[0] if isinstance(output, tuple) else output
            worker.seen[name].append((inputs[0].clone(), y.clone()))

        worker.watching.append(layer.register_forward_hook(keep))


def widths_by_output(worker):
    """For each kept call, the widths at which the layer's kernel gives exactly that output."""
    for hook in worker.watching:
        hook.remove()
    model = worker.model_runner.get_model()
    found = {}
    for name, calls in worker.seen.items():
        layer = model.get_submodule(name)
        view, found[name] = layer.flexquant_width, []
        for x, y in calls:
            matches = []
            for width in (4, 6, 8):
                layer.flexquant_width = torch.tensor([width], dtype=torch.int32)
                if torch.equal(layer.quant_method.apply(layer, x, layer.bias), y):
                    matches.append(width)
            found[name].append(matches)
        layer.flexquant_width = view
    return found


def compile_counters(worker):
    """Everything that torch counts when it traces or compiles."""
    from torch._dynamo.utils import counters

    return {kind: dict(values) for kind, values in counters.items()}


def remembered_requests(worker):
    """Slots of requests that the plugin still holds anything for."""
    return list(worker.vllm_config.quant_config.planner.grants)


def what_drafts_hold(worker):
    """What the drafter shares with its target, and what it has of its own, in bytes."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    runner = worker.model_runner
    drafter, model = runner.drafter, runner.model
    tensors = [*model.parameters(), *model.buffers()]
    for layer in model.modules():
        tensors += [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    own = [t for t in vars(drafter).values() if isinstance(t, torch.Tensor)]
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return {
        "same_model": drafter.model is model,
        "own_parameters": sum(isinstance(t, torch.nn.Parameter) for t in own),
        "own_bytes": sum(t.untyped_storage().nbytes() for t in own),
        "weight_bytes": sum(weights.values()),
        "layers": sum(isinstance(layer, AttentionLayerBase) for layer in layers),
        "cache_layers": len(runner.kv_caches),
    }
