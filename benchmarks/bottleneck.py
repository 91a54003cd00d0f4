"""What learning through the bottleneck costs a step: over plain SFT, and over plain pretraining on the same text.

    python -m benchmarks.bottleneck [--toy]                                       # CPU, one thread
    python -m benchmarks.bottleneck --shape 135m --shape 1.5b --attention varlen flex sdpa   # GPU

A step is forward, backward and AdamW over the same samples. The pairs, by length of the whole sample:

    SFT       [X ; Y], Y sees X                against   IB-GL            [X ; Z ; Y], Y sees Z only
    PT        D, every token predicted         against   reconstruction   [D ; Z ; D], the second D sees Z only

each once packed (this project) and once dense (`benchmarks/dense.py`: a padded batch through transformers' SDPA, the
bottleneck as a mask [B, 1, L, L]). |X| = |Y| = |D|, R = 500 as in the paper; random tokens. The row `medicine`
has the lengths of real question-answer rows instead (`benchmarks/lengths.py`), padded to the longest of a batch on the
dense side.
Packed and dense compute the same loss (checked). What a backend derives from a batch's lengths is part of each step.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import lengths
from benchmarks.common import SHAPES, add_options, head, random_model, ratio, save, table, take_turns, title
from benchmarks.dense import collate, dense_loss, packed_loss
from lbr_dist.config import Bottleneck
from lbr_dist.model.bottleneck import LbrModel
from lbr_dist.model.layout import PackedBatch, Sample, pack

LENGTHS = (512, 1024, 2048, 4096, 8192)
RATIOS = {
    "ib": ("packed ib", "packed sft"),
    "rec": ("packed rec", "packed pt"),
    "dense_ib": ("dense ib", "dense sft"),
    "dense_rec": ("dense rec", "dense pt"),
    "dense_over_packed_ib": ("dense ib", "packed ib"),
    "dense_over_packed_rec": ("dense rec", "packed rec"),
}
COLUMNS = {
    **{"tokens": "tokens a sample", "samples": "samples", "z": "mean Z"},
    **{"ib": "IB-GL / SFT", "rec": "reconstruction / PT", "dense_ib": "dense: IB-GL / SFT"},
    **{"dense_rec": "dense: reconstruction / PT", "dense_over_packed_ib": "IB-GL: dense / packed"},
    "dense_over_packed_rec": "reconstruction: dense / packed",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: cpu, or 135m on a GPU")
    parser.add_argument("--attention", nargs="+", default=["auto"], choices=["auto", "varlen", "flex", "sdpa"])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens a sample")
    # the dense side pads real rows to seven times as many: on 80 GB no more than 8,192 for 135m, 2,048 for 1.5b
    parser.add_argument("--tokens", type=int, default=1024 if device == "cpu" else 8192, help="least tokens of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"])
    args = parser.parse_args()
    if args.toy:
        args.shape, args.lengths, args.tokens, args.rounds = ["toy"], [32], 64, 1
    torch.set_num_threads(1)
    for shape in args.shape or ["cpu" if args.device == "cpu" else "135m"]:
        for attention in args.attention:
            measure_shape(shape, attention, args)


def measure_shape(shape: str, attention: str, args: argparse.Namespace) -> None:
    """One table."""
    dtype = "float32" if args.device == "cpu" else "bfloat16"
    model = random_model(shape, attention_setting=attention, dtype=dtype, device=args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    rows: list[dict[str, Any]] = []
    command = "python -m benchmarks.bottleneck"
    name = "bottleneck"
    if args.device == "cuda":
        command += f" --shape {shape} --attention {attention}"
        name += f"_{shape}_{attention}_cuda"
    about = head(command, args.device, shape=shape, attention=attention, dtype=dtype, rounds=args.rounds, toy=args.toy)
    lines = title("Step time through the bottleneck", about)
    lines += [f"Model `{shape}`, {dtype}, attention {attention}; medians of rounds (all in the JSON).", ""]
    for row in ["medicine", *args.lengths]:
        samples = real_samples(args.tokens) if row == "medicine" else even_samples(row, args.tokens)
        rows.append({"tokens": row, **measure(model, optimizer, samples, args.rounds, args.device)})
        save(args.out, name, about, rows, [*lines, *table(COLUMNS, rows)])


Pair = tuple[list[Sample], list[Sample]]
"""The same texts without and with the bottleneck."""


def measure(
    model: LbrModel, optimizer: torch.optim.Optimizer, samples: dict[str, Pair], rounds: int, device: str
) -> dict[str, Any]:
    """Times of the eight sides on one set of samples."""
    losses: dict[str, Callable[[], Tensor]] = {}
    long = samples["sft"][1][0].z > 2
    for (plain, hidden), (without, through) in zip((("sft", "ib"), ("pt", "rec")), samples.values(), strict=True):
        for side, chosen in ((plain, without), (hidden, through)):
            losses[f"packed {side}"] = packed_side(model, chosen, hide_x=side == hidden, device=device)
            losses[f"dense {side}"] = dense_side(model, chosen, device)
    with torch.no_grad():
        values = {side: float(loss()) for side, loss in losses.items()}
    for side, value in values.items():
        other = values[side.replace("dense", "packed")]
        if abs(value - other) > (1e-4 if device == "cpu" else 2e-2) * other:
            raise RuntimeError(f"{side}: loss {value}, packed {other}")

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    seconds = take_turns({side: step(losses[side]) for side in sorted(losses)}, rounds, device)
    packed = {side: step(losses[side]) for side in ("packed sft", "packed ib", "packed pt", "packed rec")}
    more = take_turns(packed, rounds if long else 4 * rounds, device)  # the goals are about a few percent
    through = samples["sft"][1]
    found: dict[str, Any] = {"samples": len(through), "z": round(sum(s.z for s in through) / len(through), 2)}
    ratios = {name: ratio(seconds[slow], seconds[fast]) for name, (slow, fast) in RATIOS.items()}
    ratios |= {name: ratio(more[slow], more[fast]) for name, (slow, fast) in RATIOS.items() if name in ("ib", "rec")}
    found |= {name: round(middle, 3) for name, (middle, _, _) in ratios.items()}
    found["ranges"] = {name: [round(low, 3), round(high, 3)] for name, (_, low, high) in ratios.items()}
    found["seconds"] = {side: [round(value, 4) for value in values] for side, values in (seconds | more).items()}
    return found


def packed_side(model: LbrModel, samples: Sequence[Sample], *, hide_x: bool, device: str) -> Callable[[], Tensor]:
    """One packed stream; the loader makes it ahead of time, the backend's own tables are made in the step."""
    batch: PackedBatch = pack(samples, bottleneck_vectors=8, hide_x=hide_x).to(device)
    return partial(packed_loss, model, batch)


