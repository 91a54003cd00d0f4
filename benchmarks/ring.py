"""Passages of all ranks gathered once, or travelling in a ring: time, memory and bytes of a loss with its gradient.

    python -m benchmarks.ring [--toy] [--ranks 2 4] [--sizes 2048 8192 16384] [--width 512] [--rounds 5]

`gathered` is the product's `info_nce`. `ring` is written out here (a first trip of every block for the normalisers, a
second for the gradients, which travel with it; a block is on its way while the scores of the one before are computed),
as it would be if the product had one, without masks. Both are one-way and give the same gradient, which is checked.

Ranks are processes of one thread on this machine, joined by gloo over loopback. Time is the wall's, between barriers,
the sides taking turns; memory is the peak resident memory of rank 0 over the level with the inputs in place, each side
in processes of its own; bytes are what the loopback interface carried, for each rank. More ranks than cores wait for
each other: compare the sides, not the rows.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import common
from lbr_dist.objectives.infonce import info_nce

TEMPERATURE = 0.1
TILE = 2048
"""Queries of which the ring holds scores at a time."""
Side = Callable[[Tensor, Tensor], list[Tensor]]


def gathered(query: Tensor, passage: Tensor) -> list[Tensor]:
    """This project's loss; returns the gradients of queries and passages, as one process would have them."""
    loss, _ = info_nce(query, passage, temperature=TEMPERATURE)
    return [found / dist.get_world_size() for found in torch.autograd.grad(loss, (query, passage))]


def ring(query: Tensor, passage: Tensor) -> list[Tensor]:
    """The same gradients, with no more than two blocks of passages on a rank at a time."""
    world = dist.get_world_size()
    unit_query, unit_passage = normalize(query), normalize(passage)
    q_QD, own_QD = unit_query.detach() / TEMPERATURE, unit_passage.detach()
    rows = torch.arange(len(q_QD)).split(TILE)

    log_sum_Q = torch.full((len(q_QD),), -torch.inf)
    block = own_QD
    for hop in range(world):
        coming = Passing(block) if hop < world - 1 else None
        for part in rows:
            log_sum_Q[part] = torch.logaddexp(log_sum_Q[part], (q_QD[part] @ block.T).logsumexp(1))
        block = coming.wait() if coming else block

    count = len(q_QD) * world
    of_query, of_block, block = torch.zeros_like(q_QD), torch.zeros_like(own_QD), own_QD
    for hop in range(world):
        coming = Passing(block) if hop < world - 1 else None
        for part in rows:
            share = (q_QD[part] @ block.T).sub_(log_sum_Q[part, None]).exp_().div_(count)
            if hop == 0:  # the positives
                share[torch.arange(len(part)), part] -= 1 / count
            of_query[part] += share @ block
            of_block += share.T @ q_QD[part]
        of_block = Passing(of_block).wait()  # the last time back to the rank whose passages they are
        block = coming.wait() if coming else block
    return list(torch.autograd.grad((unit_query, unit_passage), (query, passage), (of_query / TEMPERATURE, of_block)))


class Passing:
    """A tensor on its way to the next rank, and the one that comes from the rank before."""

    def __init__(self, block: Tensor) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        self.sent, self.received = block.contiguous(), torch.empty_like(block)
        send = dist.P2POp(dist.isend, self.sent, (rank + 1) % world)
        receive = dist.P2POp(dist.irecv, self.received, (rank - 1) % world)
        self.work = dist.batch_isend_irecv([send, receive])

    def wait(self) -> Tensor:
        """What has come."""
        for work in self.work:
            work.wait()
        return self.received


SIDES: dict[str, Side] = {"gathered": gathered, "ring": ring}


