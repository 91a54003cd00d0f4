"""Run a function on several gloo ranks in fresh processes, with a time limit, and collect what each returns."""

from __future__ import annotations

import contextlib
import datetime
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

PRELOAD = [
    "deepspeed",
    "peft",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "lbr_dist.training.run",
    "lbr_dist.training.session",
]


def run_ranks(function: Callable[..., Any], world: int, folder: Path, *args: Any, timeout: float = 120) -> list[Any]:
    """`function(rank, world, *args)` on every rank, as a default group; results in rank order.

    `function` must be importable (module level). A failing rank ends the others and every traceback there is, oldest
    first, is raised; so is a rank that outlives `timeout` seconds.
    """
    processes = start_ranks(function, world, folder, *args)
    end = datetime.datetime.now() + datetime.timedelta(seconds=timeout)
    try:
        while any(process.is_alive() for process in processes):
            for process in processes:
                process.join(0.2)
            failed = [rank for rank in range(world) if (folder / f"error-{rank}").exists()]
            late = datetime.datetime.now() > end
            if failed or late:
                break
    finally:
        for process in processes:
            if process.is_alive() and (late or failed):
                process.kill()
            process.join()
    errors = sorted(folder.glob("error-*"), key=lambda file: file.stat().st_mtime_ns)  # the cause before its echoes
    if errors:
        raise RuntimeError("\n".join(f"{error.name}: {error.read_text()}" for error in errors))
    if any(process.exitcode for process in processes):
        raise TimeoutError(f"ranks ended with {[process.exitcode for process in processes]} after {timeout} s")
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(world)]


def start_ranks(function: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[Any]:
    """The started processes. They are forked from a server that has imported the slow libraries once."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    processes = [  # not daemons, which may not have loader processes
        context.Process(target=_run, args=(function, rank, world, folder, args)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def _run(function: Callable[..., Any], rank: int, world: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=60),
        )
        result = function(rank, world, *args)
        torch.save(result, folder / f"result-{rank}")
        torch.distributed.barrier()
    except BaseException:
        text = traceback.format_exc()
        partial = folder / f"partial-{rank}"
        partial.write_text(text)
        partial.rename(folder / f"error-{rank}")
        raise
    finally:
        with contextlib.suppress(Exception):
            torch.distributed.destroy_process_group()
