"""Our loader beside webdataset, mosaicml-streaming and `datasets` streaming, on the same records.

    python -m benchmarks.loader [--records 20000] [--rounds 3] [--toy]

Records are question-answer pairs of random words with real lengths (`benchmarks/lengths.py`). Every side shuffles,
reads each record once, decodes its JSON in the loader processes and (task `tokens`) tokenizes question and answer with
the same tokenizer; task `records` stops at the decoded records. What differs is what a training run gets for it: ours
has shuffled the whole epoch, packed it into bins and laid it out as [X ; Z ; Y] with its attention segments; the others
have a shuffle buffer of 1,000 (mosaicml-streaming: a shuffle by block) and give batches of 32 as flat token arrays.

Each measurement is a process of its own; sides take turns. `http` is a server on this machine: ours copies shards to
its cache and then reads them, webdataset and `datasets` stream. mosaicml-streaming has no http reader.

    samples/s, MB/s     one epoch by the wall clock, from opening the data to the last batch; MB of JSON
    CPU s               of all processes of that epoch: what holds on a machine that is busy with other work, too
    first batch, s      from opening the data to the first batch (libraries imported, tokenizer loaded)
    resume, s           the same for going on after half of the epoch, by each library's own means: ours by step number,
                        mosaicml-streaming by its state, `datasets` by `skip`, webdataset by reading and dropping half
    memory, MB          proportional set size of all processes half-way, less what the process had before opening
"""

from __future__ import annotations

import argparse
import functools
import http.server
import importlib.util
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import add_options, head, save, table, title
from benchmarks.loader_sides import Finish, open_datasets, open_lbr, open_streaming, open_webdataset, write

SIDES = ("lbr", "webdataset", "streaming", "datasets")
NAMES = {"lbr": "lbr_dist", "streaming": "mosaicml-streaming"}
COLUMNS = {
    **{"side": "loader", "where": "where", "task": "task", "workers": "workers", "samples_per_s": "samples/s"},
    **{"mb_per_s": "MB/s", "cpu_s": "CPU s", "first_s": "first batch, s", "resume_s": "resume, s"},
    "memory_mb": "memory, MB",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)  # side, address, task, workers, tokenizer
    args = parser.parse_args()
    if args.one:
        side, address, task, workers, tokenizer = args.one
        print(json.dumps(measure(side, address, task, int(workers), tokenizer)))
        return
    if args.toy:
        args.records, args.rounds, args.workers = 400, 1, [1]
    sides, reasons = available()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(Path(folder), sides, args)
    workers = " ".join(map(str, args.workers))
    command = f"python -m benchmarks.loader --records {args.records} --rounds {args.rounds} --workers {workers}"
    about = head(command, cpus=os.cpu_count(), toy=args.toy, missing=reasons)
    lines = title("Loaders on the same records", about)
    lines += [f"{args.records:,} records, {about['cpus']} cores; medians of {args.rounds} rounds.", ""]
    lines += [*reasons, "", *table(COLUMNS, [{**row, "side": NAMES.get(row["side"], row["side"])} for row in rows])]
    save(args.out, "loader", about, rows, lines)


def available() -> tuple[list[str], list[str]]:
    """Sides that can run here, and why the others cannot."""
    missing = [side for side in SIDES if side != "lbr" and importlib.util.find_spec(side) is None]
    reasons = [f"Not measured: {NAMES.get(side, side)} is not installed here." for side in missing]
    return [side for side in SIDES if side not in missing], reasons


def compare(folder: Path, sides: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Write the data for every side, and measure each in turn."""
    write(folder, args.records, sides)
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cases = [
        (side, where, task, workers)
        for where in ("local", "http")
        for task in ("tokens", "records")
        for workers in args.workers
        for side in sides
        if (side, where) != ("streaming", "http")
        if not args.toy or (task == "tokens" and (side == "lbr" or where == "local"))
    ]
    found: dict[Any, list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case in cases:
            side, where, task, workers = case
            address = str(folder) if where == "local" else f"http://127.0.0.1:{server.server_port}"
            found[case].append(run_one(folder, side, address, task, workers))
            print(*case, found[case][-1], flush=True)
    server.shutdown()
    return [
        {**dict(zip(("side", "where", "task", "workers"), case, strict=True)), **_medians(values)}
        for case, values in found.items()
    ]


def _medians(values: list[dict[str, float]]) -> dict[str, Any]:
    middle = {key: statistics.median(value[key] for value in values) for key in values[0]}
    whole = ("samples_per_s", "memory_mb")
    return {key: round(value) if key in whole else round(value, 2) for key, value in middle.items()}


def run_one(folder: Path, side: str, address: str, task: str, workers: int) -> dict[str, float]:
    """One measurement, in a process of its own with empty caches."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        environment = {**os.environ, "XDG_CACHE_HOME": cache, "HF_HOME": cache, "HF_HUB_OFFLINE": "0"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": cache}
        command = [sys.executable, "-m", "benchmarks.loader", "--one", side, address, task, str(workers)]
        done = subprocess.run(
            [*command, str(folder / "model")], env=environment, capture_output=True, text=True, cwd=_root()
        )
    if done.returncode:
        raise RuntimeError(f"{side}, {address}, {task}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _root() -> Path:
    return Path(__file__).parent.parent


class _Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass


def measure(side: str, address: str, task: str, workers: int, tokenizer: str) -> dict[str, float]:
    """Epoch, first batch, resume and memory of one side; runs alone in its process."""
    import torch.utils.data  # noqa: F401  # all sides load it: not part of the first batch

    from lbr_dist.model.tokenizer import Tokenization

    tokenization = Tokenization.load(tokenizer)
    tokenization.encode(["warm"])
    opener: Callable[..., Iterable[int]] = {
        "lbr": open_lbr,
        "webdataset": open_webdataset,
        "streaming": open_streaming,
        "datasets": open_datasets,
    }[side]
    finish = Finish(task, tokenization)
    opener(address, finish, workers, None, imports_only=True)
    lines = [path.read_bytes() for path in (Path(tokenizer).parent / "json").iterdir()]
    total, size = sum(text.count(b"\n") for text in lines), sum(map(len, lines))
    before = _memory()
    begin, cpu = time.perf_counter(), _cpu()
    batches = iter(opener(address, finish, workers, None))
    samples, count, memory = next(batches), 1, 0.0
    first = time.perf_counter() - begin
    for more in batches:
        samples, count = samples + more, count + 1
        if not memory and samples >= total // 2:
            memory = _memory() - before
    seconds = time.perf_counter() - begin
    del batches
    for child in multiprocessing.active_children():
        child.join(10)  # so that its CPU time counts
    cpu = _cpu() - cpu
    if samples != total:
        raise RuntimeError(f"{side}: {samples} of {total} records")
    begin = time.perf_counter()
    resumed = iter(opener(address, finish, workers, count // 2))
    next(resumed)
    resume = time.perf_counter() - begin
    return {
        "samples_per_s": samples / seconds,
        "mb_per_s": size / seconds / 1e6,
        "cpu_s": cpu,
        "first_s": first,
        "resume_s": resume,
        "memory_mb": memory,
    }


def _cpu() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def _memory() -> float:
    """Proportional set size of this process and its children in MB: shared pages count once."""
    total = 0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1e3


if __name__ == "__main__":
    main()
