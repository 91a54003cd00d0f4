"""Training on packed bins against the three usual ways to pad, on mixtures of real lengths.

    python -m benchmarks.padding [--toy]          # CPU, one thread; on a GPU when there is one
    python -m benchmarks.padding --shape 135m

benchmarks/packing.py compares with padded batches that fit a token budget, one domain at a time. Here packing meets

    rows      rows in random order, a fixed number per batch, padded to the longest of the batch: the usual trainer
    budget    rows in random order, as many per batch as fit the bin's tokens when padded
    sorted    rows sorted by length before they are batched to the budget: least padding, but no longer random order

A fixed number of rows must fit in memory at their longest, so it is what fits the bin when every row is as long as the
longest of the source. All sides train on the same samples, forward and backward, through the bottleneck, with the same
loss head (equal losses are checked); sources are as in benchmarks/lengths.py, `mixture` is medicine, code and the raw
text of medicine and chemistry in equal numbers of rows (raw text as reconstruction, X = Y).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import lengths
from benchmarks.common import SHAPES, add_options, head, random_model, ratio, save, table, take_turns, title
from benchmarks.dense import backward_of, collate, dense_loss, packed_loss
from lbr_dist.config import Bottleneck
from lbr_dist.data.plan.packing import best_fit
from lbr_dist.model.bottleneck import LbrModel
from lbr_dist.model.layout import Sample, pack

SOURCES = {
    "medicine": ("medicine",),
    "code": ("code",),
    "mixture": ("medicine", "code", "medicine.corpus", "chemistry.corpus"),
}
PADDED = ("rows", "budget", "sorted")
COLUMNS = {
    **{"source": "source", "samples": "samples", "median": "median tokens", "longest": "longest"},
    **{"useful_rows": "useful: rows", "useful_budget": "budget", "useful_sorted": "sorted"},
    **{"rows": "packed over rows", "budget": "over budget", "sorted": "over sorted"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--shape", choices=SHAPES, default="cpu" if device == "cpu" else "135m")
    parser.add_argument("--bin-tokens", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=60 if device == "cpu" else 1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"])
    args = parser.parse_args()
    if args.toy:
        args.shape, args.samples, args.rounds, args.bin_tokens = "toy", 8, 1, 1024
    torch.set_num_threads(1)
    dtype = "float32" if args.device == "cpu" else "bfloat16"
    model = random_model(args.shape, dtype=dtype, device=args.device)
    about = head("python -m benchmarks.padding", args.device, shape=args.shape, bin_tokens=args.bin_tokens)
    about |= {"rounds": args.rounds, "toy": args.toy}
    rows: list[dict[str, Any]] = []
    for source, names in SOURCES.items():
        rows.append({"source": source, **measure(model, make_samples(names, args.samples), args)})
        lines = title("Packed against padded training", about)
        lines += [f"Model `{args.shape}`, bins of {args.bin_tokens} tokens, medians of {args.rounds} rounds.", ""]
        lines += [
            "`useful`: share of computed tokens that are no padding (packed: all); then packed's speed over each.",
            "",
        ]
        save(
            args.out,
            "padding" + ("_cuda" if args.device == "cuda" else ""),
            about,
            rows,
            [*lines, *table(COLUMNS, rows)],
        )


def make_samples(names: Sequence[str], count: int) -> list[Sample]:
    """Samples of the sources in equal numbers, in random order; random tokens."""
    draw = random.Random(0)
    pairs = [pair for name in names for pair in lengths.load(name)[: count // len(names)]]
    draw.shuffle(pairs)
    made = []
    for x, y in pairs:
        target = [draw.randrange(1, 500) for _ in range(y)]
        question = [draw.randrange(1, 500) for _ in range(x)] or target
        made.append(Sample(question, Bottleneck().length(len(question)), target))
    return made


def tokens(sample: Sample) -> int:
    """Length of a sample."""
    return len(sample.x) + sample.z + len(sample.y)


def by_budget(samples: Sequence[Sample], budget: int) -> list[list[Sample]]:
    """Consecutive samples, as many as fit when padded to the longest."""
    batches: list[list[Sample]] = [[]]
    for sample in samples:
        grown = [*batches[-1], sample]
        if batches[-1] and len(grown) * max(map(tokens, grown)) > budget:
            batches.append([sample])
        else:
            batches[-1] = grown
    return batches


def measure(model: LbrModel, samples: list[Sample], args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    longest = max(map(tokens, samples))
    count = max(1, args.bin_tokens // longest)
    bins = [[samples[i] for i in members] for members in best_fit(np.array([*map(tokens, samples)]), args.bin_tokens)]
    ways = {
        "rows": [samples[i : i + count] for i in range(0, len(samples), count)],
        "budget": by_budget(samples, args.bin_tokens),
        "sorted": by_budget(sorted(samples, key=tokens), args.bin_tokens),
    }
    streams = [pack(members, bottleneck_vectors=8, hide_x=True).to(args.device) for members in bins]
    padded = {way: [collate(batch, args.device) for batch in batches] for way, batches in ways.items()}

    sides: dict[str, Callable[[], float]] = {"packed": partial(backward_of, model, streams, packed_loss)}
    sides |= {way: partial(backward_of, model, batches, dense_loss) for way, batches in padded.items()}
    losses = {side: loss() for side, loss in sides.items()}
    tolerance = 1e-4 if args.device == "cpu" else 2e-2
    if any(abs(loss - losses["packed"]) > tolerance * losses["packed"] for loss in losses.values()):
        raise RuntimeError(f"the sides do not compute the same loss: {losses}")
    seconds = take_turns(sides, args.rounds, args.device)
    useful = sum(map(tokens, samples))
    shares = {way: useful / sum(len(b) * max(map(tokens, b)) for b in batches) for way, batches in ways.items()}
    found: dict[str, Any] = {"samples": len(samples), "median": int(np.median([*map(tokens, samples)]))}
    found |= {"longest": longest, **{f"useful_{side}": f"{share:.1%}" for side, share in shares.items()}}
    for way in PADDED:
        middle, low, high = ratio(seconds[way], seconds["packed"])
        found[way] = f"{middle:.2f} ({low:.2f} to {high:.2f})"
    return found | {"seconds": {side: [round(value, 4) for value in times] for side, times in seconds.items()}}


if __name__ == "__main__":
    main()
