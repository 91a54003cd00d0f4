"""The sides of benchmarks/loader.py: how each library's data is written, opened, resumed and brought to one result.

Every opener takes the address, a `Finish`, loader processes and the batches that are done, and gives the number of
records of each batch; with `imports_only` it imports what it needs and opens nothing.
"""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import lengths

BATCH = 32
BUFFER = 1000
SHARDS = 8


def write(folder: Path, count: int, sides: Sequence[str]) -> None:
    """The same records as a prepared set (tars, which webdataset reads too), JSON lines, and MDS shards."""
    from lbr_dist.data.record import Record
    from lbr_dist.data.shard_writer import write_set
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


def make_tokenizer(folder: Path, rows: Sequence[dict[str, str]], vocabulary: int = 4000) -> None:
    """A byte-level BPE tokenizer of the rows."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator((row["answer"] for row in rows[:2000]), trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


class Finish:
    """What the other loaders' processes do with a batch of JSON texts or decoded rows: the work ours does too."""

    def __init__(self, task: str, tokenization: Any) -> None:
        self.task, self.tokenization = task, tokenization

    def __call__(self, items: Sequence[Any]) -> tuple[Any, int]:
        """The rows, or their tokens flat with the count of each text; and the number of rows."""
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
    address: str, finish: Finish, workers: int, resume: int | None, imports_only: bool = False
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
    rows: Any = _Rows(reader, finish)
    return _counts(DataLoader(rows, sampler=order, batch_size=None, num_workers=workers, collate_fn=_same))


class _Rows:
    """Decoded records in plan order, for the task without tokens."""

    def __init__(self, reader: Any, finish: Finish) -> None:
        self.reader, self.finish = reader, finish

    def __getitem__(self, rows: list[int]) -> tuple[Any, int]:
        return self.finish(self.reader.read(rows))


def _same(batch: Any) -> Any:
    return batch


def open_webdataset(
    address: str, finish: Finish, workers: int, resume: int | None, imports_only: bool = False
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
    address: str, finish: Finish, workers: int, resume: int | None, imports_only: bool = False
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
    def __init__(self, finish: Finish) -> None:
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
    address: str, finish: Finish, workers: int, resume: int | None, imports_only: bool = False
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
