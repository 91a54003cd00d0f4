"""Encoding speed: the encoder of `lbr encode` beside sentence-transformers' `encode`, on the same weights and texts.

    python -m benchmarks.encode TEXTS.jsonl[.gz] [--field answer] [--model FOLDER] [--limit 5000] [--repeat 3]

Without `--model` a random Llama of 8M parameters is made, with a tokenizer trained on the texts: speed does not depend
on what the weights are. The sentence-transformers side loads what `lbr export` writes. The sides take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import add_options, head, ratio, save, table, take_turns, title
from lbr_dist.inference.rows import read_texts

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

    from lbr_dist.export.folder import fold, write_sentence_transformers, write_tokenizer
    from lbr_dist.inference.encoder import PackedEncoder
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


def main() -> None:
    """Measure, and save a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--field")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--limit", type=int, default=5000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    add_options(parser)
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["RAYON_NUM_THREADS"] = "1"  # the tokenizer's threads
        torch.set_num_threads(1)
    limit = 40 if options.toy else options.limit
    texts = [text for _, text in islice(read_texts(options.texts, "passage", options.field), limit)]
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or Path(scratch) / "model"
        if options.model is None:
            make_model(model, texts)
        ours, theirs = both(model, Path(scratch) / "exported", options.tokens, options.device)
        sides: dict[str, Callable[[], Any]] = {"lbr": lambda: ours.encode(texts)}
        for size in (32, 128):
            sides[f"sentence-transformers, batch {size}"] = lambda size=size: theirs.encode(  # type: ignore[misc]
                texts, batch_size=size, show_progress_bar=False
            )
        agreement = (ours.encode(texts[:256]) * theirs.encode(texts[:256], show_progress_bar=False)).sum(1).min()
        times = take_turns(sides, options.repeat, options.device)
        lengths = np.array([len(s.x) for s in ours.samples(texts, "passage")]) + options.tokens
    parameters = sum(p.numel() for p in ours.model.parameters())
    command = f"python -m benchmarks.encode {options.texts.name} --limit {limit} --repeat {options.repeat}"
    about = head(command, options.device, toy=options.toy, texts=len(texts), parameters=parameters)
    rows = []
    for name, taken in times.items():
        middle, low, high = ratio(taken, times["lbr"])
        typical = statistics.median(taken)
        rows.append(
            {
                "encoder": name,
                "texts_s": f"{len(texts) / typical:,.0f}",
                "tokens_s": f"{lengths.sum() / typical:,.0f}",
                "ratio": f"{middle:.2f} ({low:.2f} to {high:.2f})",
            }
        )
    lines = title("`lbr encode` beside sentence-transformers", about)
    lines += [
        f"{len(texts):,} texts of {options.texts.name}, {lengths.mean():.1f} tokens on average; "
        f"{parameters / 1e6:.1f}M parameters. Medians of {options.repeat} rounds. "
        f"Lowest cosine between the two: {agreement:.6f}.",
        "",
    ]
    heads = {"encoder": "encoder", "texts_s": "texts/s", "tokens_s": "tokens/s", "ratio": "time over lbr's"}
    save(options.out, "encode", about, rows, lines + table(heads, rows))


if __name__ == "__main__":
    main()
