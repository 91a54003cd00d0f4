"""Packed bins against padded batches: how many of the computed tokens are useful, and what that does to the speed.

    python -m benchmarks.packing --data DIR [--toy] [--out benchmarks/results]

DIR holds one `NAME.jsonl` or `NAME.jsonl.gz` per domain, rows `{id, question, answer}`. For each domain a byte-level
BPE tokenizer is trained and the rows are prepared, planned and loaded as in a stage 1 run (X = question, Y = answer).

Padded is what most trainers do: rows in random order, as many per batch as fit the same token budget when all are
padded to the longest. Both sides compute the same loss of the same samples with the same weights (checked), through the
same head on the target positions only: what differs is the layout and the attention that goes with it. Speed is useful
tokens over seconds of CPU time of one thread, forward and backward, so a busy machine shifts it little.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks import common
from benchmarks.dense import backward_of, collate, dense_loss, packed_loss
from lbr_dist.config import Recipe
from lbr_dist.data.loader import Loader
from lbr_dist.data.plan import open_data
from lbr_dist.data.plan.packing import assign_bins
from lbr_dist.data.record import Record
from lbr_dist.data.shard_writer import write_set
from lbr_dist.model.bottleneck import LbrModel
from lbr_dist.model.layout import PackedBatch, Sample
from lbr_dist.model.tokenizer import Tokenization

BUDGETS = (1024, 4096)
"""Tokens in one bin, or in one padded batch."""
TRAINED = 4096
"""The budget at which training is timed."""
LONGEST = 512
"""Most tokens of X, and of Y, in the timed training."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with one NAME.jsonl[.gz] per domain")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where the results go")
    parser.add_argument("--toy", action="store_true", help="a few rows and a tiny model: only shows that it runs")
    args = parser.parse_args()
    files = sorted(path for path in args.data.iterdir() if path.name.endswith((".jsonl", ".jsonl.gz")))
    if not files:
        parser.error(f"{args.data} holds no .jsonl or .jsonl.gz file")
    torch.set_num_threads(1)
    results: dict[str, Any] = {"hardware": hardware(), "date": date.today().isoformat(), "toy": args.toy, "domains": {}}
    for path in files:
        name = path.name.split(".")[0]
        with tempfile.TemporaryDirectory() as folder:
            results["domains"][name] = measure(path, Path(folder), args.toy)
        print(f"{name}: {json.dumps(results['domains'][name])}", flush=True)
    text = report(results)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "packing.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "packing.md").write_text(text)


def hardware() -> dict[str, Any]:
    return {"cpu": common.cpu_name(), "platform": platform.system(), "threads": 1, "torch": torch.__version__}


def measure(path: Path, folder: Path, toy: bool) -> dict[str, Any]:
    """Prepare one domain in `folder` and measure it."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = [json.loads(line) for line in text.decode().split("\n") if line.strip()]
    rows = rows[:200] if toy else rows
    make_model(folder / "model", rows, toy)
    tokenization = Tokenization.load(str(folder / "model"))
    records = [Record(str(number), question=row["question"], answer=row["answer"]) for number, row in enumerate(rows)]
    write_set(folder / "set", {"gl": records}, tokenization, name="set")
    found: dict[str, Any] = {"rows": len(rows), "budgets": {}, "training": {}}
    for budget in BUDGETS:
        found["budgets"][str(budget)] = efficiency(recipe_for(folder, budget), tokenization, budget)
    for bottleneck in (True, False):
        recipe = recipe_for(folder, 1024 if toy else TRAINED, enabled=bottleneck, global_batch=1 if toy else 4)
        found["training"]["bottleneck" if bottleneck else "plain"] = speed(recipe, tokenization, rounds=1 if toy else 3)
    return found


def make_model(folder: Path, rows: Sequence[dict[str, str]], toy: bool) -> None:
    """A small random Llama with a tokenizer trained on the domain."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    vocabulary = 500 if toy else 8000
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["question"] + "\n" + row["answer"] for row in rows), trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    hidden = 64 if toy else 192
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=2 if toy else 4,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 64,
            head_dim=32,
            max_position_embeddings=2 * TRAINED,
            tie_word_embeddings=True,
        )
    ).save_pretrained(folder)


