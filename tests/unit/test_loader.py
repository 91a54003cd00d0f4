"""The loader: bitwise the same batches with any number of processes and from any step, and no fault that hangs."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer

from lbr_dist.config import Recipe
from lbr_dist.data.assemble import Assembler, Job, LocalBatch
from lbr_dist.data.loader import Loader, _Batches, check_processes
from lbr_dist.data.plan import make_plan, open_data
from lbr_dist.data.plan.base import SIDES
from lbr_dist.data.record import Record, normalised_hash
from lbr_dist.data.remote import UnreachableError
from lbr_dist.data.shard_reader import ShardReader
from lbr_dist.data.shard_writer import write_set
from lbr_dist.data.shards import open_set
from lbr_dist.errors import UserError
from lbr_dist.model.tokenizer import Tokenization

ROWS = 60
EOS, BOS = 0, 2


def question(i: int) -> str:
    return f"What is item {i}" + "?" * (i % 5)


def answer(i: int) -> str:
    return "fever of unknown origin " * (1 + i % 4) + str(i)


def qa(i: int) -> Record:
    negatives = tuple(f"wrong {j} of {i}" for j in range(i % 4))
    return Record(f"q{i}", question=question(i), answer=answer(i), negatives=negatives)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenization]:
    """A folder with a question set, a text set and a tokenizer that has a beginning-of-sequence token."""
    root = tmp_path_factory.mktemp("data")
    make_tokenizer(root / "tokenizer", bos=True)
    tokens = Tokenization.load(str(root / "tokenizer"))
    records = [qa(i) for i in range(ROWS)]
    write_set(root / "qa", {"gl": records, "cl": records}, tokens, name="qa", shard_records=13)
    texts = [Record(f"t{i}", text=answer(i)) for i in range(ROWS)]
    write_set(root / "text", {"gl": texts}, tokens, name="text", shard_records=13)
    return root, tokens


def make_recipe(root: Path, stage: str = "generative", **other: Any) -> Recipe:
    data = {"sets": [{"path": str(root / "qa")}], "bin_tokens": 150, "max_x_tokens": 70, "max_y_tokens": 70}
    data |= {"window": 32, "block": 4, "workers": 0} | other.pop("data", {})
    raw: dict[str, Any] = {"stage": stage, "output": "out", "model": {"path": str(root / "tokenizer")}, "seed": 5}
    raw |= {"data": data, "batch": {"global_batch": 4}, "duration": {"epochs": 2}, "bottleneck": {"ratio": 20}}
    return Recipe.model_validate(raw | other)


def make_loader(recipe: Recipe, tokens: Tokenization, rank: int = 0, world: int = 1, start_step: int = 0) -> Loader:
    plan, readers = open_data(recipe, tokens)
    return Loader(plan, readers, tokens, recipe, rank, world, start_step)


def same(left: Any, right: Any) -> bool:
    """Deep, bitwise equality of dataclasses of tensors."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if dataclasses.is_dataclass(left):
        return all(same(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(left))
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def batches_of(loader: Loader) -> list[list[LocalBatch]]:
    return [batches for _, batches in loader]


def parts(batch: LocalBatch) -> list[tuple[list[int], int, list[int]]]:
    """(X, |Z|, Y) of each sample, from the packed stream."""
    packed = batch.packed
    tokens = packed.tokens_T.tolist()
    columns = (packed.starts_S, packed.x_len_S, packed.z_len_S, packed.y_len_S)
    return [
        (tokens[start : start + x], z, tokens[start + x + z : start + x + z + y])
        for start, x, z, y in zip(*(column.tolist() for column in columns), strict=True)
    ]


def samples_of(loader: Loader) -> list[tuple[int, tuple[list[int], int, list[int]]]]:
    """(number of the record, (X, |Z|, Y)) of all samples."""
    flat = [batch for batches in batches_of(loader) for batch in batches]
    return [(int(i[1:]), part) for batch in flat for i, part in zip(batch.ids, parts(batch), strict=True)]


CASES = [
    ("generative", {"batch": {"global_batch": 2}}),
    ("generative", {"batch": {"global_batch": 2}, "generative": {"target": "prefix"}}),
    ("contrastive", {"contrastive": {"hard_negatives": 2, "query_instruction": "Find the answer:\n"}}),
]


@pytest.mark.parametrize(("stage", "other"), CASES)
def test_processes_and_start_step_change_nothing(made: Any, stage: str, other: dict[str, Any]) -> None:
    root, tokens = made
    whole = batches_of(make_loader(make_recipe(root, stage, **other), tokens))
    assert len(whole) > 6
    parallel = make_recipe(root, stage, **other, data={"workers": 2, "prefetch": 1})
    assert same(batches_of(make_loader(parallel, tokens)), whole)
    for start in (1, len(whole) // 2, len(whole) - 1, len(whole)):
        assert same(batches_of(make_loader(make_recipe(root, stage, **other), tokens, start_step=start)), whole[start:])


@pytest.mark.parametrize(("stage", "other"), CASES)
def test_ranks_share_every_step(made: Any, stage: str, other: dict[str, Any]) -> None:
    root, tokens = made
    recipe = make_recipe(root, stage, **other)
    whole = list(make_loader(recipe, tokens))
    ranks = [batches_of(make_loader(recipe, tokens, rank, 3)) for rank in range(3)]
    for number, (step, alone) in enumerate(whole):
        split = [rank[number] for rank in ranks]
        assert len({len(micros) for micros in split}) == 1
        real = [b for micros in split for b in micros if not b.is_dummy]
        found, expected = (
            sorted(item for b in batches for item in zip(b.samples, b.ids, parts(b), strict=True))
            for batches in (real, alone)
        )
        assert found == expected
        if stage == "generative":
            assert step.target_tokens == sum(len(b.packed.targets_L) for micros in split for b in micros)


def test_sft_samples_are_question_and_answer(made: Any) -> None:
    root, tokens = made
    seen = []
    for i, (x, z, y) in samples_of(make_loader(make_recipe(root), tokens)):
        assert x == [BOS, *tokens.encode([question(i)])[0]]
        assert y == [*tokens.encode([answer(i)])[0], EOS]
        assert z == make_recipe(root).bottleneck.length(len(x))
        seen.append(i)
    assert sorted(seen) == sorted(2 * list(range(ROWS)))


@pytest.mark.parametrize("name", ["qa", "text"])
def test_prefix_and_reconstruct_use_the_document(made: Any, name: str) -> None:
    root, tokens = made
    for target in ("prefix", "reconstruct"):
        recipe = make_recipe(root, data={"sets": [{"path": str(root / name), "target": target}]})
        for i, (x, _, y) in samples_of(make_loader(recipe, tokens)):
            document = tokens.encode([answer(i)])[0]
            assert x[0] == BOS
            assert y[-1] == EOS
            if target == "prefix":
                assert x[1:] + y[:-1] == document
                assert 0.1 < len(x[1:]) / len(document) < 0.9
            else:
                assert x[1:] == y[:-1] == document


@pytest.mark.parametrize("target", ["sft", "prefix", "reconstruct"])
def test_long_samples_are_cut_at_the_end_of_x_and_before_the_end_of_y(made: Any, target: str) -> None:
    root, tokens = made
    limits = {"max_x_tokens": 9, "max_y_tokens": 7}
    loader = make_loader(make_recipe(root, data=limits, generative={"target": target}), tokens)
    cut = 0
    for i, (x, _, y) in samples_of(loader):
        asked, answered = tokens.encode([question(i), answer(i)])
        before = asked if target == "sft" else answered
        after = answered[len(x) - 1 :] if target == "prefix" else answered
        assert x == [BOS, *before][: len(x)]
        assert y == [*after[: len(y) - 1], EOS]
        assert len(x) <= 9
        assert len(y) <= 7
        cut += len(after) > len(y) - 1
    assert cut > ROWS // 2


def test_pairs_carry_sides_owners_and_hashes(made: Any) -> None:
    root, tokens = made
    instructions = {"query_instruction": "Find the answer:\n", "passage_instruction": "Passage:\n"}
    recipe = make_recipe(root, "contrastive", contrastive={"hard_negatives": 2, **instructions})
    ask, say = tokens.encode(list(instructions.values()))
    for world, rank in ((1, 0), (3, 2)):
        for step, batches in make_loader(recipe, tokens, rank, world):
            mine = step.pairs(rank, world)
            pairs: dict[int, dict[int, int]] = {}
            for batch in (b for b in batches if not b.is_dummy):
                columns = (batch.side_S, batch.pair_S, batch.answer_hash_S)
                for s, (side, local, hashed) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
                    i, (x, _, y) = int(batch.ids[s][1:]), parts(batch)[s]
                    assert batch.samples[s].pair == mine.start + local
                    assert y == []
                    if side == SIDES["negative"]:
                        text, before = qa(i).negatives[batch.samples[s].choice], say
                        assert hashed == normalised_hash(text)
                    else:
                        text, before = (question(i), ask) if side == SIDES["query"] else (answer(i), say)
                        assert hashed == normalised_hash(answer(i))
                        pairs.setdefault(local, {})[side] = batch.ids[s]
                        asked = normalised_hash(text) if side == SIDES["query"] else 0
                        assert int(batch.question_hash_S[s]) == asked
                    assert x == [BOS, *before, *tokens.encode([text])[0]]
            assert sorted(pairs) == list(range(len(mine)))
            assert all(len(sides) == 2 and len(set(sides.values())) == 1 for sides in pairs.values())


@pytest.mark.parametrize("stage", ["contrastive", "joint"])
@pytest.mark.parametrize("name", ["query_instruction", "passage_instruction"])
def test_an_instruction_leaves_room_for_the_text(made: Any, stage: str, name: str) -> None:
    """Else every query, or passage, is cut to the same tokens."""
    root, tokens = made
    instruction = "Find the answer:\n"
    room = 1 + len(tokens.encode([instruction])[0])
    options = {"contrastive": {name: instruction}, **({"joint": {"bins": 4}} if stage == "joint" else {})}
    with pytest.raises(UserError, match=rf"contrastive\.{name}: its {room} tokens leave none of data\.max_x_tokens"):
        open_data(make_recipe(root, stage, data={"max_x_tokens": room}, **options), tokens)
    open_data(make_recipe(root, stage, data={"max_x_tokens": room + 1}, **options), tokens)


@pytest.mark.parametrize("stage", ["generative", "contrastive"])
def test_a_rank_without_work_runs_dummies(made: Any, stage: str) -> None:
    root, tokens = made
    recipe = make_recipe(root, stage, batch={"global_batch": 2})
    for step, batches in make_loader(recipe, tokens, rank=0, world=8):
        assert len(batches) == len(step.micro_batches(7, 8)) >= 1
        for batch in batches:
            assert batch.is_dummy
            assert batch.ids == []
            assert len(batch.packed.targets_L) == 0
            assert len(batch.packed.pool_S) == 1


def test_the_global_random_state_is_left_alone(made: Any) -> None:
    root, tokens = made
    for workers in (0, 1):
        torch.manual_seed(0)
        before = torch.random.get_rng_state()
        next(iter(make_loader(make_recipe(root, data={"workers": workers}), tokens)))
        assert torch.equal(before, torch.random.get_rng_state())


def damage(shard: Path, how: str) -> None:
    if how == "vanishes":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(shard.read_bytes()[:1000])
    elif how == "overwritten":
        shard.write_bytes(b"x" * shard.stat().st_size)
    else:
        shard.write_bytes(shard.read_bytes().replace(b"fever of unknown", b"f3v3r 0f 6nkn0wn"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["vanishes", "truncated", "overwritten", "other text"])
def test_a_shard_that_breaks_in_mid_epoch_is_named(made: Any, tmp_path: Path, how: str, workers: int) -> None:
    _, tokens = made
    write_set(tmp_path / "qa", {"gl": [qa(i) for i in range(ROWS)]}, tokens, name="qa", shard_records=5)
    recipe = make_recipe(tmp_path, data={"workers": workers, "prefetch": 1, "block": 1}, batch={"global_batch": 1})
    plan, readers = open_data(recipe, tokens)
    steps = iter(Loader(plan, readers, tokens, recipe))
    open_shards = {int(readers[0].index.shard[ref.row]) for ref in plan.step(0).refs()}  # read when the loader starts
    shard = min(set(range(12)) - open_shards)
    damage(tmp_path / "qa" / "gl" / f"{shard:06d}.tar", how)
    with pytest.raises(UserError, match=rf"gl/{shard:06d}\.tar"):
        for _ in steps:
            pass
    assert multiprocessing.active_children() == []


class Counting:
    """An assembler that notes every micro-batch that it has made."""

    def __init__(self, assembler: Assembler, file: Path) -> None:
        self.assembler, self.file = assembler, file

    def batch(self, job: Job) -> LocalBatch:
        made = self.assembler.batch(job)
        with self.file.open("ab") as file:
            file.write(b".")
        return made


@pytest.mark.parametrize(("stage", "global_batch"), [("generative", 6), ("contrastive", 30)])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_whole_step_is_made_while_one_trains(
    made: Any, tmp_path: Path, stage: str, global_batch: int, workers: int
) -> None:
    root, tokens = made
    data = {"workers": workers, "prefetch": 1}
    loader = make_loader(make_recipe(root, stage, data=data, batch={"global_batch": global_batch}), tokens)
    loader._assembler = Counting(loader._assembler, tmp_path / "made")  # type: ignore[assignment]
    wanted = sum(len(loader._plan.step(number).micro_batches(0, 1)) for number in (0, 1))
    steps = iter(loader)
    next(steps)
    deadline = time.monotonic() + 20
    while (found := (tmp_path / "made").stat().st_size) < wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found >= wanted


def test_a_killed_loader_process_is_an_error_and_not_a_hang(made: Any) -> None:
    root, tokens = made
    steps = iter(make_loader(make_recipe(root, data={"workers": 2, "prefetch": 1}, batch={"global_batch": 1}), tokens))
    next(steps)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match="worker"):
        for _ in steps:
            pass
    assert time.perf_counter() - start < 30


def test_stop_signals_do_not_reach_the_loader_processes(made: Any) -> None:
    """A scheduler signals every process of the job; the trainer still needs its data to finish the step."""
    root, tokens = made
    recipe = make_recipe(root, data={"workers": 1, "prefetch": 1}, batch={"global_batch": 1})
    loader = make_loader(recipe, tokens)
    steps = iter(loader)
    next(steps)
    (process,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(process.pid, number)  # type: ignore[arg-type]
    assert sum(1 for _ in steps) == len(loader) - 1


ORPHANS = """
import multiprocessing, os, sys, time
sys.path[:0] = sys.argv[1:2]
import test_loader
from pathlib import Path
multiprocessing.set_start_method(sys.argv[3])
root = Path(sys.argv[2])
recipe = test_loader.make_recipe(root, data={"workers": 2, "prefetch": 64}, batch={"global_batch": 1},
    duration={"steps": 1000})
steps = iter(test_loader.make_loader(recipe, test_loader.Tokenization.load(str(root / "tokenizer"))))
next(steps)
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_no_loader_process_survives_a_killed_trainer(made: Any, method: str) -> None:
    """Their batches fill the pipe that nobody reads any more: an ordinary exit would wait on it for ever."""
    command = [sys.executable, "-c", ORPHANS, f"{Path(__file__).parent}", f"{made[0]}", method]
    paths = os.pathsep.join(map(str, (Path(__file__).parents[1], Path(__file__).parents[2])))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}) as run:
        assert run.stdout is not None
        pids = [int(pid) for pid in run.stdout.readline().split()]
        time.sleep(3)  # time to fill the pipe
        run.kill()
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def test_abandoning_the_loader_ends_its_processes(made: Any) -> None:
    root, tokens = made
    for _ in make_loader(make_recipe(root, data={"workers": 2}), tokens):
        break
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert multiprocessing.active_children() == []


def test_an_index_of_another_tokenizer_is_refused(made: Any, tmp_path: Path) -> None:
    root, _ = made
    make_tokenizer(tmp_path, bos=True)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true', 1))
    other = Tokenization.load(str(tmp_path))
    recipe = make_recipe(root)
    with pytest.raises(UserError, match="tokenizer"):  # found by the fingerprint
        open_data(recipe, other)
    readers = [ShardReader(open_set(root / "qa"), "gl")]
    with pytest.raises(UserError, match=r"gl/00000\d\.tar.*by the index.*another tokenizer"):  # and by the lengths
        Loader(make_plan(recipe, readers, other), readers, other, recipe)


def test_an_instruction_that_merges_with_the_text_is_refused(made: Any, tmp_path: Path) -> None:
    make_tokenizer(tmp_path, bos=True)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true', 1))
    tokens = Tokenization.load(str(tmp_path))
    write_set(tmp_path / "qa", {"cl": [qa(i) for i in range(9)]}, tokens, name="qa")
    recipe = make_recipe(tmp_path, "contrastive", contrastive={"passage_instruction": "Passage:\n"})
    with pytest.raises(UserError, match=r"contrastive\.passage_instruction: .*leave the instruction out, or"):
        make_loader(recipe, tokens)
    assert len(make_loader(recipe, tokens, start_step=1)) == 5  # judged when the run began, on other texts


def test_white_space_that_merges_with_an_instruction_ends_no_run(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, bos=True)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["model"]["vocab"]["ĊĊ"] = 400  # a token of two line breaks
    saved["model"]["merges"].append(["Ċ", "Ċ"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    tokens, instruction = Tokenization.load(str(tmp_path)), "Find the answer:\n"
    front, alone, both = tokens.encode([instruction, "\n  What", instruction + "\n  What"])
    assert front + alone != both
    records = [dataclasses.replace(qa(i), question="\n  " + question(i)) for i in range(9)]
    write_set(tmp_path / "qa", {"cl": records}, tokens, name="qa")
    recipe = make_recipe(tmp_path, "contrastive", contrastive={"query_instruction": instruction})
    begin = [BOS, *front, *alone]
    assert sum(x[: len(begin)] == begin for _, (x, _, _) in samples_of(make_loader(recipe, tokens))) == 2 * len(records)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_any_way_to_start_processes_will_do(made: Any, method: str) -> None:
    """Python 3.14 no longer forks by default; a job's parts must survive being pickled."""
    root, tokens = made
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        found = batches_of(make_loader(make_recipe(root, data={"workers": 1}), tokens))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert same(found, batches_of(make_loader(make_recipe(root), tokens)))


def test_a_server_that_goes_away_in_mid_run_is_no_mistake():
    class Away:
        def batch(self, job):
            raise UnreachableError("http://host/gl/000003.tar: could not be read in 5 attempts")

    with pytest.raises(ConnectionError, match=r"gl/000003.tar: could not be read"):
        _Batches(Away())[None]


def test_a_machine_without_loader_processes_is_named_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a read-only, full or missing /dev/shm."""

    def refused() -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    check_processes(2)
    monkeypatch.setattr(multiprocessing.get_context(), "Lock", refused, raising=False)
    check_processes(0)
    with pytest.raises(UserError, match=r"data.workers is 2.*/dev/shm.*Read-only file system.*data.workers=0"):
        check_processes(2)


@pytest.mark.parametrize("room", [0, 1, 13])
def test_loader_processes_that_get_too_few_semaphores_are_named(
    made: tuple[Path, Tokenization], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """As with a /dev/shm of a few KB, where the first few fit."""
    made_ones, real = list[int](), multiprocessing.synchronize.SemLock.__init__

    def limited(*given: Any, **named: Any) -> None:
        if len(made_ones) == room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        made_ones.append(1)
        real(*given, **named)

    steps = iter(make_loader(make_recipe(made[0], data={"workers": 2}), made[1]))
    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", limited)
    with pytest.raises(UserError, match=r"data.workers is 2.*/dev/shm.*No space left on device.*data.workers=0"):
        next(steps)
    assert multiprocessing.active_children() == []
