from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from prepared import contents, domain, run, sentence, write

from lbr_dist.data.preparation import first_pass, row_blocks
from lbr_dist.data.preparation.row_blocks import PartJob, ReadJob, read_jobs
from lbr_dist.data.sources.parts import Source, expand
from lbr_dist.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of few rows and of all kinds, one of them empty, some with bad rows."""
    rng, root = random.Random(0), tmp_path / "small"
    root.mkdir()
    rows = domain()
    for number in range(0, len(rows), 9):
        write(root / f"qa-{number:04d}.jsonl", rows[number : number + 9])
    for number in range(20):
        (root / f"text-{number:02d}.txt").write_text("\n".join(sentence(rng) for _ in range(3)))
    (root / "terms.csv").write_text("term,definition\n" + "".join(f"term{i},{sentence(rng)}\n" for i in range(12)))
    (root / "qa-0009.jsonl").open("a").write('{"question": "and no answer"}\n')
    (root / "text-07.txt").open("ab").write(b"\n\xff\xfe\xff a line in no encoding\n")
    (root / "none.jsonl").write_text("")
    return root


def jobs(folder: Path) -> list[ReadJob]:
    parts = expand(Source(str(folder)), folder)
    return read_jobs([PartJob(number, part, False) for number, part in enumerate(parts)])


def blocks_made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    made: list[Path] = []
    real = first_pass.commit
    monkeypatch.setattr(first_pass, "commit", lambda numbers, arrays: made.append(numbers) or real(numbers, arrays))
    return made


def test_small_files_are_read_together_with_the_same_result(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = write(tmp_path / "benchmark.jsonl", domain()[40:45])
    settings: dict[str, Any] = {
        "name": "n",
        "max_bad_share": 0.1,
        "decontaminate": [str(held_out)],
        "shard_records": 40,
    }
    made = blocks_made(monkeypatch)
    report = run([str(folder)], tmp_path / "together", **settings).data
    assert len(made) == 1
    assert report["empty_sources"] == [str(folder / "none.jsonl")]
    assert report["decontaminate"]["read"] == 5
    bad = report["rows"]["bad"]["by_reason"]
    assert bad["invalid_utf8"]["first"].startswith(f"{folder}/text-07.txt line 4")
    assert any(entry["first"].startswith(f"{folder}/qa-0009.jsonl line 10") for entry in bad.values())

    monkeypatch.setattr(row_blocks, "TOGETHER", 0)
    made.clear()
    assert run([str(folder)], tmp_path / "apart", **settings).data == report
    assert len(made) == len(list(folder.iterdir()))  # one for each with rows, and one for the benchmark
    assert contents(tmp_path / "apart") == contents(tmp_path / "together")

    monkeypatch.setattr(row_blocks, "TOGETHER", 1 << 20)
    monkeypatch.setattr(first_pass, "BLOCK_ROWS", 7)  # blocks end within a file, and hold parts of several
    made.clear()
    assert run([str(folder)], tmp_path / "cut", **settings).data == report
    assert len(made) == -(-(report["rows"]["read"] + 5) // 7)
    assert contents(tmp_path / "cut") == contents(tmp_path / "together")


def test_blocks_of_several_files_are_taken_over_from_a_killed_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_pass, "BLOCK_ROWS", 50)
    settings: dict[str, Any] = {"name": "n", "max_bad_share": 0.1}
    whole = run([str(folder)], tmp_path / "whole", **settings).data
    made = blocks_made(monkeypatch)
    count = -(-whole["rows"]["read"] // 50)
    with monkeypatch.context() as patch:
        real = first_pass.DigestRows.__call__

        def killed(self: Any, block: Any) -> Any:
            if block.number == count // 2:
                raise KeyboardInterrupt
            return real(self, block)

        patch.setattr(first_pass.DigestRows, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            run([str(folder)], tmp_path / "out", **settings)
    assert len(made) == count // 2
    made.clear()
    assert run([str(folder)], tmp_path / "out", **settings).data == whole
    assert len(made) == count - count // 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_large_files_are_read_by_themselves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(job.parts) for job in jobs(folder)] == [len(list(folder.iterdir()))]
    large = folder / "qa-0099.jsonl"
    large.write_bytes(large.read_bytes() + b"\n" * row_blocks.TOGETHER)
    grouped = [[part.part.path for part in job.parts] for job in jobs(folder)]
    assert len(grouped) == 3
    assert grouped[1] == [large]
    assert [path for group in grouped for path in group] == sorted(folder.iterdir())
    monkeypatch.setattr(row_blocks, "TOGETHER", 2000)
    for job in jobs(folder):
        assert len(job.parts) == 1 or sum(part.part.path.stat().st_size for part in job.parts) <= 2000


def test_a_part_that_is_not_understood_is_named_among_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_pass, "HOPELESS", 15)
    write(folder / "s-foreign.jsonl", [{"frage": "q", "antwort": "a"}] * 40)
    with pytest.raises(UserError, match=r"first 15 rows of .*s-foreign.jsonl are bad.*s-foreign.jsonl line 1: cannot"):
        run([str(folder)], tmp_path / "out", max_bad_share=1)
    (folder / "s-foreign.jsonl").unlink()
    (folder / "t-cut.csv.gz").write_bytes(b"\x1f\x8b\x08 and no more")
    with pytest.raises(UserError, match=r"t-cut.csv.gz: damaged"):
        run([str(folder)], tmp_path / "out", max_bad_share=1)


def test_a_part_of_long_rows_that_is_not_understood_stops_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks have fewer rows than decide it; a source with a good row among its first is read to its end."""
    monkeypatch.setattr(first_pass, "HOPELESS", 25)
    monkeypatch.setattr(row_blocks, "BLOCK_CHARACTERS", 1000)
    bad = {"frage": "q" * 90, "antwort": "a"}
    write(tmp_path / "a.jsonl", [bad] * 200)
    made = blocks_made(monkeypatch)
    with pytest.raises(UserError, match=r"first \d\d rows of .*a.jsonl are bad.*a.jsonl line 1: cannot tell"):
        run([str(tmp_path / "a.jsonl")], tmp_path / "out", max_bad_share=1)
    assert len(made) == 3
    write(tmp_path / "a.jsonl", [*[bad] * 20, {"text": "good"}, *[bad] * 200])
    report = run([str(tmp_path / "a.jsonl")], tmp_path / "out", max_bad_share=1).data
    assert report["rows"]["bad"]["total"] == 220


