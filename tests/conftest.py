# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test folders share."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from demo.get_model import get_model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the SmolLM2-135M-Instruct checkpoint, downloaded and converted once."""
    return get_model()


WORDS = [f"w{i}" for i in range(90)]


@pytest.fixture(scope="session")
def save_model() -> Callable[..., None]:
    """Writes a random model of 64 hidden units into a folder; keywords are of its config."""

    def save(folder: Path, dtype: torch.dtype, kind: str = "llama", **config: Any) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        small = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small, **config))
        model.to(dtype).save_pretrained(folder)

    return save


@pytest.fixture(scope="session")
def tiny_model(
    tmp_path_factory: pytest.TempPathFactory,
    save_model: Callable[..., None],
    save_tokenizer: Callable[[Path], None],
) -> Path:
    """Llama of 3 blocks, tied output layer, fp16, with a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    save_model(
        folder,
        torch.float16,
        vocab_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def save_tokenizer() -> Callable[[Path], None]:
    """Writes a word-level tokenizer into a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<end>": 1} | {word: i + 2 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")

    def save(folder: Path) -> None:
        made.save_pretrained(folder)

    return save


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,000 words, some of them much more frequent than others."""
    generator = random.Random(0)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    weights = [1 / (i + 1) for i in range(len(WORDS))]
    file.write_text(" ".join(generator.choices(WORDS, weights, k=4000)))
    return file


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton kernels run: a GPU, or the CPU in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def gpu(device: torch.device) -> Iterator[ModuleType]:
    """flexquant_kernels.triton, interpreted where there is no GPU."""
    triton = pytest.importorskip("triton")
    # a launch would import it, and find functions replaced
    pytest.importorskip("triton.experimental.gluon")
    interpreted = device.type == "cpu"
    with pytest.MonkeyPatch.context() as patch:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = interpreted
            # sum and max were made for a GPU when triton was imported, which may be long ago
            for module in (triton.language, triton.language.standard) if interpreted else ():
                for name, value in list(vars(module).items()):
                    if isinstance(value, triton.JITFunction):
                        patch.setattr(module, name, triton.jit(value.fn))
            import flexquant_kernels.triton as kernels
        yield kernels


@pytest.fixture(params=["native", "arrays"])
def machinery(request, monkeypatch):
    """Policy `budget` and the averages by the native kernels, and in NumPy's arrays."""
    from flexquant_kernels import load_native, ops

    if request.param == "native":
        status = load_native()
        if not status.loaded:
            pytest.skip(status.reason)
    else:
        monkeypatch.setattr(ops, "native_status", lambda: ops.NativeStatus(False, "as asked"))
