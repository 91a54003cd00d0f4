"""Fixtures shared by all tests: tiny random models of the real architectures, with a real tokenizer."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lbr_dist.config import Recipe

os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder is looked for on this machine alone, at once
os.environ["TQDM_DISABLE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny matrices; tests that start several ranks would fight over the cores

TINY_TEXTS = [
    "aspirin is a salicylate drug that relieves pain and fever",
    "the heart pumps blood through the vessels of the body",
    "def add(a, b): return a + b  # adds two numbers",
    "fever of unknown origin, rash, cough; diagnosis: measles",
    "What is the boiling point of water? 100 degrees Celsius.",
]


def make_tokenizer(folder: Path, *, bos: bool = False) -> None:
    """Write a byte-level BPE tokenizer of about 400 tokens; `bos`: its post-processor puts `<|bos|>` first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|pad|>", "<|bos|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TINY_TEXTS * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[("<|bos|>", 2)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>", bos_token="<|bos|>"
    ).save_pretrained(folder)


def make_model(
    folder: Path,
    family: str,
    *,
    tied: bool = True,
    hidden: int = 32,
    layers: int = 2,
    positions: int = 512,
    seed: int = 0,
) -> Path:
    """Write a tiny random model (grouped-query attention, heads of 8) of the real class, with its tokenizer."""
    import torch
    import transformers

    config = {
        "vocab_size": 416,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 8,
        "num_key_value_heads": hidden // 16,
        "head_dim": 8,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": 2,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config))
    torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def _log_as_imported() -> None:
    """A run that an earlier test trained in this process has left its handlers at the log."""
    log = logging.getLogger("lbr")
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.propagate = True
    log.setLevel(logging.NOTSET)


@pytest.fixture
def a_terminal() -> Iterator[None]:
    """SIGHUP is not ignored, as it may be where the tests run (nohup)."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory: `tiny_model_dir("qwen3", tied=True)`, or another family, gives a folder, made once per session."""
    made: dict[tuple[str, bool], Path] = {}

    def factory(family: str = "llama", tied: bool = True) -> Path:
        key = (family, tied)
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(f"{family}-{tied}"), family, tied=tied)
        return made[key]

    return factory


@pytest.fixture(scope="session")
def tiny_lbr(tiny_model_dir: Callable[..., Path]) -> Callable[..., Any]:
    """Factory: a fresh `LbrModel` on a tiny backbone, `tiny_lbr("qwen3", tied=False, tokens=2, model={...})`."""
    from lbr_dist.model.bottleneck import LbrModel
    from lbr_dist.recipes import parse_recipe

    def factory(
        family: str = "llama", tied: bool = True, tokens: int = 2, model: dict[str, Any] | None = None
    ) -> LbrModel:
        raw = {
            "stage": "generative",
            "output": "unused",
            "model": {"path": str(tiny_model_dir(family, tied)), **(model or {})},
            "data": {"sets": [{"path": "unused"}], "max_x_tokens": 200, "max_y_tokens": 200},
            "bottleneck": {"tokens": tokens} if tokens else {"enabled": False},
            "batch": {"global_batch": 1},
            "duration": {"steps": 1},
        }
        return LbrModel.build(parse_recipe(raw, "test"))

    return factory


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Of a run in `tmp_path / "run"`, whose model and data are not there."""
    from lbr_dist.recipes import parse_recipe

    raw = {
        "stage": "generative",
        "output": str(tmp_path / "run"),
        "model": {"path": "m"},
        "data": {"sets": [{"path": "d"}], "max_x_tokens": 8, "max_y_tokens": 8, "bin_tokens": 32},
        "batch": {"global_batch": 1},
        "duration": {"steps": 1},
    }
    return parse_recipe(raw, "test")
