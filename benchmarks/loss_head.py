"""The head's cross entropy and its gradients: this project's chunks, torch's own, and all logits at once.

    python -m benchmarks.loss_head [--toy] [--tokens 512] [--rounds 5] [--device cpu|cuda]

`chunked` is the product's `linear_cross_entropy_sum` with the chunk that it chooses, `torch` is torch's own fused
`linear_cross_entropy` (2.13 and later; the row is empty without), `whole` is `cross_entropy` of all logits. Each makes
the gradients of hidden states and weight, which are checked against each other. Vocabulary and width are those of real
models. Sides take turns; memory is the peak over the level with the inputs in place, in MiB.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from lbr_dist.model.head import linear_cross_entropy_sum

HEADS = {"SmolLM2-135M": (49152, 576), "Qwen2.5-0.5B": (151936, 896)}
"""Vocabulary and width."""
COLUMNS = {
    **{"head": "head", "vocabulary": "vocabulary", "width": "width", "tokens": "tokens"},
    **{"chunked": "chunked, s", "torch": "torch / chunked", "whole": "whole / chunked"},
    **{"chunked_mib": "chunked, MiB", "torch_mib": "torch, MiB", "whole_mib": "whole, MiB"},
}
Side = Callable[[Tensor, Tensor, Tensor], Tensor]


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits at once."""
    return nn.functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")


def sides() -> dict[str, Side]:
    """What is compared; torch's own only where this version has it."""
    found: dict[str, Side] = {"chunked": linear_cross_entropy_sum, "whole": whole}
    own = getattr(nn.functional, "linear_cross_entropy", None)
    if own is not None:
        options = torch.nn.LinearCrossEntropyOptions(chunking_method="auto")
        found["torch"] = lambda *inputs: own(*inputs, reduction="sum", options=options)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_options(parser)
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 512, on a GPU 4096 and 16384")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    heads, tokens = HEADS, args.tokens or ([4096, 16384] if args.device == "cuda" else [512])
    if args.toy:
        heads, tokens, args.rounds = {"toy": (512, 32)}, [64], 1
    torch.set_num_threads(1)
    command = f"python -m benchmarks.loss_head{' --device cuda' if args.device == 'cuda' else ''}"
    about = common.head(command, args.device, rounds=args.rounds, toy=args.toy)
    rows = [measure(name, count, *heads[name], args) for name in heads for count in tokens]
    lines = common.title("The loss head", about)
    lines += ["Cross entropy with the gradients of hidden states and weight; medians of rounds.", ""]
    name = "loss_head_cuda" if args.device == "cuda" else "loss_head"
    common.save(args.out, name, about, rows, lines + common.table(COLUMNS, rows))


def measure(name: str, tokens: int, vocabulary: int, width: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row: times and memory of each side, after a check that they agree."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    hidden = torch.randn(tokens, width, dtype=dtype, device=args.device).requires_grad_()
    weight = (torch.randn(vocabulary, width, dtype=dtype, device=args.device) / width**0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=args.device)

    def gradients(side: Side) -> tuple[Tensor, ...]:
        return torch.autograd.grad(side(hidden, weight, targets), (hidden, weight))

    compared = sides()
    want = gradients(whole)
    row: dict[str, Any] = {"head": name, "vocabulary": vocabulary, "width": width, "tokens": tokens}
    for side, run in compared.items():
        for found, wanted in zip(gradients(run), want, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3 if dtype == torch.float32 else 5e-2, atol=1e-3)
        gc.collect()
        level = common.memory_level(args.device)
        gradients(run)
        row[f"{side}_mib"] = round(common.memory_peak(args.device) - level)
    turns = {side: partial(gradients, run) for side, run in compared.items()}
    seconds = common.take_turns(turns, args.rounds, args.device)
    row["chunked"] = round(statistics.median(seconds["chunked"]), 3)
    for side in compared.keys() - {"chunked"}:
        row[side] = round(common.ratio(seconds[side], seconds["chunked"])[0], 2)
    return {**row, "seconds": seconds}


if __name__ == "__main__":
    main()