def dense_side(model: LbrModel, samples: Sequence[Sample], device: str) -> Callable[[], Tensor]:
    """One padded batch, made ahead of time."""
    batch = collate(samples, device)
    return partial(dense_loss, model, batch)


def even_samples(tokens: int, least: int) -> dict[str, Pair]:
    """As many samples of `tokens` tokens as make `least`."""
    x = tokens // 2
    return make_samples([(x, tokens - x - Bottleneck().length(x))] * max(1, least // tokens))


def real_samples(least: int) -> dict[str, Pair]:
    """Medicine rows, `least` tokens in all; the reconstruction is that of the answers."""
    chosen: list[tuple[int, int]] = []
    for pair in lengths.load("medicine"):
        if sum(map(sum, chosen)) >= least:
            break
        chosen.append(pair)
    return make_samples(chosen)


def make_samples(pairs: Sequence[tuple[int, int]]) -> dict[str, Pair]:
    """Random tokens of the given (|X|, |Y|); documents are as long as Y."""
    draw = random.Random(0)
    z = Bottleneck().length

    def tokens(count: int) -> list[int]:
        return [draw.randrange(1, 500) for _ in range(count)]

    def both() -> Iterator[tuple[list[int], list[int]]]:
        for x, y in pairs:
            yield tokens(x), tokens(y)

    texts = list(both())
    return {
        "sft": ([Sample(x, 0, y) for x, y in texts], [Sample(x, z(len(x)), y) for x, y in texts]),
        "pt": ([Sample(y[:1], 0, y[1:]) for _, y in texts], [Sample(y, z(len(y)), y) for _, y in texts]),
    }


if __name__ == "__main__":
    main()