def recipe_for(folder: Path, budget: int, *, enabled: bool = True, global_batch: int = 4) -> Recipe:
    longest = min(LONGEST, budget // 2 - 8)
    return Recipe.model_validate(
        {
            "stage": "generative",
            "output": str(folder / "out"),
            "model": {"path": str(folder / "model"), "attention": "sdpa"},
            "data": {
                "sets": [{"path": str(folder / "set")}],
                "bin_tokens": budget,
                "max_x_tokens": longest,
                "max_y_tokens": longest,
                "workers": 0,
            },
            "bottleneck": {"enabled": enabled},
            "batch": {"global_batch": global_batch},
            "duration": {"steps": 1},
        }
    )


def efficiency(recipe: Recipe, tokenization: Tokenization, budget: int) -> dict[str, Any]:
    """Share of useful tokens over one epoch: bins as planned, and random padded batches of the same budget."""
    plan, _ = open_data(recipe, tokenization)
    steps = range(plan.steps_per_epoch(0))
    lengths = [s.tokens for step in steps for micro in plan.step(step).micro_batches(0, 1) for s in micro.samples]
    start = time.process_time()
    assign_bins(np.array(lengths), budget)
    packing_s = time.process_time() - start
    random.Random(0).shuffle(lengths)
    padded = sum(len(batch) * max(batch) for batch in padded_batches(lengths, budget, key=lambda length: length))
    return {
        "median_tokens": statistics.median(lengths),
        "longest_tokens": max(lengths),
        "packed": round(plan.summary(0).efficiency, 4),
        "padded": round(sum(lengths) / padded, 4),
        "packing_s": round(packing_s, 3),
    }


def padded_batches(items: Sequence[Any], budget: int, key: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Consecutive items, as many as fit `budget` when all are padded to the longest."""
    batch: list[Any] = []
    longest = 0
    for item in items:
        if batch and (len(batch) + 1) * max(longest, key(item)) > budget:
            yield batch
            batch, longest = [], 0
        batch.append(item)
        longest = max(longest, key(item))
    yield batch


def speed(recipe: Recipe, tokenization: Tokenization, rounds: int) -> dict[str, Any]:
    """Useful tokens per CPU second of forward and backward over the samples of one step, packed and padded."""
    plan, readers = open_data(recipe, tokenization)
    ((step, local),) = Loader(plan, readers, tokenization, recipe)
    packed = [batch.packed for batch in local]
    samples = [sample for batch in packed for sample in unpack(batch)]
    random.Random(0).shuffle(samples)
    batches = padded_batches(samples, recipe.data.bin_tokens, key=lambda s: len(s.x) + s.z + len(s.y))
    padded = [collate(batch) for batch in batches]
    model = LbrModel.build(recipe)
    sides: dict[str, Callable[[], float]] = {
        "packed": lambda: backward_of(model, packed, packed_loss),
        "padded": lambda: backward_of(model, padded, dense_loss),
    }
    losses = {side: loss() for side, loss in sides.items()}
    if abs(losses["packed"] - losses["padded"]) > 1e-4 * losses["packed"]:
        raise RuntimeError(f"the two sides do not compute the same loss: {losses}")
    seconds = common.take_turns(sides, rounds)
    rates = {side: step.input_tokens / statistics.median(times) for side, times in seconds.items()}
    middle, low, high = common.ratio(seconds["padded"], seconds["packed"])
    return {
        "samples": len(samples),
        "tokens": step.input_tokens,
        "packed_tokens_per_s": round(rates["packed"]),
        "padded_tokens_per_s": round(rates["padded"]),
        "speedup": round(middle, 2),
        "speedup_range": [round(low, 2), round(high, 2)],
    }


def unpack(batch: PackedBatch) -> list[Sample]:
    """The samples of a packed stream."""
    tokens = batch.tokens_T.tolist()
    columns = (batch.starts_S, batch.x_len_S, batch.z_len_S, batch.y_len_S)
    return [
        Sample(tokens[start : start + x], z, tokens[start + x + z : start + x + z + y])
        for start, x, z, y in zip(*(column.tolist() for column in columns), strict=True)
    ]


def report(results: dict[str, Any]) -> str:
    """Markdown tables."""
    hardware, lines = results["hardware"], ["# Packed bins against padded batches", ""]
    lines += ["    python -m benchmarks.packing --data DIR", ""]
    lines += [f"{hardware['cpu']}, {hardware['threads']} thread, torch {hardware['torch']}, {results['date']}.", ""]
    if results["toy"]:
        lines += ["**Toy sizes: these figures mean nothing.**", ""]
    lines += ["Useful tokens over computed tokens, one epoch:", ""]
    lines += [
        "| domain | rows | median length | budget | packed | padded |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, domain in results["domains"].items():
        for budget, row in domain["budgets"].items():
            shares = f"{row['packed']:.2%} | {row['padded']:.2%}"
            lines.append(f"| {name} | {domain['rows']:,} | {row['median_tokens']:.0f} | {budget} | {shares} |")
    lines += ["", f"Training, forward and backward, at {TRAINED} tokens; useful tokens per second of CPU time:", ""]
    lines += ["| domain | attention | packed | padded | speed-up (range) |", "| --- | --- | ---: | ---: | ---: |"]
    for name, domain in results["domains"].items():
        for kind, row in domain["training"].items():
            low, high = row["speedup_range"]
            rates = f"{row['packed_tokens_per_s']:,} | {row['padded_tokens_per_s']:,}"
            lines.append(f"| {name} | {kind} | {rates} | {row['speedup']:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
