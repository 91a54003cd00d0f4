"""How long a checkpoint stops training: in the background against written in the foreground.

A ZeRO-3 engine with AdamW in float32 (12 bytes of state per parameter) on gloo ranks. Synchronous and asynchronous
saves alternate, so that a busy machine troubles both, and training goes on behind the asynchronous ones. Goal: stall /
synchronous time <= 0.1.

    python benchmarks/checkpoint.py --ranks 2 --million 34 --repeats 7
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


def _rank(rank: int, world: int, port: int, million: int, repeats: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    from lbr_dist import config
    from lbr_dist.training.checkpoint import Checkpointer, verify

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
        if repeat:  # the first pays for the buffers
            synchronous.append(full)
            stalls.append(stall)
        elif rank == 0:
            print(f"first save, which allocates the buffers: {full:.2f} s")
    if rank == 0:
        newest = run / "checkpoints" / f"step-{2 * repeats + 1:06d}"
        size = sum(file.stat().st_size for file in newest.iterdir())
        assert verify(newest) == []
        _report(size, world, synchronous, stalls)
    torch.distributed.destroy_process_group()


def _report(size: int, world: int, synchronous: list[float], stalls: list[float]) -> None:
    full, stall = statistics.median(synchronous), statistics.median(stalls)
    print(f"checkpoint of {size / 2**30:.2f} GiB on {world} ranks, {len(stalls)} saves of each kind (medians)")
    print(f"  synchronous save          {full:.3f} s  ({size / 2**30 / full:.2f} GiB/s, forced to disk)")
    print(f"  asynchronous save, stall  {stall:.3f} s  (min {min(stalls):.3f}, max {max(stalls):.3f})")
    print(f"  stall / synchronous       {stall / full:.3f}  (goal 0.1)")


def main() -> None:
    """Run the ranks and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--million", type=int, default=34, help="millions of parameters")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    parser.add_argument("--port", type=int, default=29617)
    options = parser.parse_args()
    folder = tempfile.mkdtemp(dir=options.folder)
    try:
        arguments = (options.ranks, options.port, options.million, options.repeats, folder)
        mp.spawn(_rank, args=arguments, nprocs=options.ranks)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
