from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepared import WORDS, contents, domain, everything, questions_and_texts, run, write

from lbr_dist.data import record as record_module
from lbr_dist.data import shard_writer
from lbr_dist.data.preparation import first_pass, pipeline
from lbr_dist.data.preparation.isolation import Crossings
from lbr_dist.data.preparation.prepare import prepare
from lbr_dist.data.record import normalise
from lbr_dist.data.shard_reader import ShardReader
from lbr_dist.data.shards import open_set, verify
from lbr_dist.errors import UserError


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    return questions_and_texts(tmp_path)


def test_sides_share_nothing(sources: list[str], tmp_path: Path) -> None:
    report = run(sources, tmp_path / "out", sizes={"gl": 0.6, "cl": 0.25, "eval": 0.15}, shard_records=64)
    sides = everything(tmp_path / "out")
    entities = [{row["id"].split(":")[0] for row in sides[split] if "question" in row} for split in sides]
    assert all(entities)
    assert len(set.union(*entities)) == sum(map(len, entities)) == 100
    held = {normalise(row["answer"]) for row in sides["eval"]}
    texts = [normalise(row["text"]) for row in sides["gl"] if "text" in row]
    assert len(texts) >= 50
    assert not [text for text in texts if any(answer in text for answer in held)]

    data = json.loads((tmp_path / "out/report.json").read_text())
    assert data == report.data
    kept = sum(len(rows) for rows in sides.values())
    assert data["isolation"]["compared_records"] == kept
    assert set(data["isolation"]["shared_texts"].values()) == set(data["isolation"]["near_duplicates"].values()) == {0}
    assert data["components"]["count"] == 100
    assert data["components"]["on_two_sides"] == 0
    assert data["dropped"]["text_like_evaluation"] >= len(sides["eval"]) - 15
    assert data["dropped"]["text_contains_evaluation"] == len(sides["eval"])
    assert data["rows"]["read"] == kept + sum(data["dropped"].values())
    verify(open_set(tmp_path / "out"))


