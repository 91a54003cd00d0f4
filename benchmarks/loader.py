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
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import lengths
from benchmarks.common import add_options, head, save, table, title

SIDES = ("lbr", "webdataset", "streaming", "datasets")
NAMES = {"lbr": "lbr_dist", "streaming": "mosaicml-streaming"}
BATCH = 32
BUFFER = 1000
SHARDS = 8
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
    about = head(
        "python -m benchmarks.loader", records=args.records, cpus=os.cpu_count(), toy=args.toy, missing=reasons
    )
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
        if (side, where) != ("streaming", "http") and not (args.toy and task == "records")
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


# ---- the data


def write(folder: Path, count: int, sides: Sequence[str]) -> None:
    """The same records as a prepared set (tars, which webdataset reads too), JSON lines, and MDS shards."""
    from lbr_dist.data.record import Record
    from lbr_dist.data.shards import write_set
    from lbr_dist.model.tokenizer import Tokenization

    rows = list(make_rows(count))
    make_tokenizer(folder / "model", rows)
    records = [Record(row["id"], question=row["question"], answer=row["answer"]) for row in rows]
    tokenization = Tokenization.load(str(folder / "model"))
    write_set(folder / "set", {"gl": records}, tokenization, name="set", shard_records=-(-count // SHARDS))
    (folder / "json").mkdir()
    for shard in range(SHARDS):
        with (folder / "json" / f"{shard}.jsonl").open("w") as file:
            file.writelines(
                json.dumps(row) + "\n" for row in rows[shard * count // SHARDS : (shard + 1) * count // SHARDS]
            )
    if "streaming" in sides:
        size = sum(len(json.dumps(row)) for row in rows) // SHARDS
        with import_streaming().MDSWriter(out=str(folder / "mds"), columns={"json": "bytes"}, size_limit=size) as out:
            for row in rows:
                out.write({"json": json.dumps(row).encode()})


def make_rows(count: int) -> Iterator[dict[str, str]]:
    """Random words, frequent ones more often; about as many as the real rows have tokens."""
    draw = random.Random(0)
    letters = "etaoinshrdlucmfw"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 10))) for _ in range(5000)]
    weights = list(np.cumsum([1 / (rank + 1) for rank in range(len(words))]))
    pairs = [(max(x, 4), y) for x, y in lengths.load()]

    def text(tokens: int) -> str:
        return " ".join(draw.choices(words, cum_weights=weights, k=max(1, tokens * 3 // 4)))

    for number in range(count):
        x, y = draw.choice(pairs)
        yield {"id": f"r{number}", "question": text(x), "answer": text(y)}


def make_tokenizer(folder: Path, rows: Sequence[dict[str, str]]) -> None:
    """A byte-level BPE tokenizer of the rows."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator((row["answer"] for row in rows[:2000]), trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


# ---- one measurement


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
    finish = _Finish(task, tokenization)
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


class _Finish:
    """What the other loaders' processes do with a batch of JSON texts or decoded rows: the work ours does too."""

    def __init__(self, task: str, tokenization: Any) -> None:
        self.task, self.tokenization = task, tokenization

    def __call__(self, items: Sequence[Any]) -> tuple[Any, int]:
        rows = [json.loads(item) if isinstance(item, bytes) else item for item in items]
        if self.task == "records":
            return rows, len(rows)
        encoded = self.tokenization.encode([text for row in rows for text in (row["question"], row["answer"])])
        counts = np.array([len(ids) for ids in encoded])
        flat = np.fromiter((token for ids in encoded for token in ids), np.int64, counts.sum())
        return (flat, counts), len(rows)


def _counts(loader: Iterable[Any]) -> Iterator[int]:
    for _, count in loader:
        yield count


def open_lbr(
    address: str, finish: _Finish, workers: int, resume: int | None, imports_only: bool = False
) -> Iterable[int]:
    """Ours. `resume`: batches that are done."""
    from torch.utils.data import DataLoader

    from lbr_dist.config import Recipe
    from lbr_dist.data.loader import Loader
    from lbr_dist.data.plan import open_data

    if imports_only:
        return []
    recipe = Recipe.model_validate(
        {
            "stage": "generative",
            "output": "unused",
            "model": {"path": finish.tokenization.path},
            "data": {"sets": [{"path": f"{address}/set"}], "workers": workers},
            "batch": {"global_batch": 1},
            "duration": {"epochs": 1},
        }
    )
    plan, readers = open_data(recipe, finish.tokenization)
    reader = readers[0]
    if finish.task == "tokens":
        steps = Loader(plan, readers, finish.tokenization, recipe, start_step=resume or 0)
        return (step.samples for step, _ in steps)
    order = ([ref.row for ref in plan.step(n).refs()] for n in range(resume or 0, plan.steps_per_epoch(0)))
    return _counts(
        DataLoader(_Rows(reader, finish), sampler=order, batch_size=None, num_workers=workers, collate_fn=_same)
    )


class _Rows:
    """Decoded records in plan order, for the task without tokens."""

    def __init__(self, reader: Any, finish: _Finish) -> None:
        self.reader, self.finish = reader, finish

    def __getitem__(self, rows: list[int]) -> tuple[Any, int]:
        return self.finish(self.reader.read(rows))


def _same(batch: Any) -> Any:
    return batch


def open_webdataset(
    address: str, finish: _Finish, workers: int, resume: int | None, imports_only: bool = False
) -> Iterable[int]:
    """Plain webdataset over the same tars; it has no position to resume from."""
    import webdataset as wds
    from torch.utils.data import DataLoader

    if imports_only:
        return []
    urls = [f"{address}/set/gl/{shard:06d}.tar" for shard in range(SHARDS)]
    if address.startswith("http"):
        urls = [f"pipe:curl -s {url}" for url in urls]
    data = wds.WebDataset(urls, shardshuffle=SHARDS, empty_check=False, seed=0)
    data = data.shuffle(BUFFER).map(_json_member).batched(BATCH, collation_fn=None).map(finish)
    return islice(_counts(DataLoader(data, batch_size=None, num_workers=workers)), resume or 0, None)


def _json_member(sample: dict[str, Any]) -> bytes:
    return sample["json"]


def open_streaming(
    address: str, finish: _Finish, workers: int, resume: int | None, imports_only: bool = False
) -> Iterable[int]:
    """mosaicml-streaming over MDS shards."""
    from torch.utils.data import DataLoader

    streaming = import_streaming()
    if imports_only:
        return []
    streaming.base.util.clean_stale_shared_memory()
    data = streaming.StreamingDataset(local=f"{address}/mds", shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
    if resume:
        data.load_state_dict(data.state_dict(resume * BATCH, from_beginning=True) | {"epoch": 0})
    loader = DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=_Members(finish))
    return _counts(loader)


class _Members:
    def __init__(self, finish: _Finish) -> None:
        self.finish = finish

    def __call__(self, samples: list[dict[str, bytes]]) -> tuple[Any, int]:
        return self.finish([sample["json"] for sample in samples])


def import_streaming() -> Any:
    """Its package imports its image sets, which import torchvision; nothing here uses them, so stand-ins do."""
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    parts = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    stand_ins = {} if importlib.util.find_spec("torchvision") else {name: ModuleType(name) for name in parts}
    if "streaming" not in sys.modules:
        import datasets  # noqa: F401  # before the stand-ins: it looks for torchvision, too
        import transformers  # noqa: F401

        for name, module in stand_ins.items():
            module.__spec__ = ModuleSpec(name, None)
            module.VisionDataset, module.to_tensor = object, None  # type: ignore[attr-defined]
        sys.modules.update(stand_ins)
    try:
        import streaming
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)
    return streaming


def open_datasets(
    address: str, finish: _Finish, workers: int, resume: int | None, imports_only: bool = False
) -> Iterable[int]:
    """`datasets` streaming over JSON lines, resumed by its state."""
    import datasets
    from torch.utils.data import DataLoader

    if imports_only:
        return []
    files = [f"{address}/json/{shard}.jsonl" for shard in range(SHARDS)]
    data: Any = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    data = data.shuffle(seed=0, buffer_size=BUFFER)
    if resume:
        data = data.skip(resume * BATCH)
    return _counts(DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=finish))


if __name__ == "__main__":
    main()
