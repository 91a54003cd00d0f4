"""InfoNCE in strips against the whole score matrix: time, peak extra memory and error, by batch size.

    python -m benchmarks.infonce [--toy] [--sizes 1024 ...] [--width 512] [--out benchmarks/results]
    python -m benchmarks.infonce --huge [--rows 1024]

Both sides compute the same loss, forward and backward, from the same float32 embeddings, with the same masks (record
and answer). "Whole" is what most trainers do: normalise, one [B, B] matrix of scores, masks of that shape, cross
entropy, autograd. `--two-way` compares the symmetric losses. On CPU, time is CPU time of one thread (the best of
several turns, the two sides taking turns), so that a busy machine shifts it little; memory is the
process's peak over the level with the inputs in place, each side in a process of its own. On CUDA: time of the wall
with the device idle before and after, memory by the allocator. The error is that of the gradient relative to its norm,
against the whole matrix and, up to 4,096, of both against float64.

`--huge` measures only the memory of 65,536 x 65,536 x 1,536, in strips. The peak does not depend on how many strips
there are, so that `--rows` queries against 65,536 passages show it in minutes; what the other queries' gradient would
add is computed and added. `--rows 65536` runs it whole (half an hour of CPU time, seconds on a GPU).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks import common
from lbr_dist.objectives.gather import Ranks
from lbr_dist.objectives.infonce import info_nce
from lbr_dist.objectives.strips import StripLoss, Strips

TEMPERATURE = 0.1
FLOAT64_LIMIT = 4096
WHOLE_CPU, WHOLE_CUDA = 16384, 65536
"""Largest batch of which the whole matrix is made."""
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--width", type=int, default=512, help="dimensions of an embedding")
    parser.add_argument("--huge", action="store_true", help="only the memory of 65,536 pairs of width 1,536")
    parser.add_argument("--rows", type=int, default=1024, help="queries that --huge runs")
    parser.add_argument("--two-way", action="store_true", help="the symmetric loss")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where the results go")
    parser.add_argument("--toy", action="store_true", help="small sizes, nothing written: only shows that it runs")
    args = parser.parse_args()
    if args.toy:
        args.sizes, args.width = [256, 512], 32
    if args.huge:
        size, width, queries = (1024, 64, 128) if args.toy else (65536, 1536, args.rows)
        huge(size, width, queries, args)
        return
    rows, head = [], _head(args)
    for size in args.sizes:
        # the whole matrix takes 4 * 3 * size^2 bytes and more: 13 GiB at 32,768
        sides = ("strips", "whole") if size <= (WHOLE_CUDA if args.device == "cuda" else WHOLE_CPU) else ("strips",)
        rows.append(measure(size, args.width, args.device, args.two_way, sides))
        if not args.toy:
            name = "infonce" + ("_two_way" if args.two_way else "") + ("_cuda" if args.device == "cuda" else "")
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"{name}.json").write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
            (args.out / f"{name}.md").write_text(markdown(head, rows) + "\n")
    print(markdown(head, rows))


def measure(size: int, width: int, device: str, two_way: bool, sides: tuple[str, ...] = ("strips", "whole")) -> dict:
    """One row of the table."""
    row: dict[str, Any] = {"batch": size, "width": width}
    with _apart(device) as call:
        for side in sides:
            row[f"{side}_mib"] = call(_memory, (side, size, width, device, two_way))
        row |= call(_times, (sides, size, width, device, two_way))
        if len(sides) == 2:
            row |= call(_errors, (size, width, device, two_way))
    print(row, flush=True)
    return row


@contextmanager
def _apart(device: str) -> Iterator[Callable[..., Any]]:
    """What runs (function, arguments) in a process of its own; on CUDA in this one: its allocator tells, and each new
    process would take longer than what it measures."""
    if device == "cuda":
        yield lambda function, arguments: function(*arguments)
        return
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        yield pool.apply


def _head(args: argparse.Namespace) -> dict[str, Any]:
    flags = [name for name in ("huge", "two_way") if getattr(args, name)]
    command = " ".join(["python -m benchmarks.infonce", *(f"--{name.replace('_', '-')}" for name in flags)])
    if args.huge:
        command += f" --rows {args.rows}"
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"{common.cpu_name()}, one thread"
    return common.head(command, args.device, two_way=args.two_way, toy=args.toy) | {"hardware": hardware}


def huge(size: int, width: int, rows: int, args: argparse.Namespace) -> None:
    """Peak memory of the strips with `rows` of `size` queries, and what it is with all of them."""
    with _apart(args.device) as call:
        found = call(_short_memory, (size, width, rows, args.device, args.two_way))
    rest = (size - rows) * width * 4 / MIB
    row: dict[str, Any] = {"batch": size, "width": width, "rows": rows, "measured_mib": found, "rest_mib": rest}
    row |= {"total_mib": found + rest, **(head := _head(args))}
    text = "\n".join(common.title("InfoNCE in strips: memory at size", head)) + (
        f"\n{size:,} x {size:,} x {width:,}, forward and backward: peak memory beside the inputs.\n\n"
        f"- {rows:,} queries against {size:,} passages: {found:,.0f} MiB measured\n"
        f"- the gradient of the other {size - rows:,} queries: {rest:,.0f} MiB\n"
        f"- together: {found + rest:,.0f} MiB (goal: under 2,048)\n"
    )
    print(text)
    if not args.toy:
        name = "infonce_huge" + ("_cuda" if args.device == "cuda" else "")
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{name}.json").write_text(json.dumps(row, indent=1) + "\n")
        (args.out / f"{name}.md").write_text(text)


def _short_memory(size: int, width: int, rows: int, device: str, two_way: bool) -> float:
    """MiB at the peak above the inputs, of `rows` queries against `size` passages of the ranks together.

    The passages that are no positive of these queries come as hard negatives, joined to the positives beforehand as a
    gather leaves them.
    """
    torch.set_num_threads(1)
    _gradient("strips", *_inputs(32, width, device), two_way)
    query, positive, _ = _inputs(size, width, device)
    query = query[:rows].detach().clone().requires_grad_()
    settings = Strips(
        own_Q=torch.arange(rows, device=device),
        columns=torch.arange(rows, device=device),
        queries=rows,
        temperature=TEMPERATURE,
        margin=None,
        two_way=two_way,
        tile=4096,
        keys=None,
        ranks=Ranks.of(),
        differentiable=True,
    )
    level = common.memory_level(device)
    loss, _ = StripLoss.apply(query, positive, None, None, settings)
    torch.autograd.grad(loss, (query, positive))
    return common.memory_peak(device) - level


def strips(query: Tensor, positive: Tensor, keys: Tensor, two_way: bool) -> Tensor:
    """This project's loss."""
    loss, _ = info_nce(query, positive, question_Q=keys[0], answer_Q=keys[1], temperature=TEMPERATURE, two_way=two_way)
    return loss


