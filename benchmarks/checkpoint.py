"""How long a checkpoint stops training: in the background against written in the foreground.

A ZeRO-3 engine with AdamW in float32 (12 bytes of state per parameter) on gloo ranks. Synchronous and asynchronous
saves alternate, so that a busy machine troubles both, and training goes on behind the asynchronous ones. Goal: stall /
synchronous time <= 0.1.

    python -m benchmarks.checkpoint --ranks 2 --million 34 --repeats 7
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from benchmarks.common import add_options, head, ratio, save, table, title

WIDTH = 4096
"""Few large layers: the benchmark is about bytes, not about collective calls."""


def _engine(parameters: int, world: int) -> Any:
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(max(1, parameters // WIDTH**2))]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    settings = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "sub_group_size": 10**7},
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def _train_step(engine: Any) -> None:
    engine.backward(engine(torch.ones(8, WIDTH)).square().mean())
    engine.step()


def _any(value: bool) -> bool:
    """True on every rank if it is on one."""
    flag = torch.tensor(int(value))
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def _rank(rank: int, world: int, port: int, million: int, repeats: int, folder: str, queue: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    from lbr_dist import config
    from lbr_dist.training.checkpoint.checkpointer import Checkpointer
    from lbr_dist.training.checkpoint.format import verify

    engine = _engine(million * 10**6, world)
    run = Path(folder)
    checkpointer = Checkpointer(run, engine, config.Checkpoint(keep_last=1), extra_files={})
    synchronous: list[float] = []
    stalls: list[float] = []
    _train_step(engine)
    for repeat in range(repeats + 1):
        torch.distributed.barrier()
        begin = time.perf_counter()
        checkpointer.save(2 * repeat, {}, wait=True)
        full = time.perf_counter() - begin
        torch.distributed.barrier()
        begin = time.perf_counter()
        checkpointer.save(2 * repeat + 1, {})
        stall = time.perf_counter() - begin
        while _any(checkpointer.busy):
            _train_step(engine)
        checkpointer.wait()
        synchronous.append(full)
        stalls.append(stall)
    if rank == 0:
        newest = run / "checkpoints" / f"step-{2 * repeats + 1:06d}"
        size = sum(file.stat().st_size for file in newest.iterdir())
        assert verify(newest) == []
        queue.put((size, synchronous, stalls))
    torch.distributed.destroy_process_group()


def main() -> None:
    """Run the ranks, and save the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--million", type=int, default=34, help="millions of parameters")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    parser.add_argument("--port", type=int, default=29617)
    add_options(parser)
    options = parser.parse_args()
    world, million, repeats = (1, 17, 1) if options.toy else (options.ranks, options.million, options.repeats)
    folder, queue = tempfile.mkdtemp(dir=options.folder), mp.get_context("spawn").SimpleQueue()
    try:
        mp.spawn(_rank, args=(world, options.port, million, repeats, folder, queue), nprocs=world)
        size, (first, *synchronous), (_, *stalls) = queue.get()
    finally:
        shutil.rmtree(folder)
    command = f"python -m benchmarks.checkpoint --ranks {world} --million {million} --repeats {repeats}"
    gib, (middle, low, high) = size / 2**30, ratio(stalls, synchronous)
    full, stall = statistics.median(synchronous), statistics.median(stalls)
    row = {
        "gib": f"{gib:.2f}",
        "first": f"{first:.2f}",
        "full": f"{full:.3f} ({gib / full:.2f} GiB/s)",
        "stall": f"{stall:.3f}",
        "ratio": f"{middle:.3f} ({low:.3f} to {high:.3f})",
    }
    about = head(command, toy=options.toy, ranks=world, goal=0.1)
    heads = {"gib": "checkpoint, GiB", "first": "first save, s", "full": "synchronous save, s", "stall": "stall, s"}
    heads["ratio"] = "stall over synchronous (goal: 0.1)"
    lines = title("How long a checkpoint stops training", about)
    lines += [
        f"{world} ranks, {repeats} saves of each kind in turn, medians. A synchronous save ends with its bytes forced "
        "to disk; the first also allocates the buffers.",
        "",
    ]
    save(options.out, "checkpoint", about, [row], lines + table(heads, [row]))


if __name__ == "__main__":
    main()
