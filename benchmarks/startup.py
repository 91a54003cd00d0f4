"""From `lbr train` to the first finished step, part by part; and the same for a restart from a checkpoint.

    python -m benchmarks.startup [--ranks 1] [--rounds 3] [--toy]

Every start is a process of its own. The parts are timed from outside the product: each function of `PARTS` is wrapped
before the run begins. A part counts without the parts inside it; `the rest` is what no part covers (the first step's
data, the logs). Seconds of the wall, and CPU seconds of rank 0, which hold on a machine that is busy with other work,
too. `no bytecode` is the first start after an install that compiled nothing (`--compile-bytecode` of uv does).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import SHAPES, add_options, head, save, table, title

PARTS = (
    ("imports", "lbr_dist.training.run", None),
    ("imports", "lbr_dist.training.session", None),
    ("imports", "transformers.models.llama.modeling_llama", None),
    ("import of DeepSpeed", "lbr_dist.training.engine", "_import_deepspeed"),
    ("recipe, data and tokenizer checks", "lbr_dist.training.preflight", "check"),
    ("process group", "lbr_dist.training.session", "start_distributed"),
    ("checksums of the shards", "lbr_dist.training.session", "deep_check"),
    ("model load", "lbr_dist.model.bottleneck", "LbrModel.build"),
    ("DeepSpeed engine", "lbr_dist.training.session", "make_engine"),
    ("checkpoint: verify", "lbr_dist.training.session", "choose"),
    ("checkpoint: load", "lbr_dist.training.checkpoint.checkpointer", "Checkpointer.load"),
    ("first step", "lbr_dist.training.run", "_Loop._step"),
)
"""Name of the part; module; function in it, or None: the import of the module itself."""
COLUMNS = {
    **{"part": "part", "start_wall": "start, s", "start_cpu": "start, CPU s"},
    **{"restart_wall": "restart, s", "restart_cpu": "restart, CPU s"},
    **{"cold_wall": "start, no bytecode, s", "cold_cpu": "no bytecode, CPU s"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", default="cpu", choices=SHAPES)
    parser.add_argument("--cold", action="store_true", help="also without bytecode (a minute and more)")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # recipe, where the times go
    args = parser.parse_args()
    if args.run:
        one_start(*args.run)
        return
    if args.toy:
        args.rounds, args.shape, args.ranks, args.cold = 1, "toy", 1, False
    found: dict[str, list[dict[str, list[float]]]] = {"start": [], "restart": [], "cold": []}
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), args.shape)
        for number in range(args.rounds):
            output = Path(folder) / f"run-{number}"
            found["start"].append(launch(Path(folder), output, 1, args.ranks, {}))
            found["restart"].append(launch(Path(folder), output, 2, args.ranks, {}))
            if args.cold:
                empty = {"PYTHONPYCACHEPREFIX": str(Path(folder) / f"bytecode-{number}")}
                found["cold"].append(launch(Path(folder), Path(folder) / f"cold-{number}", 1, args.ranks, empty))
    about = head("python -m benchmarks.startup", ranks=args.ranks, shape=args.shape, rounds=args.rounds, toy=args.toy)
    rows = summarise(found)
    lines = title("Start-up to the first step", about)
    lines += [f"Model `{args.shape}`, {args.ranks} ranks, medians of {args.rounds} rounds.", "", *table(COLUMNS, rows)]
    save(args.out, "startup", about, rows, lines)


def summarise(found: dict[str, list[dict[str, list[float]]]]) -> list[dict[str, Any]]:
    """Medians, one row per part, the whole last."""
    names = [*dict.fromkeys(name for name, _, _ in PARTS), "the rest", "whole"]
    rows = []
    for name in names:
        row: dict[str, Any] = {"part": name}
        for kind, starts in found.items():
            values = [start[name] for start in starts if name in start]
            for index, clock in enumerate(("wall", "cpu")):
                row[f"{kind}_{clock}"] = round(statistics.median(v[index] for v in values), 2) if values else None
        rows.append(row)
    return rows


def make_data(folder: Path, shape: str) -> None:
    """A prepared set, a tokenizer and a random model."""
    from benchmarks.common import random_model
    from benchmarks.loader_sides import make_rows, make_tokenizer
    from lbr_dist.data.record import Record
    from lbr_dist.data.shard_writer import write_set
    from lbr_dist.model.tokenizer import Tokenization

    rows = list(make_rows(2000))
    plain = random_model(shape, z=0).causal_lm
    plain.save_pretrained(folder / "model")
    make_tokenizer(folder / "model", rows, vocabulary=SHAPES[shape]["vocab_size"] // 2)
    records = [Record(row["id"], question=row["question"], answer=row["answer"]) for row in rows]
    write_set(folder / "set", {"gl": records}, Tokenization.load(str(folder / "model")), name="set")


def launch(folder: Path, output: Path, steps: int, ranks: int, more: dict[str, str]) -> dict[str, list[float]]:
    """Train up to `steps` steps in processes of their own; returns [wall, CPU] of each part on rank 0."""
    from lbr_dist.launch.ports import free_port

    recipe = {
        "stage": "generative",
        "output": str(output),
        "model": {"path": str(folder / "model")},
        "data": {"sets": [{"path": str(folder / "set")}], "bin_tokens": 512, "max_x_tokens": 250, "max_y_tokens": 250},
        "batch": {"global_batch": ranks},
        "duration": {"steps": 4},
    }
    file, times = folder / "recipe.json", folder / "times.json"
    file.write_text(json.dumps({**recipe, "stop_after": steps}))
    shared = {**os.environ, "OMP_NUM_THREADS": "1", **more, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "BENCHMARK_BEGAN": str(time.time())}
    command = [sys.executable, "-m", "benchmarks.startup", "--run", str(file), str(times)]
    processes = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]
    printed = [process.communicate()[0] for process in processes]
    for process, text in zip(processes, printed, strict=True):
        if process.returncode not in (0, 75):
            raise RuntimeError(f"a start failed:\n{text.decode()[-3000:]}")
    return json.loads(times.read_text())


def one_start(recipe_file: str, times_file: str) -> None:
    """In a process of its own: train, and stop after the asked number of steps, with a checkpoint."""
    parts = _Parts()
    parts.spent["imports"] = [time.time() - float(os.environ["BENCHMARK_BEGAN"]), time.process_time()]  # torch, above
    for name, module, function in PARTS:
        parts.wrap(name, module, function)
    from lbr_dist.recipes import parse_recipe
    from lbr_dist.training import run

    raw = json.loads(Path(recipe_file).read_text())
    stop_after = raw.pop("stop_after")
    finished = run._Loop._step

    def step(self: Any, plan: Any, batches: Any) -> tuple[bool, bool]:
        asked, unsaved = finished(self, plan, batches)
        if "whole" not in parts.spent:
            wall, cpu = time.time() - float(os.environ["BENCHMARK_BEGAN"]), time.process_time()
            covered = [sum(values) for values in zip(*parts.spent.values(), strict=True)]
            parts.spent |= {"the rest": [wall - covered[0], cpu - covered[1]], "whole": [wall, cpu]}
        return asked or plan.step + 1 == stop_after, unsaved

    run._Loop._step = step  # type: ignore[method-assign]
    run.train(parse_recipe(raw, "startup"))
    if os.environ["RANK"] == "0":
        Path(times_file).write_text(json.dumps(parts.spent))


class _Parts:
    """Time of each part, without the parts inside it."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}
        self._inside = [[0.0, 0.0]]

    def wrap(self, name: str, module: str, function: str | None) -> None:
        """Time the function, or with None import the module and time that."""
        if function is None:
            self.time(name, lambda: importlib.import_module(module))()
            return
        owner: Any = importlib.import_module(module)
        *classes, attribute = function.split(".")
        for part in classes:
            owner = getattr(owner, part)
        found = owner.__dict__[attribute]
        if isinstance(found, classmethod):
            setattr(owner, attribute, classmethod(self.time(name, found.__func__)))
        else:
            setattr(owner, attribute, self.time(name, found))

    def time(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, counted under `name`."""

        def timed(*args: Any, **options: Any) -> Any:
            begin = (time.perf_counter(), time.process_time())
            self._inside.append([0.0, 0.0])
            try:
                return function(*args, **options)
            finally:
                whole = [time.perf_counter() - begin[0], time.process_time() - begin[1]]
                inside = self._inside.pop()
                if "whole" not in self.spent:
                    own = self.spent.setdefault(name, [0.0, 0.0])
                    for index in (0, 1):
                        own[index] += whole[index] - inside[index]
                        self._inside[-1][index] += whole[index]

        return timed


if __name__ == "__main__":
    main()