def whole(query: Tensor, positive: Tensor, keys: Tensor, two_way: bool) -> Tensor:
    """The same loss on the whole matrix."""
    scores = normalize(query, dim=1) @ normalize(positive, dim=1).T / TEMPERATURE
    hidden = (keys[0][:, None] == keys[0]) | (keys[1][:, None] == keys[1])
    hidden.fill_diagonal_(False)
    scores = scores.masked_fill(hidden, -torch.inf)
    target = torch.arange(len(query), device=query.device)
    loss = cross_entropy(scores, target)
    return (loss + cross_entropy(scores.T, target)) / 2 if two_way else loss


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor, bool], Tensor]] = {"strips": strips, "whole": whole}


def _inputs(size: int, width: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(size, width, generator=generator)
    positive = (query + torch.randn(size, width, generator=generator)).to(device)
    keys = torch.stack([torch.arange(size), torch.randint(0, 20 * size, (size,), generator=generator)])
    return query.to(device).requires_grad_(), positive.requires_grad_(), keys.to(device)


def _gradient(side: str, query: Tensor, positive: Tensor, keys: Tensor, two_way: bool) -> tuple[Tensor, ...]:
    return torch.autograd.grad(SIDES[side](query, positive, keys, two_way), (query, positive))


def _memory(side: str, size: int, width: int, device: str, two_way: bool) -> float:
    """MiB at the peak above what the inputs take."""
    torch.set_num_threads(1)
    _gradient(side, *_inputs(32, width, device), two_way)  # loads kernels and allocates their workspaces
    inputs = _inputs(size, width, device)
    level = common.memory_level(device)
    _gradient(side, *inputs, two_way)
    return common.memory_peak(device) - level


def _times(sides: tuple[str, ...], size: int, width: int, device: str, two_way: bool) -> dict[str, float]:
    """Best seconds of forward and backward of each side, taking turns."""
    torch.set_num_threads(1)
    inputs = _inputs(size, width, device)
    turns = 1 if size > 8192 else 3
    best = dict.fromkeys(sides, float("inf"))
    for turn in range(turns + (size <= 8192)):  # the first warms up, where there are several
        for side in sides if turn % 2 else sides[::-1]:
            begin = common.clock(device)
            _gradient(side, *inputs, two_way)
            best[side] = min(best[side], common.clock(device) - begin)
    found = {f"{side}_s": seconds for side, seconds in best.items()}
    if len(sides) == 2:
        found["time_ratio"] = best["strips"] / best["whole"]
    return found


def _errors(size: int, width: int, device: str, two_way: bool) -> dict[str, float]:
    """Relative differences of the gradients."""
    inputs = _inputs(size, width, device)
    found = {side: torch.cat(_gradient(side, *inputs, two_way)).double() for side in SIDES}
    errors = {"strips_to_whole": _relative(found["strips"], found["whole"])}
    if size <= FLOAT64_LIMIT:
        exact = [tensor.detach().double().requires_grad_() for tensor in inputs[:2]]
        reference = torch.cat(_gradient("whole", exact[0], exact[1], inputs[2], two_way))
        errors |= {f"{side}_to_float64": _relative(value, reference) for side, value in found.items()}
    return errors


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def markdown(head: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        *common.title(f"InfoNCE{', two-way' if head['two_way'] else ''}: strips against the whole matrix", head),
        "| batch | width | strips, s | whole, s | ratio | strips, MiB | whole, MiB | gradient error: strips to whole | "
        "strips to float64 | whole to float64 |",
        "| ---: " * 10 + "|",
    ]
    formats = {
        **{"batch": ",d", "width": ",d", "strips_s": ".3f", "whole_s": ".3f", "time_ratio": ".2f"},
        **{"strips_mib": ",.0f", "whole_mib": ",.0f"},
        **dict.fromkeys(("strips_to_whole", "strips_to_float64", "whole_to_float64"), ".1e"),
    }
    for row in rows:
        cells = [format(row[key], style) if key in row else "" for key, style in formats.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
