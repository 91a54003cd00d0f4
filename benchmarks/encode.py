"""Encoding speed: the encoder of `lbr encode` beside sentence-transformers' `encode`, on the same weights and texts.

    python -m benchmarks.encode TEXTS.jsonl[.gz] [--field answer] [--model FOLDER] [--limit 5000] [--repeat 3]

Without `--model` a random Llama of 10M parameters is made, with a tokenizer trained on the texts: speed does not depend
on what the weights are. The sentence-transformers side loads what `lbr export` writes. Rounds alternate between the two
and the best of each counts; on a CPU, seconds are CPU seconds of one thread, so a busy machine shifts them little.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lbr_dist.rows import read_texts

MAX_TOKENS = 256


def make_model(folder: Path, texts: list[str]) -> None:
    """A random Llama: 8 layers, 256 wide, 8,000 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<eos>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2 * MAX_TOKENS,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def both(model: Path, exported: Path, tokens: int, device: str) -> tuple[Any, Any]:
    """Our encoder and the sentence-transformers model of the same weights."""
    from sentence_transformers import SentenceTransformer

    from lbr_dist.evaluation.encoder import PackedEncoder
    from lbr_dist.export_folder import fold, write_sentence_transformers, write_tokenizer
    from lbr_dist.model.bottleneck import LbrModel
    from lbr_dist.model.tokenizer import Tokenization
    from lbr_dist.recipes import parse_recipe

    recipe = parse_recipe(
        {
            "stage": "contrastive",
            "output": "-",
            "model": {"path": str(model)},
            "bottleneck": {"tokens": tokens},
            "data": {"sets": [{"path": "-"}], "max_x_tokens": MAX_TOKENS},
            "batch": {"global_batch": 1},
            "duration": {"steps": 1},
        },
        "benchmark",
    )
    built = LbrModel.build(recipe).to(device)
    ours = PackedEncoder(built, Tokenization.load(str(model)), recipe, "lbr")
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    exported.mkdir()
    assert built.z is not None
    fold(plain, built.z.detach(), write_tokenizer(model, exported, vectors=tokens, max_tokens=MAX_TOKENS + tokens))
    plain.save_pretrained(exported)
    write_sentence_transformers(
        exported,
        width=plain.config.hidden_size,
        pooling="bottleneck",
        max_tokens=MAX_TOKENS + tokens,
        query_instruction="",
        passage_instruction="",
    )
    return ours, SentenceTransformer(str(exported), device=device)


def seconds(function: Callable[[], Any], device: str) -> float:
    """Time of one call: of the processor's work on a CPU, by the clock elsewhere."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    function()
    return clock() - began


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--field")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--limit", type=int, default=5000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["RAYON_NUM_THREADS"] = "1"  # the tokenizer's threads
        torch.set_num_threads(1)
    texts = [text for _, text in islice(read_texts(arguments.texts, "passage", arguments.field), arguments.limit)]
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or Path(scratch) / "model"
        if arguments.model is None:
            make_model(model, texts)
        ours, theirs = both(model, Path(scratch) / "exported", arguments.tokens, arguments.device)
        rows: dict[str, Callable[[], Any]] = {"lbr": lambda: ours.encode(texts)}
        for size in (32, 128):
            rows[f"sentence-transformers, batch {size}"] = lambda size=size: theirs.encode(  # type: ignore[misc]
                texts, batch_size=size, show_progress_bar=False
            )
        agreement = (ours.encode(texts[:256]) * theirs.encode(texts[:256], show_progress_bar=False)).sum(1).min()
        times: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(arguments.repeat):
            for name, function in rows.items():
                times[name].append(seconds(function, arguments.device))
        lengths = np.array([len(s.x) for s in ours.samples(texts, "passage")]) + arguments.tokens
    print(f"{len(texts):,} texts of {arguments.texts.name}, {lengths.mean():.1f} tokens on average", end=", ")
    print(f"{sum(p.numel() for p in ours.model.parameters()) / 1e6:.1f}M parameters, {arguments.device}", end=", ")
    print(f"{torch.get_num_threads()} thread, {platform.machine()}, torch {torch.__version__}.")
    print(f"Lowest cosine between the two: {agreement:.6f}.\n")
    print("| encoder | texts/s | tokens/s | time relative to lbr |\n| --- | ---: | ---: | ---: |")
    base = min(times["lbr"])
    for name, taken in times.items():
        best = min(taken)
        print(f"| {name} | {len(texts) / best:,.0f} | {lengths.sum() / best:,.0f} | {best / base:.2f} |")


if __name__ == "__main__":
    main()