def test_no_key_in_a_command_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(folder: Path, out: Path) -> None:
        raise KeyboardInterrupt

    write(tmp_path / "qa.jsonl", [*domain(), {"question": "and no answer"}])
    write(tmp_path / "bench.jsonl", domain(1)[:9])
    (tmp_path / "none.jsonl").touch()
    sources = [f"pipe:: -H 'Bearer SECRET'; cat {tmp_path}/{name}.jsonl" for name in ("qa", "none", "bench")]
    settings: dict[str, Any] = {"max_bad_share": 0.1, "decontaminate": sources[2:]}
    with monkeypatch.context() as patch:
        patch.setattr("lbr_dist.data.preparation.prepare.publish", killed)
        with pytest.raises(KeyboardInterrupt):
            run(sources[:2], tmp_path / "out", **settings)
    left = contents(tmp_path / ".out.preparing")
    report = run(sources[:2], tmp_path / "out", **settings)
    written = {**left, **contents(tmp_path / "out"), "lines": "\n".join(report.lines).encode()}
    assert [name for name, content in written.items() if b"SECRET" in content] == []
    assert report.data["empty_sources"] == ["pipe:.../none.jsonl"]
    with pytest.raises(UserError, match=r"--decontaminate pipe:\.\.\./none\.jsonl: has no rows"):
        run(sources[:1], tmp_path / "other", max_bad_share=0.1, decontaminate=sources[1:2])


def test_the_kind_of_each_file_is_its_own(tmp_path: Path) -> None:
    """A row that only a kind known before can be read as: the file before says nothing of it."""
    root = tmp_path / "kinds"
    root.mkdir()
    write(root / "a.jsonl", [{"text": "only text here"}])
    write(root / "b.jsonl", [{"question": f"q {i}", "answer": f"a {i}"} for i in range(9)])
    report = run([str(root)], tmp_path / "out", max_bad_share=1).data
    assert report["rows"]["bad"]["total"] == 0
    assert json.loads((tmp_path / "out/report.json").read_text())["records"]["gl"]["texts"] == 1
