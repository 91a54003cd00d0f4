"""A contrastive step side by side with sentence-transformers: pairs per second and peak memory.

    python -m benchmarks.contrastive [--toy] [--batch 512] [--micro-tokens 2048] [--rounds 3] [--device cpu|cuda]
    python -m benchmarks.contrastive --sides ours "ours plain" --rounds 9     (only these, in a file of their own)

All sides take the same batch (pairs with the lengths of the medicine rows, see lengths.py), start from the same
weights, pool the last token, and compute the same loss, which is checked. Timed are forward and backward, without
tokenizing and without the optimizer, which are alike.

    ours            packed micro-batches, cached embeddings (GradCache), as in a stage 2 run
    ours plain      the same micro-batches with all activations kept: what GradCache costs is the ratio to this
    st cached       CachedMultipleNegativesRankingLoss, mini-batches of 32 texts (its default)
    st cached N     the same with mini-batches of as many tokens as ours
    st plain        MultipleNegativesRankingLoss: one batch, padded, all activations kept

On a CPU, time is CPU time of one thread, the sides taking turns; memory is the peak over the level with model and batch
in place, each side in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common, lengths
from lbr_dist.config import Contrastive
from lbr_dist.data.assemble import LocalBatch
from lbr_dist.data.plan.base import SIDES
from lbr_dist.data.plan.packing import assign_bins
from lbr_dist.model.batching import pad
from lbr_dist.model.bottleneck import LbrModel
from lbr_dist.model.layout import Sample, pack
from lbr_dist.objectives.contrastive import contrastive_loss
from lbr_dist.recipes import parse_recipe
from lbr_dist.training.gradcache import prepare

VOCABULARY = 8192
SETTINGS = Contrastive(pooling="last", mask_same_answer=False, temperature=0.05)
SIDES_OF = ("ours", "ours plain", "st cached", "st cached N", "st plain")
Step = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512, help="pairs")
    parser.add_argument("--micro-tokens", type=int, default=2048, help="tokens in one micro-batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES_OF, default=list(SIDES_OF), help="the sides to compare")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    common.add_options(parser)
    args = parser.parse_args()
    if args.toy:
        args.batch, args.rounds, args.hidden, args.layers, args.micro_tokens = 16, 1, 64, 2, 256
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), args.hidden, args.layers)
        job = (folder, args.batch, args.micro_tokens, args.device)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            memory = {side: pool.apply(_memory, (side, *job)) for side in args.sides}
            found = pool.apply(_times, (*job, args.sides, args.rounds))
    report(args, found, memory)


def report(args: argparse.Namespace, found: dict[str, Any], memory: dict[str, float]) -> None:
    """Print and write the table."""
    seconds, best = found["seconds"], {}
    rows = []
    for side in args.sides:
        best[side] = statistics.median(seconds[side])
        rows.append(
            {
                "side": side,
                "pairs_per_s": f"{args.batch / best[side]:.1f}",
                "memory_mib": f"{memory[side]:,.0f}",
                "loss": f"{found['losses'][side]:.5f}",
            }
        )
    part = [] if set(args.sides) == set(SIDES_OF) else args.sides
    chosen = " ".join([" --sides", *(f'"{side}"' for side in part)]) if part else ""
    about = common.head(
        f"python -m benchmarks.contrastive{chosen}",
        args.device,
        toy=args.toy,
        batch=args.batch,
        micro_tokens=args.micro_tokens,
        hidden=args.hidden,
        layers=args.layers,
        tokens=found["tokens"],
        padded_tokens=found["padded"],
        seconds=seconds,
        memory_mib=memory,
        losses=found["losses"],
    )
    lines = common.title("A contrastive step, and sentence-transformers'", about)
    lines += [
        f"{args.batch} pairs of the medicine rows' lengths, {found['tokens']:,} tokens ({found['padded']:,} if padded "
        f"to the longest); a Llama of {args.layers} layers, width {args.hidden}; micro-batches of {args.micro_tokens} "
        f"tokens. Median of {args.rounds} rounds.",
        "",
        *common.table({"side": "", "pairs_per_s": "pairs/s", "memory_mib": "peak memory, MiB", "loss": "loss"}, rows),
        "",
    ]
    for slow, fast, what in (
        ("st cached", "ours", "ours over CachedMultipleNegativesRankingLoss (goal 1.5)"),
        ("st cached N", "ours", "ours over the same with mini-batches by tokens"),
        ("st plain", "ours plain", "ours plain over MultipleNegativesRankingLoss"),
        ("ours", "ours plain", "time of the cached step over the plain one (goal 1.35 at most)"),
    ):
        if slow in seconds and fast in seconds:
            middle, low, high = common.ratio(seconds[slow], seconds[fast])
            lines.append(f"- {what}: {middle:.2f} ({low:.2f} to {high:.2f})")
    name = "_".join(["contrastive", *part]).replace(" ", "_") + ("_cuda" if args.device == "cuda" else "")
    if args.toy:
        print("\n".join(lines))
    else:
        common.save(args.out, name, about, rows, lines)


def make_model(folder: Path, hidden: int, layers: int) -> None:
    """A random Llama with a tokenizer that sentence-transformers can load."""
    import transformers
    from tokenizers import Tokenizer, models

    vocabulary = {f"<{number}>": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<0>", eos_token="<1>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(settings).save_pretrained(folder)


def texts(batch: int) -> tuple[list[list[int]], list[list[int]]]:
    """Queries and passages: random tokens of real lengths."""
    rng = np.random.default_rng(0)
    pairs = lengths.load("medicine")[:batch]
    draw = lambda count: rng.integers(2, VOCABULARY, max(1, count)).tolist()  # noqa: E731
    return [draw(x) for x, _ in pairs], [draw(y - 1) for _, y in pairs]


def make_side(side: str, folder: str, batch: int, micro_tokens: int, device: str) -> Step:
    """One side's step: forward and backward; returns the loss."""
    torch.set_num_threads(1)
    return (ours if side.startswith("ours") else theirs)(side, folder, batch, micro_tokens, device)


