# SPDX-License-Identifier: Apache-2.0
"""Exported checkpoints in vLLM as it is without this plugin."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.serving.configurations import no_w4a16
from vllm_flexquant.options import FlexQuantOptions
from vllm_flexquant.quantize.one_width import ExportOptions, export_checkpoint
from vllm_flexquant.quantize.pipeline import quantize_checkpoint

PROMPT = "The capital of France is Paris. The capital of Italy is"

STOCK = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float16", max_model_len=256, enforce_eager=True, max_num_seqs=2)
    asked = SamplingParams(temperature=0.0, max_tokens=8, prompt_logprobs=0, logprobs=0)
    output = llm.generate([sys.argv[2]], asked)[0]
    answer = output.outputs[0]
    steps = [*output.prompt_logprobs[1:], *answer.logprobs]
    print("RESULT", json.dumps({
        "prompt": output.prompt_token_ids,
        "tokens": list(answer.token_ids),
        "text": answer.text,
        "logprobs": [next(iter(step.values())).logprob for step in steps],
        "plugin": sorted(m for m in sys.modules if m.startswith("vllm_flexquant")),
        "quantization": llm.llm_engine.model_config.quantization,
    }))
"""


@pytest.fixture(scope="module")
def exported(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    quantize_checkpoint(smollm2, folder / "saved", FlexQuantOptions())
    export_checkpoint(folder / "saved", folder / "out", ExportOptions(method="rtn"))
    return folder / "out"


def base_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def plain_model(folder, base):
    """The base model with the weights that compressed-tensors unpacks from `folder`, fp32."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    stored = load_file(folder / "model.safetensors")
    model = base_model(base)
    for name in scheme.targets:
        parts = {
            part: stored[f"{name}.{part}"]
            for part in ("weight_packed", "weight_shape", "weight_zero_point")
        }
        parts["weight_scale"] = stored[f"{name}.weight_scale"].float()
        unpacked = PackedQuantizationCompressor.decompress(parts, scheme)
        model.get_submodule(name).weight.data = unpacked["weight"]
    return model


@pytest.mark.skipif(bool(no_w4a16()), reason=no_w4a16() or "there is a kernel")
def test_stock_vllm_answers_from_an_exported_checkpoint_as_transformers_does(
    exported, smollm2, tmp_path
):
    script = tmp_path / "stock.py"
    script.write_text(STOCK)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"VLLM_PLUGINS": ""}
    done = subprocess.run(
        [sys.executable, script, exported, PROMPT],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    found = json.loads(said.removeprefix("RESULT"))
    assert found["plugin"] == []
    assert found["quantization"] == "compressed-tensors"
    assert found["text"].strip()
    ids = torch.tensor([found["prompt"] + found["tokens"]])
    logprobs = {}
    with torch.inference_mode():
        for name, model in (
            ("same weights", plain_model(exported, smollm2)),
            ("unquantized", base_model(smollm2)),
        ):
            every = torch.log_softmax(model(ids).logits[0, :-1].float(), dim=-1)
            logprobs[name] = every.gather(1, ids[0, 1:, None])[:, 0]
    served = torch.tensor(found["logprobs"])
    assert (served - logprobs["same weights"]).abs().max() < 0.1
    assert (served - logprobs["unquantized"]).mean().abs() < 0.7