def test_the_proof_can_fail(sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lbr_dist.data.preparation import pipeline

    real = pipeline.assign

    def leaky(*args: Any) -> Any:
        side = real(*args)
        side[args[1].nonzero()[0][:2]] = [0, 2]  # two questions of one entity
        return side

    monkeypatch.setattr(pipeline, "assign", leaky)
    monkeypatch.setattr(pipeline, "crossings", lambda *args, **kwargs: Crossings())  # and nobody looks
    with pytest.raises(RuntimeError, match=r"the sides of .* are not isolated"):
        run(sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_same_input_same_bytes_and_second_run_does_nothing(sources: list[str], tmp_path: Path) -> None:
    first = run(sources, tmp_path / "a", name="n", seed=3, shard_records=50)
    run(sources[::-1], tmp_path / "b", name="n", seed=3, shard_records=50)  # nor does the order of files matter
    shards = sorted((tmp_path / "a").rglob("*.tar"))
    assert len(shards) > 6
    for path in shards:
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    again = run(sources, tmp_path / "a", name="n", seed=3, shard_records=50)
    assert again.unchanged
    assert again.data == first.data
    assert "up to date" in again.lines[0]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    assert run(sources, tmp_path / "c", name="n", seed=4, shard_records=50).data["set"] != first.data["set"]


def test_other_input_is_refused_or_replaced(sources: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(sources, out)
    with pytest.raises(UserError, match=r"made from other input \(--seed was 0, is 5\): choose another .*--overwrite"):
        run(sources, out, seed=5)
    with Path(sources[0]).open("a") as file:
        file.write(json.dumps({"question": "one", "answer": "more"}) + "\n")
    with pytest.raises(UserError, match=r"made from other input \(sources\)"):
        run(sources, out)
    changed = r"\(sources; --cl was 0.25, is 0.1; --entity was not given, is id; --max-chars was 100000, is 99999\)"
    with pytest.raises(UserError, match=changed):
        run(sources, out, sizes={"cl": 0.1}, entity="id", max_chars=99_999)
    with pytest.raises(
        UserError, match=r"\(sources; --gl was rest, is 0; --cl was 0.25, is rest; --paragraphs was off, is on\)"
    ):
        run(sources, out, sizes={"cl": "rest"}, paragraphs=True)
    assert not run(sources, out, seed=5, overwrite=True).unchanged
    assert open_set(out).manifest["seed"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.txt.gz", "out", "qa.jsonl"]


def test_damaged_output_is_not_taken_for_finished(sources: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(sources, out)
    shard = out / "gl/000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(UserError, match="holds a damaged set"):
        run(sources, out)
    assert not run(sources, out, overwrite=True).unchanged
    assert verify(open_set(out))


def test_overwrite_finds_a_changed_byte(sources: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(sources, out)
    assert run(sources, out, overwrite=True).unchanged
    shard = out / "gl/000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    with pytest.raises(UserError, match="prepare it with --overwrite"):
        verify(open_set(out))
    assert run(sources, out).unchanged  # by the sizes
    assert not run(sources, out, overwrite=True).unchanged
    assert shard.read_bytes() == whole


def test_folders_that_are_not_ours_are_left_alone(sources: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty and holds no prepared set"):
        run(sources, tmp_path / "mine", overwrite=True)
    with pytest.raises(UserError, match="is not a folder"):
        run(sources, Path(sources[0]), overwrite=True)
    (tmp_path / "empty").mkdir()
    assert not run(sources, tmp_path / "empty").unchanged


def test_no_set_is_made_in_another(sources: list[str], tmp_path: Path) -> None:
    run(sources, tmp_path / "out")
    for inside in ("out/more", "out/eval/more"):
        with pytest.raises(UserError, match=r"more: lies in the prepared set .*: name another folder"):
            run(sources, tmp_path / inside)


def test_what_a_killed_run_left_is_cleared(sources: list[str], tmp_path: Path) -> None:
    stale = tmp_path / ".out.preparing"
    (stale / "set/gl").mkdir(parents=True)
    (stale / "set/manifest.json").write_text("{}")
    (stale / "spool").write_text("x")
    run(sources, tmp_path / "out")
    assert not stale.exists()
    (tmp_path / "out").rename(tmp_path / ".out.old")  # killed between the two renames of an overwrite
    assert run(sources, tmp_path / "out").unchanged
    assert not (tmp_path / ".out.old").exists()


def test_two_runs_for_one_folder(sources: list[str], tmp_path: Path) -> None:
    (tmp_path / ".out.preparing").mkdir()
    lock = os.open(tmp_path / ".out.preparing", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another lbr process is writing it"):
        run(sources, tmp_path / "out")
    os.close(lock)


@pytest.mark.parametrize("changed", ["rewritten", "removed"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_source_that_is_changed_while_it_is_read_is_named(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, changed: str
) -> None:
    """The manifest would name the content that it had before."""
    held = write(tmp_path / "held.jsonl", [{"question": f"held {i}?", "answer": f"held answer {i}"} for i in range(9)])
    files = [*map(Path, sources), held]
    kept, real = files[number].read_bytes(), pipeline.Pipeline._read

    def read(*args: Any) -> Any:
        found = real(*args)
        files[number].unlink()
        if changed == "rewritten":
            files[number].write_bytes(kept[:-1])
        return found

    monkeypatch.setattr(pipeline.Pipeline, "_read", read)
    with pytest.raises(UserError, match=f"{files[number].name}: was changed while it was read"):
        run(sources, tmp_path / "out", decontaminate=[str(held)])
    assert not list(tmp_path.glob("*out*"))
    monkeypatch.undo()
    files[number].write_bytes(kept)
    run(sources, tmp_path / "out", decontaminate=[str(held)])


def fail_in_writing(monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    real = shard_writer.ShardWriter._put
    calls = 0

    def put(self: Any, data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == 300:
            raise failure
        real(self, data)

    monkeypatch.setattr(shard_writer.ShardWriter, "_put", put)


def test_nothing_is_left_when_the_disk_is_full(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_writing(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(UserError, match=r"the disk is full .* nothing was left behind: free space"):
        run(sources, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.txt.gz", "qa.jsonl"]


def test_an_interrupted_run_goes_on_where_it_stopped(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks and shards that were committed are taken over, unless the sources have changed."""
    monkeypatch.setattr(first_pass, "BLOCK_ROWS", 50)
    settings: dict[str, Any] = {"shard_records": 30, "name": "same"}
    run(sources, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        fail_in_writing(patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(sources, tmp_path / "out", **settings)
    assert [path.name for path in (tmp_path / ".out.preparing").iterdir()] == ["resume"]
    digested, written = [], []
    real_write, real_records = shard_writer.ShardWriter.write, first_pass.DigestRows._records
    monkeypatch.setattr(
        shard_writer.ShardWriter, "write", lambda self, *rest: written.append(len(rest[0])) or real_write(self, *rest)
    )
    monkeypatch.setattr(
        first_pass.DigestRows, "_records", lambda *rest: digested.append(rest[1].number) or real_records(*rest)
    )
    run(sources, tmp_path / "out", **settings)
    shards = [len(info.shards) for info in open_set(tmp_path / "whole").splits.values()]
    assert digested == []
    assert 0 < len(written) < sum(shards)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / ".out.preparing").exists()


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_what_a_lost_disk_cache_left_of_an_interrupted_run_is_made_again(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    """Of a machine that lost its power, files may be empty or hold other bytes although others commit them."""
    monkeypatch.setattr(first_pass, "BLOCK_ROWS", 50)
    settings: dict[str, Any] = {"shard_records": 30, "name": "same"}
    run(sources, tmp_path / "whole", **settings)
    committed = ("blocks/*.npz", "blocks/*.records", "shards/*.json", "set/gl/*.tar", "set/gl/*.parquet")
    for kinds in (("job.json",), committed):
        with monkeypatch.context() as patch:
            fail_in_writing(patch, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                run(sources, tmp_path / "out", **settings)
        for number, kind in enumerate(kinds):
            file = sorted((tmp_path / ".out.preparing/resume").glob(kind))[number % 3]  # of each block or shard one
            file.write_bytes(damage(file.read_bytes()))
        run(sources, tmp_path / "out", **settings)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


def test_what_was_committed_for_other_input_is_not_used(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_in_writing(patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(sources, tmp_path / "out", name="same")
    write(Path(sources[0]), domain(seed=5))
    run(sources, tmp_path / "out", name="same")
    run(sources, tmp_path / "whole", name="same")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(160):
        write(tmp_path / f"in/{i:03}.jsonl", [{"question": f"q {i}", "answer": f"a {i}"}])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
    try:
        report = run([str(tmp_path / "in")], tmp_path / "out", sizes={"gl": 1.0, "cl": 0, "eval": 0})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert report.data["rows"]["read"] == 160


def test_sketches_are_on_disk_twice_at_most(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the blocks and joined, or in the blocks and in the proof: of short texts they are the most by far."""
    found, real = list[list[str]](), pipeline.prove

    def prove(root: Path, folder: Path, *rest: Any, **more: Any) -> Any:
        found.append([path.name for path in root.parent.glob("sketches/*")])
        isolation = real(root, folder, *rest, **more)
        found.append([path.name for path in folder.glob("*.npz")])
        return isolation

    monkeypatch.setattr(pipeline, "prove", prove)
    run(sources, tmp_path / "out")
    assert found == [[], []]


def test_blocks_do_not_change_the_output(sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(sources, tmp_path / "one", name="same", shard_records=30)
    monkeypatch.setattr(first_pass, "BLOCK_ROWS", 7)
    monkeypatch.setattr("lbr_dist.data.preparation.pipeline.SLICE", 11)
    run(sources, tmp_path / "many", name="same", shard_records=30)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_bad_rows_are_counted_by_reason_and_the_first_is_named(tmp_path: Path) -> None:
    lines = [json.dumps(row).encode() for row in domain()]
    lines[10] = b'{"id": "x1", "question": "q"}'
    lines[20] = b'{"id": "x2", "question": "q", "answer": true}'
    lines[30] = b'{"id": "x3", "question": "q", "answer": "\xff"}'
    lines[40] = b"{not json"
    lines[50] = b"{nor this"
    lines[60] = b'{"id": "e0:0", "question": "other", "answer": "content"}'
    lines[70] = lines[71]
    lines[80] = b'{"id": "x4", "question": "q", "answer": " "}'
    lines[90] = b'{"id": "x5", "question": "q", "answer": "' + b"x" * 501 + b'"}'
    path = tmp_path / "qa.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError) as caught:
        run([str(path)], tmp_path / "out", max_chars=500)
    message = str(caught.value)
    assert f"8 of {len(lines)} rows are bad, more than --max-bad-share 0.01 allows: 2 invalid_json (first: " in message
    assert f"{path} line 41: Expecting property name" in message
    assert not list(tmp_path.glob("*out*"))

    data = run([str(path)], tmp_path / "out", max_chars=500, max_bad_share=0.05).data
    bad = data["rows"]["bad"]
    assert {reason: (entry["count"], entry["first"].split(":")[0]) for reason, entry in bad["by_reason"].items()} == {
        "missing_field": (1, f"{path} line 11"),
        "wrong_type": (1, f"{path} line 21"),
        "invalid_utf8": (1, f"{path} line 31"),
        "invalid_json": (2, f"{path} line 41"),
        "duplicate_id": (1, f"{path} line 61"),
        "empty": (1, f"{path} line 81"),
        "too_long": (1, f"{path} line 91"),
    }
    assert (bad["total"], data["dropped"]["repeated_row"]) == (8, 1)
    assert sum(info["records"] for info in data["records"].values()) == len(lines) - 9


def test_hopeless_source_stops_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbr_dist.data.preparation.first_pass.HOPELESS", 20)
    path = write(tmp_path / "a.jsonl", [{"frage": "q", "antwort": "a"}] * 500)
    with pytest.raises(
        UserError, match=r"first 20 rows of .*a.jsonl are bad.*line 1: cannot tell .* fields frage, antwort"
    ):
        run([str(path)], tmp_path / "out", max_bad_share=1)


def test_wrong_answers_are_left_out_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbr_dist.data.preparation.first_pass.HOPELESS", 10)
    rows = [{"question": f"q {i}", "answer": f"a {i}", "label": int(i >= 30)} for i in range(60)]
    path = write(tmp_path / "qa.jsonl", rows)
    with pytest.raises(UserError, match=r"30 of 60 rows are bad, .* label is 0, .*--max-bad-share 1"):
        run([str(path)], tmp_path / "out")
    report = run([str(path)], tmp_path / "out", max_bad_share=1).data
    assert report["rows"]["bad"]["by_reason"]["wrong_answer"]["count"] == 30
    assert sum(side["records"] for side in report["records"].values()) == 30


def test_options_that_are_counted_from_1_stop_their_source(tmp_path: Path) -> None:
    rows = [{"question": f"q {i}", "options": [f"a{i}", f"b{i}"], "answer": str(i % 2)} for i in range(40)]
    path = write(tmp_path / "zero.jsonl", rows)
    from_one = write(tmp_path / "one.jsonl", [{**row, "answer": int(row["answer"]) + 1} for row in rows])
    with pytest.raises(UserError, match=r"one\.jsonl: gives right options by numbers that count from 1 .*letters"):
        run([str(path), str(from_one)], tmp_path / "out", max_bad_share=1)
    write(from_one, [{**row, "answer": int(row["answer"]) + 1} for row in rows[:9]])
    report = run([str(path)], tmp_path / "out", decontaminate=[str(from_one)])
    assert report.data["dropped"]["connected_to_external_evaluation"] == 9


def test_empty_sources(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"a.jsonl: no records: the sources are empty"):
        run([str(tmp_path / "a.jsonl")], tmp_path / "out")
    with pytest.raises(UserError, match="no sources"):
        run([], tmp_path / "out")
    sources = [str(write(tmp_path / "b.jsonl", [{"question": "q", "answer": "a"}])), str(tmp_path / "a.jsonl")]
    assert f"note: sources without a row: 1 (first: {tmp_path}/a.jsonl)" in run(sources, tmp_path / "out").lines


def test_files_that_a_folder_passes_over_are_told(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/qa.jsonl", domain())
    (tmp_path / "in/README.md").touch()
    assert "note: passed over in folders: 1 .md" in run([str(tmp_path / "in")], tmp_path / "out").lines
    (tmp_path / "in/squad.JSON").touch()
    note = "1 .json, 1 .md (a .json file is read if it is named, or a quoted glob matches it)"
    lines = run([str(tmp_path / "in")], tmp_path / "two").lines
    assert lines[0] == f"warning: passed over in folders: {note}"  # more than were read


def test_what_files_are_read_as_is_told_those_that_are_alike_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "in"
    root.mkdir()
    rows = [{"prompt": row["question"], "text": row["answer"], "test": 1} for row in domain()]
    for number in range(10):
        write(root / f"qa{number}.jsonl", [{"prompt": "no answer"}, *rows[number * 10 :][:10]])
    write(root / "texts.jsonl", [{"code": "t", "repo": "r"}])
    tests = write(tmp_path / "tests.jsonl", [{"query": "withheld", "gold": None}])
    report = run([str(root)], tmp_path / "out", max_bad_share=0.5, decontaminate=[str(tests)])
    told = [
        f"{root}/qa0.jsonl and 9 more: query-document (question = prompt, answer = text; not used: test)",
        f"{root}/texts.jsonl: corpus (text = code; not used: repo)",
        f"--decontaminate {tests}: question alone (question = query; not used: gold)",
    ]
    assert report.lines[1:4] == told
    assert report.data["read_as"]["sources"][0] == {
        "as": told[0].partition(": ")[2],
        "files": 10,
        "first": f"{root}/qa0.jsonl",
    }
    monkeypatch.setattr(first_pass, "MOST_READ_AS", 2)
    for number in range(3):
        write(root / f"z{number}.jsonl", [{"text": f"t{number}", f"f{number}": 1}])
    report = run([str(root)], tmp_path / "more", max_bad_share=0.5)
    assert report.lines[1:3] == [told[0], f"{root}/texts.jsonl and 3 more: 4 other forms"]


def test_rows_that_two_files_hold_do_not_depend_on_their_order(tmp_path: Path) -> None:
    rows = [{"question": f"q {i}", "answer": f"a {i}"} for i in range(60)]
    sources = [str(write(tmp_path / "a.jsonl", rows)), str(write(tmp_path / "b.jsonl", rows[20:]))]
    assert run(sources, tmp_path / "one", name="n").data["dropped"]["repeated_row"] == 40
    run(sources[::-1], tmp_path / "two", name="n")
    assert everything(tmp_path / "one") == everything(tmp_path / "two")
    assert open_set(tmp_path / "one").fingerprint == open_set(tmp_path / "two").fingerprint
    assert run(sources[::-1], tmp_path / "one", name="n").unchanged


def test_only_bad_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"frage": "q"}])
    with pytest.raises(UserError, match=r"no records: all rows are bad: 1 missing_field \(first: .*a.jsonl line 1"):
        run([str(path)], tmp_path / "out", max_bad_share=1)


@pytest.mark.parametrize("role", ["id", "domain", "source", "negatives", "positives", "label"])
def test_a_field_that_no_row_has(tmp_path: Path, role: str) -> None:
    texts = write(tmp_path / "texts.jsonl", [{"text": f"t {i}"} for i in range(20)])
    path = write(tmp_path / "qa.jsonl", [{"question": f"q {i}", "answer": f"a {i}", "kez": "x"} for i in range(20)])
    with pytest.raises(UserError, match=rf"--field {role}=key: no row has such a field; the first row .* answer, kez"):
        run([str(path), str(texts)], tmp_path / "out", fields={role: "key"})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[7]["key"] = "k"
    run([str(write(path, rows)), str(texts)], tmp_path / "out", fields={role: "key"})
    if role != "id":
        run([str(texts)], tmp_path / "texts", fields={role: "key"})  # has no such role


@pytest.mark.parametrize("role", ["question", "answer", "options", "text"])
def test_a_field_that_would_tell_the_kind_and_that_no_row_has(tmp_path: Path, role: str) -> None:
    """Without it the rows would be taken for another kind."""
    texts = write(tmp_path / "texts.jsonl", [{"text": f"t {i}"} for i in range(20)])
    path = write(tmp_path / "qa.jsonl", [{"question": f"q {i}", "answer": f"a {i}", "kez": "x"} for i in range(20)])
    kind, source = ("corpus", texts) if role in ("question", "answer") else ("question-answer", path)
    with pytest.raises(UserError, match=rf"--field {role}=key: no row has such a field; the first row has the fields"):
        run([str(source)], tmp_path / "out", fields={role: "key"})
    run([f"{kind}={source}"], tmp_path / "told", fields={role: "key"})
    rows = [*map(json.loads, source.read_text().splitlines()), {"question": "x", "answer": "B", "key": ["y", "z"]}]
    if role == "options":
        run([str(write(source, rows))], tmp_path / "out", fields={role: "key"}, max_bad_share=0.1)


def test_rows_that_ask_in_several_ways(tmp_path: Path) -> None:
    """As HuaTuo's: a record for each way, all on one side, for they share their answer."""
    rows = [
        {
            "id": i,
            "questions": [[f"what is drug {i}", f"drug {i}, what for"], [f"what is drug {i}"]],
            "answers": [f"{i}"],
        }
        for i in range(40)
    ]
    rows += [{"questions": ["one"], "answers": ["y", "z"]}, {"questions": ["one", "two"], "answers": ["y", "z"]}]
    write(tmp_path / "a.jsonl", rows)
    report = run([str(tmp_path / "a.jsonl")], tmp_path / "out", max_bad_share=0.5)
    sides = everything(tmp_path / "out")
    found = {row["id"]: (side, row["question"], row["answer"]) for side, kept in sides.items() for row in kept}
    assert len(found) == 81
    for i in range(40):
        side, question, answer = found[str(i)]
        assert (question, answer) == (f"what is drug {i}", f"{i}")
        assert found[f"{i}:2"] == (side, f"drug {i}, what for", answer)
    bad = report.data["rows"]["bad"]["by_reason"]
    assert list(bad) == ["wrong_type"]
    first = bad["wrong_type"]["first"]
    assert "a.jsonl line 42: 2 questions and 2 answers: give each question a row of its own" in first


def test_entity_groups_rows_that_share_no_text(tmp_path: Path) -> None:
    rows = [{"id": f"e{i // 4}:{i % 4}", "question": f"q {i}", "answer": f"a {i}"} for i in range(80)]
    path = write(tmp_path / "qa.jsonl", rows)
    run([str(path)], tmp_path / "out", entity="id~(.*):", sizes={"gl": 0.5, "cl": 0.25, "eval": 0.25})
    sides = everything(tmp_path / "out")
    entities = [{row["id"].split(":")[0] for row in side} for side in sides.values()]
    assert sum(map(len, entities)) == 20
    assert [len(side) for side in sides.values()] == [40, 20, 20]


@pytest.mark.parametrize("entity", ["Group", "GROUP~(g.*)", "about.group"])
def test_entity_fields_are_found_as_others_are(tmp_path: Path, entity: str) -> None:
    rows = [
        {
            "id": str(i),
            "question": f"q {i}",
            "answer": f"a {i}",
            "group": f"g{i // 4}",
            "about": {"group": f"g{i // 4}"},
        }
        for i in range(80)
    ]
    path = write(tmp_path / "qa.jsonl", rows)
    report = run([str(path)], tmp_path / "out", entity=entity, sizes={"gl": 0.5, "cl": 0.25, "eval": 0.25})
    sides = everything(tmp_path / "out")
    assert sum(len({int(row["id"]) // 4 for row in side}) for side in sides.values()) == 20
    assert report.data["components"]["without_entity"] == 0


@pytest.mark.parametrize("other", ["Mu\u0308ller Nr. ", "MÜLLER NR. ", " müller  nr. "])
def test_groups_are_one_in_any_form(tmp_path: Path, other: str) -> None:
    rows = [
        {"id": str(i), "question": f"q {i}", "answer": f"a {i}", "law": f"{['Müller Nr. ', other][i % 2]}{i // 2}"}
        for i in range(80)
    ]
    path = write(tmp_path / "qa.jsonl", rows)
    report = run([str(path)], tmp_path / "out", entity="law", sizes={"gl": 0.5, "cl": 0.25, "eval": 0.25})
    sides = everything(tmp_path / "out")
    assert sum(len({int(row["id"]) // 2 for row in side}) for side in sides.values()) == 40
    assert report.lines[1] == f"{path}: question-answer (question = question, answer = answer)"


def test_what_links_a_large_component_is_told(tmp_path: Path) -> None:
    rng = random.Random(0)
    molecules = ["".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=99)) for _ in range(100)]
    asked = "Given the following protein please describe its molecular function and the process that it takes part in:"
    rows = [
        {"question": f"{asked} {one}", "own": one, "answer": f"a {i}", "x": i // 60} for i, one in enumerate(molecules)
    ]
    source = [str(write(tmp_path / "a.jsonl", rows))]
    alike = r"most of the largest are near-duplicates: questions that share most .* \(--field question=NAME\)"
    with pytest.raises(UserError, match=alike):
        run(source, tmp_path / "out")
    told = "note: the largest group of records that belong together has {} of {}, most of them linked by {}"
    lines = run(source, tmp_path / "out", sizes={"gl": "rest", "cl": 0, "eval": 0}).lines
    assert [line for line in lines if line.startswith(told.format(100, 100, "near-duplicates: questions that share"))]
    lines = run(source, tmp_path / "x", fields={"question": "own"}, entity="x", sizes={"cl": 40, "eval": 0}).lines
    assert told.format(60, 100, "--entity") in lines
    assert not [line for line in run(source, tmp_path / "own", fields={"question": "own"}).lines if "largest" in line]
    rows = [{**row, "question": "the same" if i < 30 else f"q {i}"} for i, row in enumerate(rows)]
    lines = run([str(write(tmp_path / "b.jsonl", rows))], tmp_path / "same").lines
    assert told.format(30, 100, "equal texts") in lines


def test_a_side_that_is_short_of_what_was_asked_for_is_told(tmp_path: Path) -> None:
    rows = [{"question": f"q {i}", "answer": f"a {i}", "chapter": max(0, i - 150)} for i in range(200)]
    source = [str(write(tmp_path / "a.jsonl", rows))]
    report = run(source, tmp_path / "out", entity="chapter", sizes={"cl": 60, "eval": 20})
    told = (
        "note: cl has 29 of the 60 records asked for: the largest group of records that belong together has 151 of 200"
    )
    assert told in report.lines
    assert list(report.data["short_sides"]) == ["cl"]
    assert run(source, tmp_path / "more", entity="chapter", sizes={"cl": 29, "eval": 20}).data["short_sides"] == {}


def test_a_side_that_cannot_be_filled_after_decontamination(tmp_path: Path) -> None:
    rows = [{"question": f"q {i}", "answer": f"a {i}", "chapter": max(0, i - 150)} for i in range(200)]
    source, outside = write(tmp_path / "a.jsonl", rows), write(tmp_path / "outside.jsonl", rows[:1])
    told = r"the sources have 49: .*; dropped before that: 151 connected_to_external_evaluation"
    with pytest.raises(UserError, match=told):
        run([str(source)], tmp_path / "out", entity="chapter", sizes={"eval": 60}, decontaminate=[str(outside)])


def test_entity_values_that_are_blank_group_nothing(tmp_path: Path) -> None:
    rows = [{"question": f"q {i}", "answer": f"a {i}", "group": ["", " ", None, "x"][i % 4]} for i in range(200)]
    report = run([str(write(tmp_path / "qa.jsonl", rows))], tmp_path / "out", entity="group")
    assert report.data["components"]["largest"] == 50
    assert "note: 150 question-answer records have no --entity and stand alone" in report.lines


def test_a_row_that_is_repeated_in_another_group_links_the_two(tmp_path: Path) -> None:
    """As a question on two pages; a row that is bad for its id links nothing."""
    rows = [{"id": f"p{i // 2}:{i % 2}", "question": f"q {i}", "answer": f"a {i}", "page": i // 2} for i in range(80)]
    shared = [{"question": f"both {i}", "answer": f"c {i}"} for i in range(20)]
    rows += [{**row, "page": page} for i, row in enumerate(shared) for page in (2 * i, 2 * i + 1)]
    rows += [{"id": "p0:0", "question": "q", "answer": "a", "page": 39}]
    path = write(tmp_path / "qa.jsonl", rows)
    sizes = {"gl": 0.4, "cl": 0.3, "eval": 0.3}
    data = run([str(path)], tmp_path / "out", entity="page", sizes=sizes, max_bad_share=0.1).data
    assert (data["dropped"]["repeated_row"], data["rows"]["bad"]["total"]) == (20, 1)
    pages = [
        {int(row["id"][1:].split(":")[0]) for row in side if ":" in row["id"]}
        | {2 * int(row["answer"][2:]) for row in side if row["answer"].startswith("c ")}
        for side in everything(tmp_path / "out").values()
    ]
    assert all(pages)
    assert sum(map(len, pages)) == 40
    assert (data["components"]["count"], data["components"]["largest"]) == (20, 5)


@pytest.mark.parametrize("entity", ["gruppe", "question~(never)", "blank"])
def test_entity_that_no_row_has(tmp_path: Path, entity: str) -> None:
    rows = [{"question": f"q {i}", "answer": f"a {i}", "blank": ""} for i in range(80)]
    path = write(tmp_path / "qa.jsonl", rows)
    with pytest.raises(UserError, match=r"--entity .*: no record has a value for it; .* question, answer, blank"):
        run([str(path)], tmp_path / "out", entity=entity)


def test_lists_in_the_cells_of_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "qa.csv"
    lines = [f'q {i},a {i},"[""n {i}"", ""m {i}""]"' for i in range(100)]
    lines[10] = 'q 10,"[""a 10"", ""b 10""]",[]'
    lines[20] = "q 20,[2-(acetyloxy)] benzoic acid,[3H] water"
    path.write_text("question,answer,negatives\n" + "\n".join(lines) + "\n")
    run([str(path)], tmp_path / "out")
    records = {row["question"]: row for side in everything(tmp_path / "out").values() for row in side}
    assert (records["q 10"]["answer"], records["q 10"]["positives"]) == ("a 10", ["b 10"])
    assert records["q 20"]["answer"] == "[2-(acetyloxy)] benzoic acid"
    assert records["q 30"]["negatives"] == ["n 30", "m 30"]
    for cells in ("\"['a', 'b']\",", "a,\"['n', 'm']\""):
        path.write_text(f"question,answer,negatives\nq,{cells}\n")
        with pytest.raises(
            UserError, match=r"line 2: (answer|negatives) is a list as Python prints it: write it as JSON"
        ):
            run([str(path)], tmp_path / "bad")


def test_answers_of_squad_in_the_cells_of_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "qa.csv"
    lines = [f'q {i},"{{""text"": [""a {i}"", ""b {i}""], ""answer_start"": [3, 4]}}"' for i in range(100)]
    lines[10] = 'q 10,"{""set"": {""text"": [1]}}"'
    path.write_text("question,answers\n" + "\n".join(lines) + "\n")
    run([str(path)], tmp_path / "out")
    records = {row["question"]: row for side in everything(tmp_path / "out").values() for row in side}
    assert (records["q 20"]["answer"], records["q 20"]["positives"]) == ("a 20", ["b 20"])
    assert records["q 10"]["answer"] == '{"set": {"text": [1]}}'
    for cell in ("{'text': array(['a'], dtype=object), 'answer_start': array([3])}", "{'start': [3], 'text': ['a']}"):
        path.write_text(f'question,answers\nq,"{cell}"\n')
        with pytest.raises(UserError, match="line 2: answer is an object as Python prints it: write it as JSON"):
            run([str(path)], tmp_path / "bad")


def test_names_that_no_file_can_hold(tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"q {i}", "answer": f"a {i}"}) for i in range(200)]
    lines[7] = '{"\\ud800": 1, "answer": "a"}'
    path = tmp_path / "wei\udcdf.jsonl"  # a name in Latin-1
    path.write_text("\n".join(lines))
    report = run([str(path)], tmp_path / "out")
    first = json.loads((tmp_path / "out/report.json").read_text())["rows"]["bad"]["by_reason"]["missing_field"]["first"]
    assert "wei\\udcdf.jsonl line 8" in first
    assert "\\ud800" in first
    assert {row["source"] for row in everything(tmp_path / "out")["gl"]} == {"wei\\udcdf.jsonl"}
    run([str(path)], tmp_path / "named", name="wei\udcdf", domain="wei\udcdf")
    assert open_set(tmp_path / "named").name == "wei\\udcdf"
    assert {row["domain"] for row in everything(tmp_path / "named")["gl"]} == {"wei\\udcdf"}
    with pytest.raises(UserError, match=r"--out .*/wei\\udcdf: its name is not UTF-8"):
        run([str(path)], tmp_path / "wei\udcdf")
    "\n".join(report.lines).encode()


def test_negatives_that_are_common_answers_stay(tmp_path: Path) -> None:
    """Names of classes are on every side; the other classes' are the hard negatives of each."""
    classes = ["card arrival", "lost or stolen card", "exchange rate"]
    rows = [
        {"id": i, "question": f"q {i}", "answer": classes[i % 3], "negatives": [classes[(i + 1) % 3], "Q 8?"]}
        for i in range(90)
    ]
    report = run([str(write(tmp_path / "qa.jsonl", rows))], tmp_path / "out", sizes={"cl": "rest", "eval": 0.9})
    assert report.data["records"]["eval"]["records"] == 81
    assert "q 8" in {row["question"] for row in everything(tmp_path / "out")["eval"]}
    assert report.data["dropped"]["negative_that_is_evaluation"] == 9
    for row in everything(tmp_path / "out")["cl"]:
        assert row["negatives"] == [classes[(int(row["question"][2:]) + 1) % 3]]


def test_negatives_that_are_evaluation_answers_are_removed(tmp_path: Path) -> None:
    rows = [
        {"id": str(i), "question": f"q {i}", "answer": f"a {i}", "negatives": ["x", f"A {i - 1}."]} for i in range(60)
    ]
    report = run([str(write(tmp_path / "qa.jsonl", rows))], tmp_path / "out", sizes={"gl": 0.4, "cl": 0.4, "eval": 0.2})
    sides = everything(tmp_path / "out")
    held = {normalise(row["answer"]) for row in sides["eval"]}
    trained = [normalise(text) for side in ("gl", "cl") for row in sides[side] for text in row["negatives"]]
    assert not held & set(trained)
    removed = report.data["dropped"]["negative_that_is_evaluation"]
    assert 0 < removed == 2 * 48 - len(trained)


def test_kinds_in_one_set_and_plain_corpus_alone(tmp_path: Path) -> None:
    qa = write(tmp_path / "qa.jsonl", [{"prompt": f"q {i}", "tell": f"a {i}"} for i in range(40)])
    choice = write(
        tmp_path / "mc.jsonl",
        [{"prompt": f"stem {i}", "options": ["yes", "no"], "tell": "AB"[i % 2]} for i in range(40)],
    )
    fields = {"question": "prompt", "answer": "tell"}
    data = run([str(qa), str(choice)], tmp_path / "out", fields=fields).data
    assert sum(info["records"] for info in data["records"].values()) == 80
    assert data["isolation"]["shared_common_texts"] == []  # 20 rows share "yes": not more than the limit
    more = [{"question": f"more {i}", "answer": "yes"} for i in range(40)]
    report = run([str(write(tmp_path / "more.jsonl", more))], tmp_path / "more")
    assert "on two sides: 1 (first: 'yes', in 40 records)" in "\n".join(report.lines)
    (tmp_path / "t.txt").write_text("one\n\ntwo\nthree\n")
    data = run([str(tmp_path / "t.txt")], tmp_path / "text", paragraphs=True).data
    assert data["records"]["gl"] == {"records": 2, "texts": 2, "shards": 1}
    data = run([f"corpus={write(tmp_path / 'c.jsonl', [{'question': 'q', 'text': 't'}])}"], tmp_path / "c").data
    assert data["records"]["gl"]["texts"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": {"gl": "2"}, "fields": {"x": "y"}}, "--field x=y"),
        ({"similarity": 0.2}, "--similarity 0.2: must lie between"),
        ({"entity": "id~("}, "--entity"),
        ({"kind": "poem"}, "--kind poem"),
        ({"sizes": {"gl": "0.9", "eval": "0.2"}}, "add up to more than 1"),
        ({"paragraphs": True, "sources": ["qa.jsonl"]}, "--paragraphs: has no effect, for no source is plain text"),
        ({"sizes": {"gl": "100000"}}, "the sizes ask for 100089 question-answer records"),
        ({"shard_records": 0}, "--shard-records 0: must be a number of more than 0"),
        ({"shard_mib": float("nan")}, "--shard-mib nan: must be a number of more than 0"),
    ],
)
def test_wrong_settings(sources: list[str], tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        run([str(tmp_path / name) for name in settings.pop("sources", sources)], tmp_path / "out", **settings)
    assert not list(tmp_path.glob("*out*"))


def test_real_tokenizer(tiny_model_dir: Callable[..., Path], sources: list[str], tmp_path: Path) -> None:
    from lbr_dist.data.shards import check_tokenizer
    from lbr_dist.model.tokenizer import Tokenization

    model = tiny_model_dir("llama")
    prepare(sources, tmp_path / "out", tokenizer=str(model))
    opened = open_set(tmp_path / "out")
    tokens = Tokenization.load(str(model))
    check_tokenizer(opened, tokens)
    index = opened.index("cl")
    rows = ShardReader(opened, "cl").read(range(len(index)))
    assert index.question_tokens.tolist() == [len(tokens.encode([row["question"]])[0]) for row in rows]
    assert index.answer_tokens.tolist() == [len(tokens.encode([row["answer"]])[0]) for row in rows]


def test_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "BATCH_CHARACTERS", 20_000)
    monkeypatch.setattr("lbr_dist.data.preparation.minhash._WORD_CHUNK", 1 << 14)
    monkeypatch.setattr("lbr_dist.data.preparation.row_blocks.BLOCK_CHARACTERS", 20_000)
    rng = random.Random(0)
    sizes, peaks = [], []
    for words in (20, 20, 1500):  # the first run also imports and fills tables
        path = write(tmp_path / "a.jsonl", [{"text": " ".join(rng.choices(WORDS, k=words))} for _ in range(200)])
        sizes.append(path.stat().st_size)
        tracemalloc.start()
        run([str(path)], tmp_path / "out", overwrite=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert sizes[2] > 2_400_000
    assert peaks[2] < peaks[1] + 1_200_000