def ours(side: str, folder: str, batch: int, micro_tokens: int, device: str) -> Step:
    """Packed micro-batches of our model."""
    recipe = parse_recipe(
        {
            "stage": "contrastive",
            "output": "unused",
            "model": {"path": folder},
            "data": {"sets": [{"path": "unused"}]},
            "bottleneck": {"enabled": False},
            "contrastive": {"pooling": "last"},
            "batch": {"global_batch": batch},
            "duration": {"steps": 1},
        },
        "benchmark",
    )
    model = LbrModel.build(recipe).to(device).train()
    batches = [micro.to(device) for micro in micro_batches(*texts(batch), micro_tokens)]

    def step() -> float:
        closures, result = prepare(
            batches,
            lambda micro: model(micro.packed, "embed", SETTINGS.pooling),
            lambda embeddings: contrastive_loss(embeddings, batches, SETTINGS),
            cache=side == "ours",
        )
        for closure in closures:
            closure().backward()
        model.zero_grad()
        return float(result()[0])

    return step


def micro_batches(queries: list[list[int]], passages: list[list[int]], micro_tokens: int) -> list[LocalBatch]:
    """The texts packed as the plan packs them."""
    everything = queries + passages
    bin_N, count = assign_bins(np.array([len(text) for text in everything]), micro_tokens)
    made = []
    for number in range(count):
        rows = np.flatnonzero(bin_N == number).tolist()
        packed = pack([Sample(everything[row], 0) for row in rows], bottleneck_vectors=0, hide_x=False)
        pair_S = torch.tensor([row % len(queries) for row in rows])
        side_S = torch.tensor([SIDES["query" if row < len(queries) else "passage"] for row in rows])
        known = torch.empty((0, 2), dtype=torch.int64)
        ids = [str(pair) for pair in pair_S.tolist()]
        made.append(LocalBatch(packed, [None] * len(rows), ids, side_S, pair_S, pair_S, pair_S, known))  # type: ignore[list-item]
    return made


def theirs(side: str, folder: str, batch: int, micro_tokens: int, device: str) -> Step:
    """sentence-transformers with one of its two losses."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses, modules

    transformer = modules.Transformer(folder)
    pooling = modules.Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    model = SentenceTransformer(modules=[transformer, pooling], device=device).train()
    scale = 1 / SETTINGS.temperature
    loss: Any
    if side == "st plain":
        loss = losses.MultipleNegativesRankingLoss(model, scale=scale)
    else:
        tokens = micro_tokens if side == "st cached N" else None
        loss = losses.CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_num_tokens=tokens)
    features = [padded(part, device) for part in texts(batch)]
    labels = torch.zeros(batch, device=device)

    def step() -> float:
        value = loss([dict(part) for part in features], labels)
        value.backward()
        model.zero_grad()
        return float(value.detach())

    return step


def padded(part: list[list[int]], device: str) -> dict[str, Tensor]:
    """A batch as its collator makes it: padded to the longest."""
    ids, mask = pad(part, device)
    return {"input_ids": ids, "attention_mask": mask}


def _times(folder: str, batch: int, micro_tokens: int, device: str, sides: list[str], rounds: int) -> dict[str, Any]:
    steps = {side: make_side(side, folder, batch, micro_tokens, device) for side in sides}
    found: dict[str, float] = {}

    def keep(side: str) -> None:
        found[side] = steps[side]()

    seconds = common.take_turns({side: partial(keep, side) for side in sides}, rounds, device)
    if max(found.values()) - min(found.values()) > 1e-3:
        raise SystemExit(f"the sides compute different losses: {found}")
    parts = texts(batch)
    tokens = sum(len(text) for part in parts for text in part)
    full = sum(len(part) * max(map(len, part)) for part in parts)
    return {"seconds": seconds, "losses": found, "tokens": tokens, "padded": full}


def _memory(side: str, folder: str, batch: int, micro_tokens: int, device: str) -> float:
    """MiB at the peak of a step above what model and batch take."""
    make_side(side, folder, 4, micro_tokens, device)()  # loads kernels, allocates workspaces
    step = make_side(side, folder, batch, micro_tokens, device)
    level = common.memory_level(device)
    step()
    return common.memory_peak(device) - level


if __name__ == "__main__":
    main()