def inputs(rank: int, world: int, size: int, width: int) -> tuple[Tensor, Tensor]:
    """This rank's pairs of a global batch of `size`."""
    generator = torch.Generator().manual_seed(rank)
    query = torch.randn(size // world, width, generator=generator)
    passage = query + torch.randn(size // world, width, generator=generator)
    return query.requires_grad_(), passage.requires_grad_()


def measure(rank: int, world: int, place: str, size: int, width: int, sides: list[str], rounds: int) -> None:
    """One rank: memory if there is one side, times and bytes if there are several. Rank 0 leaves what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=world)
    for side in sides:  # loads kernels, opens connections
        SIDES[side](*inputs(rank, world, 4 * world, width))
    query, passage = inputs(rank, world, size, width)
    found: dict[str, Any] = {"seconds": {side: [] for side in sides}, "bytes": {}, "gradients": {}}
    dist.barrier()
    level = common.memory_level("cpu")
    for turn in range(rounds + 1 if len(sides) > 1 else 1):
        for side in sides:
            dist.barrier()
            before, begin = loopback_bytes(), time.perf_counter()
            gradients = SIDES[side](query, passage)
            dist.barrier()
            if turn:
                found["seconds"][side].append(time.perf_counter() - begin)
                found["bytes"][side] = (loopback_bytes() - before) / world
            if len(sides) > 1:
                found["gradients"][side] = torch.cat(gradients)
    found["memory_mib"] = common.memory_peak("cpu") - level
    if rank == 0:
        torch.save(found, Path(place) / "found")
    dist.barrier()
    dist.destroy_process_group()


def loopback_bytes() -> int:
    """Bytes that the loopback interface has received (Linux)."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


def on_ranks(world: int, *job: Any) -> dict[str, Any]:
    """`measure` on `world` new processes."""
    with tempfile.TemporaryDirectory() as place:
        mp.spawn(measure, (world, place, *job), nprocs=world)
        found: dict[str, Any] = torch.load(Path(place) / "found")
    return found


def row_of(world: int, size: int, width: int, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    memory = {side: on_ranks(world, size, width, [side], 0)["memory_mib"] for side in SIDES}
    found = on_ranks(world, size, width, list(SIDES), rounds)
    one, other = (found["gradients"][side].double() for side in SIDES)
    error = float((one - other).norm() / one.norm())
    if error > 1e-5:
        raise SystemExit(f"{world} ranks, batch {size}: the two gradients differ by {error:.1e}")
    seconds = found["seconds"]
    middle, low, high = common.ratio(seconds["ring"], seconds["gathered"])
    return {
        **{"ranks": world, "batch": f"{size:,}", "error": f"{error:.1e}", "seconds": seconds},
        **{f"{side}_s": f"{statistics.median(seconds[side]):.2f}" for side in SIDES},
        "ratio": f"{middle:.2f} ({low:.2f} to {high:.2f})",
        **{f"{side}_mib": f"{memory[side]:,.0f}" for side in SIDES},
        **{f"{side}_moved": f"{found['bytes'][side] / 2**20:,.0f}" for side in SIDES},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 8192, 16384], help="pairs of the global batch")
    parser.add_argument("--width", type=int, default=512, help="dimensions of an embedding")
    parser.add_argument("--rounds", type=int, default=5)
    common.add_options(parser)
    args = parser.parse_args()
    if args.toy:
        args.ranks, args.sizes, args.width, args.rounds = [2], [64], 16, 1
    rows = [row_of(world, size, args.width, args.rounds) for world in args.ranks for size in args.sizes]
    about = common.head("python -m benchmarks.ring", toy=args.toy, width=args.width)
    columns = {
        **{"ranks": "ranks", "batch": "pairs", "gathered_s": "gathered, s", "ring_s": "ring, s"},
        **{"ratio": "ring over gathered", "gathered_mib": "gathered, MiB", "ring_mib": "ring, MiB"},
        **{"gathered_moved": "gathered, MiB received", "ring_moved": "ring, MiB received"},
        "error": "gradients differ by",
    }
    lines = common.title("Passages gathered once, or in a ring", about)
    lines += [f"Width {args.width}, float32; medians of {args.rounds} rounds; memory and bytes are a rank's.", ""]
    common.save(args.out, "ring", about, rows, [*lines, *common.table(columns, rows)])


if __name__ == "__main__":
    main()
