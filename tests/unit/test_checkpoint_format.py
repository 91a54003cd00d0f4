"""Checkpoints on disk: atomic under SIGKILL and a full disk, damage named by file, rotation, what is resumed from.

The writer is driven with made-up slices, without DeepSpeed, so that a trial costs milliseconds.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Alone
from safetensors.torch import load_file

from lbr_dist.disk import file_xxh128
from lbr_dist.errors import UserError
from lbr_dist.training.checkpoint import tensor_file as files
from lbr_dist.training.checkpoint.chosen import with_checkpoint
from lbr_dist.training.checkpoint.format import (
    MANIFEST,
    OptimizerEntry,
    Parameter,
    gaps,
    misnamed,
    read_manifest,
    verify,
)
from lbr_dist.training.checkpoint.listing import find_resumable, list_checkpoints, resolve
from lbr_dist.training.checkpoint.rotation import remove_stale
from lbr_dist.training.checkpoint.weights import (
    SliceReader,
    consolidate,
    iterate_weights,
    pack_rank_state,
    read_rank_state,
)
from lbr_dist.training.checkpoint.writer import CheckpointWriter, Snapshot, TensorFile

ELEMENTS = 50_000


def snapshot(step: int, elements: int = ELEMENTS, **changes) -> Snapshot:
    """A checkpoint in which every element is the step's number."""
    tensor = torch.full((elements,), float(step))
    tensors, metadata = pack_rank_state({"rng": torch.arange(5), "seed": [1, 2]})
    manifest = {
        "created": "now",
        "zero_stage": 3,
        "versions": {},
        "parameters": [Parameter(name="a.w", shape=(elements // 10, 10), dtype="F32", trained=True)],
        "tied": {},
        "optimizer": OptimizerEntry(family="adam", keys=["exp_avg"], step=step),
        "engine": {"global_steps": step},
        "state": {"step": step},
    }
    slices = [(0, 0, elements)]
    return Snapshot(
        step=step,
        manifest={**manifest, **changes},
        tensor_files=[
            TensorFile("weights", {"a.w": tensor}, slices),
            TensorFile("optimizer", {"exp_avg:a.w": tensor * 2}, slices),
            TensorFile("rank", tensors, metadata=metadata),
        ],
        extra={"recipe.yaml": b"seed: 0\n", "model/config.json": b"{}"},
    )


def writer(run: Path, keep_last: int = 9, keep_every: int | None = None) -> CheckpointWriter:
    return CheckpointWriter(run, Alone(), keep_last, keep_every)


def save(target: CheckpointWriter, *steps: int, **options) -> None:
    for step in steps:
        target.submit(snapshot(step, **options))
        target.wait()


def names(run: Path) -> list[str]:
    return [path.name for path, _ in list_checkpoints(run)]


def weights_file(run: Path, step: int, kind: str = "weights") -> Path:
    return run / "checkpoints" / f"step-{step:06d}" / f"{kind}-00000-of-00001.safetensors"


def test_written_files_are_plain_safetensors(tmp_path):
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "flags": torch.tensor([True, False]),
    }
    specs = [files.TensorSpec(name, files.NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    written = files.write_tensors(tmp_path / "x.safetensors", specs, iter(tensors.values()), {"k": "v"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert written == files.Written(
        (tmp_path / "x.safetensors").stat().st_size, file_xxh128(tmp_path / "x.safetensors")
    )


def test_a_checkpoint_reads_back(tmp_path):
    save(writer(tmp_path), 500)
    folder = tmp_path / "checkpoints" / "step-000500"
    assert verify(folder) == []
    assert find_resumable(tmp_path) == (folder, [])
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000500\n"
    ((name, tensor),) = iterate_weights(tmp_path)
    assert name == "a.w"
    assert torch.equal(tensor, torch.full((ELEMENTS // 10, 10), 500.0))
    state = read_rank_state(weights_file(tmp_path, 500, "rank"))
    assert torch.equal(state.pop("rng"), torch.arange(5))
    assert state == {"seed": [1, 2]}
    assert read_manifest(folder).state == {"step": 500}
    assert (folder / "model" / "config.json").read_bytes() == b"{}"


def test_every_kind_of_damage_is_named_and_passed_over(tmp_path):
    save(writer(tmp_path), 1, 2, 3, 4, 5, 6, 7, 8)
    folder = tmp_path / "checkpoints"
    (folder / "step-000008" / MANIFEST).unlink()
    (folder / "step-000008" / MANIFEST).symlink_to(MANIFEST)  # no file system that fails is at hand
    with weights_file(tmp_path, 7).open("r+b") as file:
        file.truncate(1000)
    with weights_file(tmp_path, 6, "optimizer").open("r+b") as file:
        file.seek(ELEMENTS)
        byte = file.read(1)[0]
        file.seek(ELEMENTS)
        file.write(bytes([byte ^ 1]))
    weights_file(tmp_path, 5, "rank").unlink()
    (folder / "step-000004" / MANIFEST).unlink()
    manifest = folder / "step-000003" / MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b'"global_steps":3', b'"global_steps":4'))
    (folder / "step-000002" / MANIFEST).write_bytes(b'{"format": 1')
    (folder / ".tmp-step-000009-ab").mkdir()

    found, reasons = find_resumable(tmp_path)
    assert found == folder / "step-000001"
    text = "\n".join(reasons)
    assert f"{folder / 'step-000008' / MANIFEST}: cannot be read (Too many levels of symbolic links)" in text
    assert f"{weights_file(tmp_path, 7)}: 1000 bytes, expected" in text
    assert "truncated" in text
    assert f"{weights_file(tmp_path, 6, 'optimizer')}: damaged (its checksum does not match)" in text
    assert f"{weights_file(tmp_path, 5, 'rank')}: missing" in text
    assert f"{folder / 'step-000004' / MANIFEST}: missing" in text
    assert f"{manifest}: damaged (its checksum does not match)" in text
    assert f"{folder / 'step-000002' / MANIFEST}: damaged" in text
    assert f"{folder / '.tmp-step-000009-ab'}: never committed" in text
    assert len(reasons) == 8
    (folder / "step-000002" / MANIFEST).write_bytes(b"[]")
    assert verify(folder / "step-000002") == [f"{folder / 'step-000002' / MANIFEST}: damaged (TypeError)"]


def test_a_run_without_a_good_checkpoint_is_an_error_that_says_why(tmp_path):
    with pytest.raises(UserError, match="neither a checkpoint"):
        resolve(tmp_path)
    save(writer(tmp_path), 1)
    weights_file(tmp_path, 1).unlink()
    with pytest.raises(UserError, match=r"weights-00000-of-00001.safetensors: missing"):
        list(iterate_weights(tmp_path))
    with pytest.raises(UserError, match=r"step-000001: this checkpoint cannot be used: .*safetensors: missing"):
        list(iterate_weights(tmp_path / "checkpoints" / "step-000001"))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_not_used_though_it_is_named(tmp_path, caplog):
    save(writer(tmp_path), 1, 2)
    newest = tmp_path / "checkpoints" / "step-000002"
    assert resolve(newest) == resolve(tmp_path) == newest
    assert not caplog.records
    flip(weights_file(tmp_path, 2))
    assert resolve(newest, kinds=()) == newest
    for use in (resolve, lambda path: list(iterate_weights(path)), lambda path: consolidate(path, tmp_path / "out")):
        with pytest.raises(UserError, match=r"step-000002: this checkpoint cannot be used: .*weights-.*: damaged"):
            use(newest)
    assert not (tmp_path / "out").exists()
    assert resolve(tmp_path).name == "step-000001"
    assert "step-000001 is used; passed over: " in caplog.text
    assert f"{weights_file(tmp_path, 2)}: damaged" in caplog.text


def test_a_process_reads_a_checkpoint_once(tmp_path, monkeypatch):
    """`lbr export` and `eval` take it apart in several steps, each of which resolves it."""
    save(writer(tmp_path), 1)
    read = []
    monkeypatch.setattr(
        "lbr_dist.training.checkpoint.format.file_xxh128", lambda path: read.append(path) or file_xxh128(path)
    )
    checkpoint = resolve(tmp_path)
    count = len(read)
    assert resolve(tmp_path) == resolve(checkpoint) == checkpoint
    assert len(read) == count > 0


def test_a_file_that_could_not_be_read_once_is_read_again(tmp_path, monkeypatch):
    save(writer(tmp_path), 1)
    checkpoint = tmp_path / "checkpoints" / "step-000001"

    def failing(path):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr("lbr_dist.training.checkpoint.format.file_xxh128", failing)
        with pytest.raises(UserError, match=r"cannot be read \(Input/output error\)"):
            resolve(checkpoint)
    assert resolve(checkpoint) == checkpoint


def test_whoever_wants_the_weights_reads_no_optimizer(tmp_path):
    """Each process that embeds would read twice as much as it needs again."""
    save(writer(tmp_path), 1, 2)
    newest = tmp_path / "checkpoints" / "step-000002"
    [optimizer] = newest.glob("optimizer-*")
    flip(optimizer)
    assert resolve(newest) == newest
    assert verify(newest) == [f"{optimizer}: damaged (its checksum does not match)"]
    assert find_resumable(tmp_path)[0] == tmp_path / "checkpoints" / "step-000001"


def test_a_checkpoint_that_is_being_written_is_no_warning(tmp_path, caplog):
    """`lbr eval RUN` may be called while the run trains."""
    save(writer(tmp_path), 1)
    (tmp_path / "checkpoints" / ".tmp-step-000002-abc").mkdir()
    assert resolve(tmp_path).name == "step-000001"
    assert not caplog.records


def test_a_checkpoint_that_the_run_removes_while_it_is_read(tmp_path, monkeypatch):
    """`lbr export`, `consolidate` and `model.start_from` may be given a run that trains: they take the next one."""
    folder = tmp_path / "checkpoints"

    def use(checkpoint: Path) -> int:
        if checkpoint.name in removed:
            shutil.rmtree(checkpoint)
        return read_manifest(checkpoint).step

    save(writer(tmp_path), 4, 5, 6)
    removed = ["step-000006"]
    assert with_checkpoint(tmp_path, use) == 5
    removed = ["step-000005", "step-000004"]
    with pytest.raises(UserError, match=r"step-000004: was removed meanwhile.*: run again, or name one that is kept"):
        with_checkpoint(tmp_path, use)
    save(writer(tmp_path), 4, 5)
    with pytest.raises(UserError, match=r"step-000005: was removed meanwhile"):
        with_checkpoint(folder / "step-000005", use)
    with pytest.raises(ZeroDivisionError):
        with_checkpoint(tmp_path, lambda _: 1 // 0)

    reader = SliceReader(folder / "step-000004", read_manifest(folder / "step-000004"))
    shutil.rmtree(folder / "step-000004")
    with pytest.raises(UserError, match=r"step-000004: was removed meanwhile"):
        reader.weight(reader.manifest.parameters[0])

    def rotate(path: Path, **options) -> list[str]:
        if path.name == "step-000007":
            save(writer(tmp_path), 8)
            shutil.rmtree(path)
        return verify(path, **options)

    save(writer(tmp_path), 6, 7)
    monkeypatch.setattr("lbr_dist.training.checkpoint.listing.verify", rotate)
    assert resolve(tmp_path).name == "step-000008"


def test_consolidate_begins_again_where_the_run_removed_the_checkpoint(tmp_path, monkeypatch):
    save(writer(tmp_path), 1, 2)
    weight = SliceReader.weight

    def rotate(reader, parameter):
        if reader.checkpoint.name == "step-000002":
            shutil.rmtree(reader.checkpoint)
        return weight(reader, parameter)

    monkeypatch.setattr(SliceReader, "weight", rotate)
    (shard,) = consolidate(tmp_path, tmp_path / "out")
    assert load_file(shard)["a.w"].unique() == 1


def test_slices_that_do_not_add_up_are_not_committed(tmp_path):
    target = writer(tmp_path)
    save(target, 1)
    part = snapshot(2)
    part.tensor_files[0].slices[:] = [(0, 10, ELEMENTS)]
    target.submit(part)
    with pytest.raises(UserError, match=r"weights of a.w: elements are missing or stored twice"):
        target.wait()
    assert names(tmp_path) == ["step-000001"]
    overlap = read_manifest(tmp_path / "checkpoints" / "step-000001")
    entry = overlap.files["weights-00000-of-00001.safetensors"]
    entry.slices.append((0, 10, 20))
    assert gaps(overlap)


def test_rotation_keeps_the_newest_and_the_multiples(tmp_path):
    save(writer(tmp_path, keep_last=2, keep_every=4), *range(1, 8))
    assert names(tmp_path) == ["step-000007", "step-000006", "step-000004"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")) == []


def test_going_back_to_an_older_step_makes_it_the_newest(tmp_path):
    save(writer(tmp_path, keep_last=3), 300, 500)
    save(writer(tmp_path, keep_last=3), 350)  # restarted from 300
    found, reasons = find_resumable(tmp_path)
    assert found is not None
    assert found.name == "step-000350"
    assert len(reasons) == 1
    assert "step-000500: a later step, but committed before step-000350" in reasons[0]
    save(writer(tmp_path, keep_last=1), 400)
    assert names(tmp_path) == ["step-000400"]


def test_a_folder_with_the_name_of_another_step_is_known_by_its_manifest(tmp_path):
    save(writer(tmp_path), 15, 20)
    kept = tmp_path / "checkpoints"
    (kept / "step-000015").rename(kept / "step-000099")
    (path, manifest), (other, older) = list_checkpoints(tmp_path)
    assert (path.name, other.name, older.step) == ("step-000020", "step-000099", 15)
    assert find_resumable(tmp_path) == (path, [])  # nothing of step 99 to be passed over
    assert (misnamed(path, manifest), misnamed(other, older)) == ("", "its own name is step-000015")
    assert misnamed(Path("copy-of-step-15"), older) == ""


def test_the_same_step_again_replaces_the_old_one(tmp_path):
    save(writer(tmp_path), 5)
    weights_file(tmp_path, 5).write_bytes(b"damaged")
    save(writer(tmp_path), 5)
    assert verify(tmp_path / "checkpoints" / "step-000005") == []
    assert read_manifest(tmp_path / "checkpoints" / "step-000005").sequence == 2


def test_stale_folders_are_removed_and_a_replaced_one_comes_back(tmp_path):
    save(writer(tmp_path), 5, 6)
    folder = tmp_path / "checkpoints"
    (folder / "step-000006").rename(folder / ".replaced-step-000006")  # died between the two renames
    shutil.copytree(folder / "step-000005", folder / ".discarded-step-000004")
    shutil.copytree(folder / "step-000005", folder / ".tmp-step-000007-ab")
    remove_stale(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-000005", "step-000006"]
    assert verify(folder / "step-000006") == []


def test_a_start_names_the_newest_checkpoint_where_a_writer_died_before_it_could(tmp_path):
    save(writer(tmp_path), 5, 6)
    latest = tmp_path / "checkpoints" / "latest"
    latest.write_text("step-000005\n")
    writer(tmp_path)
    assert latest.read_text() == "step-000006\n"
    latest.unlink()
    latest.mkdir()
    writer(tmp_path)  # the next save tells


def _save_forever(run: str, step: int, started: Any) -> None:
    target = writer(Path(run), keep_last=2)
    started.set()
    while True:
        step += 1
        save(target, step)


def test_sigkill_at_any_moment_leaves_a_good_checkpoint(tmp_path):
    """A process that only saves is killed until 20 kills have fallen into a save; each time the newest one is good."""
    chance, context = random.Random(0), multiprocessing.get_context("fork")
    begin = time.perf_counter()
    save(writer(tmp_path), 1, 2, 3)
    duration = (time.perf_counter() - begin) / 3
    reached = during = 0
    for _ in range(400):
        started = context.Event()
        process = context.Process(target=_save_forever, args=(str(tmp_path), max(reached, 3), started))
        process.start()
        assert started.wait(30)
        time.sleep(chance.uniform(0, 3 * duration))
        process.kill()
        process.join()
        during += any((tmp_path / "checkpoints").glob(".tmp-step-*"))
        found, reasons = find_resumable(tmp_path)
        assert found is not None, reasons
        assert all("never committed" in reason for reason in reasons)
        assert read_manifest(found).step >= reached
        reached = read_manifest(found).step
        weights = load_file(found / "weights-00000-of-00001.safetensors")["a.w"]
        assert torch.equal(weights.unique(), torch.tensor([float(reached)]))
        if during == 20:
            break
    assert during == 20
    save(writer(tmp_path, keep_last=1), reached + 1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", f"step-{reached + 1:06d}"]


def _check_full_disk(run: Path, target: CheckpointWriter, elements: int) -> None:
    target.submit(snapshot(2, elements))
    with pytest.raises(UserError) as caught:
        target.wait()
    text = str(caught.value)
    assert "step-000002" in text
    assert "No space left on device" in text
    assert "GiB free" in text
    assert str(run) in text
    assert find_resumable(run) == (run / "checkpoints" / "step-000001", [])
    assert list((run / "checkpoints").glob(".tmp-*")) == []
    save(target, 3)  # space is back, or the next save is smaller
    assert names(run)[0] == "step-000003"


def test_a_full_disk_is_reported_and_harms_nothing(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs root to mount a small tmpfs")
    try:
        target = writer(disk, keep_last=1)
        save(target, 1)
        _check_full_disk(disk, target, elements=2_000_000)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_an_error_of_the_disk_is_reported_and_harms_nothing(tmp_path, monkeypatch):
    target = writer(tmp_path)
    save(target, 1)
    flush = os.fsync

    def full(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.name.startswith("optimizer") and "step-000002" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    _check_full_disk(tmp_path, target, elements=ELEMENTS)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    flush, gate = os.fsync, multiprocessing.Event()

    def slow(descriptor: int) -> None:
        gate.wait(20)
        flush(descriptor)

    target = writer(tmp_path)
    monkeypatch.setattr(os, "fsync", slow)
    target.submit(snapshot(1))
    assert names(tmp_path) == []
    gate.set()
    target.wait()
    assert names(tmp_path) == ["step-000001"]


def test_consolidate_leaves_nothing_half_written(tmp_path, monkeypatch):
    save(writer(tmp_path), 1)
    for size in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"--max-shard-gib .* above 0"):
            consolidate(tmp_path, tmp_path / "out", max_shard_gib=size)
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match=r"consolidate to .*: (it is a file|cannot be made)"):
            consolidate(tmp_path, out)
    before = sorted(tmp_path.iterdir())

    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("lbr_dist.training.checkpoint.weights.replace_bytes", full)  # the last file
    with pytest.raises(UserError, match="No space left on device; nothing was left behind"):
        consolidate(tmp_path, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_consolidate_refuses_a_folder_with_content(tmp_path):
    save(writer(tmp_path), 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(UserError, match="is not empty"):
        consolidate(tmp_path, tmp_path / "out")
    shards = consolidate(tmp_path, tmp_path / "new")
    assert [shard.name for shard in shards] == ["model-00001-of-00001.safetensors"]
    assert all(shard.is_file() for shard in shards)
    assert (tmp_path / "new" / "model" / "config.json").is_file()
    assert json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())["metadata"] == {
        "total_size": 4 * ELEMENTS
    }
