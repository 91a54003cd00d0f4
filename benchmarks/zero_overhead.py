"""What ZeRO-3 costs each rank against plain torch on one process, and how that grows from 1 to 4 processes (CPU, gloo).

    python -m benchmarks.zero_overhead [--worlds 1 2 4] [--steps 8] [--toy]

Weak scaling: every rank trains on the same number of equal micro-batches a step, through the product's own engine,
accumulation and clipping. Every case is a set of processes of its own; cases take turns. CPU seconds are per rank and
step, gloo's threads included: they hold with fewer cores than ranks, which wall seconds do not (with 2 cores, 4 ranks
take twice the wall time of 2 whatever the code does). What this cannot show is the time that real networks take:
docs/scaling.md has a model of that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from benchmarks.common import SHAPES, add_options, head, random_model, save, table, title
from benchmarks.mfu import make_bins

COLUMNS = {
    **{"case": "case", "ranks": "ranks", "cpu_s": "CPU s per rank and step", "wall_s": "wall s per step"},
    **{"overhead": "CPU over plain torch", "overhead_range": "range"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after two")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micros", type=int, default=2, help="micro-batches of 1,024 tokens per rank and step")
    args = parser.parse_args()
    if args.toy:
        args.shape, args.worlds, args.steps, args.rounds = "toy", [2], 1, 1
    stages = (3,) if args.toy else (0, 3)
    cases = [("plain torch", 1), *((f"ZeRO-{stage}", world) for stage in stages for world in args.worlds)]
    found: dict[tuple[str, int], list[list[float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        from benchmarks.loader_sides import make_rows, make_tokenizer

        random_model(args.shape, z=0).causal_lm.save_pretrained(f"{folder}/model")
        make_tokenizer(Path(folder) / "model", list(make_rows(200)), vocabulary=SHAPES[args.shape]["vocab_size"] // 2)
        for _ in range(args.rounds):
            for case in cases:
                found[case].append(run_case(case, folder, args))
                print(*case, found[case][-1], flush=True)
    torch.set_num_threads(1)  # as every rank has
    worlds = " ".join(map(str, args.worlds))
    command = f"python -m benchmarks.zero_overhead --worlds {worlds} --steps {args.steps} --micros {args.micros}"
    about = head(f"{command} --rounds {args.rounds}", cpus=os.cpu_count(), shape=args.shape, toy=args.toy)
    rows = summarise(found)
    lines = title("ZeRO-3 on CPU processes against plain torch", about)
    lines += [f"Model `{args.shape}`, {args.micros} micro-batches a rank and step, {about['cpus']} cores.", ""]
    save(args.out, "zero_overhead", about, rows, [*lines, *table(COLUMNS, rows)])


def summarise(found: dict[tuple[str, int], list[list[float]]]) -> list[dict[str, Any]]:
    """Medians over the rounds; the overhead is that of a round against plain torch in the same round."""
    plain = [cpu for cpu, _ in found["plain torch", 1]]
    rows = []
    for (case, world), rounds in found.items():
        over = [cpu / base for (cpu, _), base in zip(rounds, plain, strict=True)]
        cpu, wall = (statistics.median(values) for values in zip(*rounds, strict=True))
        rows.append({"case": case, "ranks": world, "cpu_s": round(cpu, 3), "wall_s": round(wall, 3)})
        rows[-1] |= {"overhead": round(statistics.median(over), 2)}
        rows[-1] |= {"overhead_range": f"{min(over):.2f} to {max(over):.2f}"}
    return rows


def run_case(case: tuple[str, int], folder: str, args: argparse.Namespace) -> list[float]:
    """[CPU seconds per rank, wall seconds] of a step: the median step of the mean rank."""
    from lbr_dist.launch.ports import free_port

    name, world = case
    stage = None if name == "plain torch" else int(name[-1])
    arguments = (world, free_port(), stage, folder, args.steps, args.micros)
    mp.spawn(rank_main, args=arguments, nprocs=world)
    ranks = [json.loads((Path(folder) / f"times-{rank}.json").read_text()) for rank in range(world)]
    return [statistics.mean(values) for values in zip(*ranks, strict=True)]


def rank_main(rank: int, world: int, port: int, stage: int | None, folder: str, steps: int, micros: int) -> None:
    """One rank: two steps to warm up, then `steps` timed ones."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    from lbr_dist.config import Recipe
    from lbr_dist.environment import Environment
    from lbr_dist.objectives.generative import generative_loss

    recipe = Recipe.model_validate(
        {
            **{"stage": "generative", "output": "unused", "model": {"path": f"{folder}/model"}},
            **{"data": {"sets": [{"path": "unused"}]}, "batch": {"global_batch": 1}, "duration": {"steps": 1}},
            "deepspeed": "cpu" if stage == 3 else "zero0",
        }
    )
    _, batches = make_bins(micros, 1024, "cpu")
    targets = world * sum(len(batch.targets_L) for batch in batches)

    def loss_of(module: Any, batch: Any) -> torch.Tensor:
        return generative_loss(module, batch, target_tokens=targets, world_size=world).backward

    if stage is None:
        from lbr_dist.model.bottleneck import LbrModel
        from lbr_dist.training.optimizer import make_optimizer

        model = LbrModel.build(recipe).train()
        optimizer = make_optimizer(model, recipe)

        def step() -> None:
            for batch in batches:
                loss_of(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    else:
        from lbr_dist.training.accumulate import accumulate
        from lbr_dist.training.ds_config import load_regime
        from lbr_dist.training.engine import apply_gradients, make_engine, start_distributed

        start_distributed(Environment(rank, world, rank, world, ("127.0.0.1", port), "benchmark"), 600)
        engine = make_engine(recipe, load_regime(recipe, world=world, cuda=False))

        def step() -> None:
            accumulate(engine, [lambda batch=batch: loss_of(engine, batch) for batch in batches])  # type: ignore[misc]
            apply_gradients(engine)

    times = []
    for number in range(2 + steps):
        begin = (time.process_time(), time.perf_counter())
        step()
        if number >= 2:
            times.append((time.process_time() - begin[0], time.perf_counter() - begin[1]))
    middle = [statistics.median(values) for values in zip(*times, strict=True)]
    (Path(folder) / f"times-{rank}.json").write_text(json.dumps(middle))
    if stage is not None:  # what is left of gloo's threads when the interpreter ends may abort it
        engine.destroy()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
