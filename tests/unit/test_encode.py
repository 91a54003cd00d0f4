import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import make_run

from lbr_dist.data.execute import executing
from lbr_dist.errors import UserError
from lbr_dist.inference import text_blocks as module
from lbr_dist.inference.encode import encode_file
from lbr_dist.inference.loading import load_encoder
from lbr_dist.inference.rows import read_texts

SENTENCE = "aspirin is a drug that relieves pain fever heart blood vessel def add return measles water 糖尿病"
WORDS = SENTENCE.split()


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir):
    settings = {"contrastive": {"query_instruction": "Find:\n"}}
    return str(make_run(tmp_path_factory.mktemp("run"), tiny_model_dir("llama"), **settings))


def write_jsonl(file, rows):
    opener = gzip.open if file.name.endswith(".gz") else open
    with opener(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return file


def read(out):
    table = pq.read_table(out)
    column = table["embedding"].combine_chunks()
    return table["id"].to_pylist(), column.flatten().to_numpy().reshape(-1, column.type.list_size)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt"])
def test_every_kind_of_file(tmp_path, run, kind):
    some = texts(50)
    rows = [{"id": f"r{i}", "answer": text, "other": 1} for i, text in enumerate(some)]
    source = tmp_path / f"in.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), source)
    elif kind == "txt":
        source.write_text("\n".join(some), encoding="utf-8")
    elif kind == "jsonl.zst":
        import zstandard

        plain = write_jsonl(tmp_path / "plain.jsonl", rows)
        source.write_bytes(zstandard.compress(plain.read_bytes()))
    else:
        write_jsonl(source, rows)
    report = encode_file(run, source, tmp_path / "out.parquet", block=16, device="cpu")
    ids, vectors = read(tmp_path / "out.parquet")
    assert ids == [str(i) if kind == "txt" else f"r{i}" for i in range(50)]
    assert vectors == pytest.approx(load_encoder(run, "cpu").encode(some), abs=1e-5)
    assert (report.texts, report.resumed, report.width) == (50, 0, 32)
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == ["out.parquet"]


def test_side_and_field(tmp_path, run):
    source = write_jsonl(tmp_path / "in.jsonl", [{"question": "pain", "answer": "fever", "note": "water"}])
    encoder = load_encoder(run, "cpu")
    for name, options, expected in (
        ("a", {}, encoder.encode(["fever"], "passage")),
        ("b", {"side": "query"}, encoder.encode(["pain"], "query")),
        ("c", {"field": "note"}, encoder.encode(["water"], "passage")),
    ):
        encode_file(run, source, tmp_path / name, device="cpu", **options)
        assert read(tmp_path / name)[1] == pytest.approx(expected, abs=1e-6)


def test_blocks_are_bounded_in_characters_too(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 10)
    rows = [(str(i), text) for i, text in enumerate(["aaaa", "bbbb", "cccc", "d" * 30, "e"])]
    blocks = [block.texts for block in module.text_blocks(rows, tmp_path, 100)]
    assert blocks == [["aaaa", "bbbb"], ["cccc"], ["d" * 30], ["e"]]


def test_a_failed_run_goes_on_where_it_stopped(tmp_path, run, monkeypatch):
    some = texts(40)
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in some])
    out = tmp_path / "out.parquet"
    encoded = []

    class Failing:
        cut = 0

        def __init__(self, fail_at):
            self.inner, self.fail_at = load_encoder(run, "cpu"), fail_at

        def encode(self, texts, side):
            if len(encoded) == self.fail_at:
                raise MemoryError
            encoded.append(len(texts))
            self.cut += 3
            return self.inner.encode(texts, side)

    monkeypatch.setattr("lbr_dist.inference.loading.load_encoder", lambda *_: Failing(2))
    with pytest.raises(MemoryError):
        encode_file(run, source, out, block=8)
    assert not out.exists()
    monkeypatch.setattr("lbr_dist.inference.loading.load_encoder", lambda *_: Failing(None))
    with pytest.raises(UserError, match="unfinished run with another side; remove that folder"):
        encode_file(run, source, out, block=8, side="query")
    report = encode_file(run, source, out, block=8)
    assert encoded == [8] * 5
    assert (report.resumed, report.cut) == (16, 15)  # those of the earlier attempt are in the output too
    assert read(out)[1] == pytest.approx(load_encoder(run, "cpu").encode(some), abs=1e-5)
    with pytest.raises(UserError, match="exists already"):
        encode_file(run, source, out)


@pytest.mark.parametrize("name", ["00000001.parquet", "00000002.parquet"])
def test_a_damaged_part_is_made_again(tmp_path, run, monkeypatch, name):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts(40)])
    options = {"block": 8, "device": "cpu"}
    encode_file(run, source, tmp_path / "whole.parquet", **options)
    with monkeypatch.context() as patch:
        failing_write(patch, errno.ENOSPC, at=4)
        with pytest.raises(UserError, match="kept in"):
            encode_file(run, source, tmp_path / "out.parquet", **options)
    part = tmp_path / "out.parquet.parts" / name
    whole = part.read_bytes()
    half = len(whole) // 2
    part.write_bytes(whole[:half] + bytes(100) + whole[half + 100 :])  # it reads as before
    assert encode_file(run, source, tmp_path / "out.parquet", **options).resumed == 16
    assert np.array_equal(read(tmp_path / "out.parquet")[1], read(tmp_path / "whole.parquet")[1])


def raising(error):
    def call(*_, **__):
        raise error

    return call


def failing_write(monkeypatch, number, at):
    """The `at`-th table and those after it meet a full disk."""
    real, tables = pq.write_table, []

    def write_table(table, file, **options):
        tables.append(file)
        if len(tables) >= at:
            raise OSError(number, "Error writing bytes to file")
        real(table, file, **options)

    monkeypatch.setattr(module.pq, "write_table", write_table)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_loses_no_finished_part(tmp_path, run, monkeypatch, number):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts(40)])
    out = tmp_path / "out.parquet"
    with monkeypatch.context() as patch:
        failing_write(patch, number, at=3)
        with pytest.raises(UserError, match=f"out.parquet: {os.strerror(number)}; .* kept in .*out.parquet.parts"):
            encode_file(run, source, out, block=8, device="cpu")
    assert sorted(file.name for file in (tmp_path / "out.parquet.parts").iterdir()) == [
        "00000001.parquet", "00000002.parquet", "job.json", "lock",
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("lbr_dist.inference.encode.sync", raising(OSError(number, "full")))  # where the parts are joined
        with pytest.raises(UserError, match=os.strerror(number)):
            encode_file(run, source, out, block=8, device="cpu")
    assert not out.exists()
    assert not (tmp_path / "out.parquet.parts" / "joined.tmp").exists()
    assert encode_file(run, source, out, block=8, device="cpu").resumed == 40
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "out.parquet"]


@pytest.mark.parametrize("content", [None, "", "[]", '{"version": 6, "mod'])
def test_parts_of_an_unknown_job_are_not_told_as_those_of_another(tmp_path, run, content):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "fever"}])
    parts = tmp_path / "out.parquet.parts"
    parts.mkdir()
    (parts / "00000001.parquet").touch()
    if content is not None:
        (parts / "job.json").write_text(content)
    with pytest.raises(UserError, match=f"job.json is missing or cannot be read, .*: remove {parts} to start out.parq"):
        encode_file(run, source, tmp_path / "out.parquet")
    assert (parts / "00000001.parquet").exists()


def test_a_second_command_for_one_output_is_refused(tmp_path, run):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts(40)])
    out = tmp_path / "out.parquet"

    class Second:
        """Tries to write the same output before every block."""

        def stream(self, sources, read, work, *, model=False):
            for source_ in sources:
                for block in read(source_):
                    with pytest.raises(
                        UserError, match=f"out.parquet.parts: process {os.getpid()} on .* is writing it"
                    ):
                        encode_file(run, source, out, block=8, device="cpu")
                    yield work(block)

    with executing(Second()):
        assert encode_file(run, source, out, block=8, device="cpu").texts == 40
    assert len(read(out)[0]) == 40


class Meanwhile:
    """Runs `act` once the first block is read."""

    def __init__(self, act):
        self.act = act

    def stream(self, sources, read, work, *, model=False):
        for source in sources:
            for block in read(source):
                if block.number == 1:
                    self.act()
                yield work(block)


def test_a_run_in_training_is_embedded_by_one_checkpoint(tmp_path, tiny_model_dir):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts(20)])
    run = make_run(tmp_path / "run", tiny_model_dir("llama"))
    expected = load_encoder(str(run), "cpu").encode(texts(20))
    later = Meanwhile(lambda: make_run(run, tiny_model_dir("llama"), step=20, seed=1))
    options = {"block": 8, "device": "cpu"}
    with executing(later):
        encode_file(str(run), source, tmp_path / "out.parquet", **options)
    assert read(tmp_path / "out.parquet")[1] == pytest.approx(expected, abs=1e-5)


def test_an_input_that_changes_is_noticed(tmp_path, run):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts(20)])
    options = {"block": 8, "device": "cpu"}
    change = Meanwhile(lambda: source.write_text(source.read_text() + '{"text": "more"}\n'))
    with executing(change), pytest.raises(UserError, match="was changed while it was read"):
        encode_file(run, source, tmp_path / "out.parquet", **options)
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
    assert encode_file(run, source, tmp_path / "out.parquet", **options).texts == 21


def test_an_output_in_the_models_folder_is_refused(tmp_path, run, tiny_model_dir):
    """Its parts would make the model another one, and be lost when the command is repeated."""
    source, model = write_jsonl(tmp_path / "in.jsonl", [{"text": "x"}]), tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), model)
    before = sorted(model.rglob("*"))
    for spec in (f"hf:{model}?pooling=mean", f"hf:{model}?pooling=mean&dim=8"):
        with pytest.raises(UserError, match=r"out.parquet: lies in the folder of model hf:.*choose a place outside it"):
            encode_file(spec, source, model / "deep/out.parquet")
    assert sorted(model.rglob("*")) == before
    encode_file(spec, source, tmp_path / "out.parquet", device="cpu")
    encode_file(run, source, Path(run) / "out.parquet", device="cpu")  # its checkpoints identify a run


def test_a_mistyped_model_leaves_nothing_in_the_way(tmp_path, run):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "fever"}])
    out = tmp_path / "out.parquet"
    with pytest.raises(UserError, match="nowhere"):
        encode_file(str(tmp_path / "nowhere"), source, out, device="cpu")
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
    encode_file(run, source, out, device="cpu")


@pytest.mark.parametrize("name", ["file/out.parquet", "n" * 300, "n" * 252])
def test_an_output_that_cannot_be_made(tmp_path, run, name):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "fever"}])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be (made|written) .*; name another"):
        encode_file(run, source, tmp_path / name)


SLOW = """
import sys, time
from lbr_dist.inference import loading
from lbr_dist.inference.encode import encode_file

model, source, out = sys.argv[1:]
real = loading.load_encoder

class Slow:
    cut = 0

    def __init__(self, *args):
        self.inner = real(*args)

    def encode(self, texts, side):
        time.sleep(0.3)
        return self.inner.encode(texts, side)

loading.load_encoder = Slow
encode_file(model, source, out, block=4, device="cpu")
"""


def test_killed_and_resumed(tmp_path, run):
    """SIGKILL in the middle, then the rest: nothing is lost, doubled or half-written."""
    some = texts(80)
    source = write_jsonl(tmp_path / "in.jsonl", [{"id": f"r{i}", "text": text} for i, text in enumerate(some)])
    out, parts = tmp_path / "out.parquet", tmp_path / "out.parquet.parts"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, run, str(source), str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 240
    while len(list(parts.glob("0*.parquet"))) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    report = encode_file(run, source, out, block=4, device="cpu")
    assert 12 <= report.resumed < 80
    ids, vectors = read(out)
    assert ids == [f"r{i}" for i in range(80)]
    assert vectors == pytest.approx(load_encoder(run, "cpu").encode(some), abs=1e-5)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {}, "in.jsonl: no such file"),
        ("", {}, "has no rows"),
        ('{"text": "a"}\n{"text": ', {}, "in.jsonl: line 2: the line is not valid JSON .*; repair or remove it"),
        ('{"text": "a"}\n\n[1]\n', {}, "line 3: the line is not a JSON object"),
        ('{"text": "a"}\n{"text": ' + "[" * 100_000, {}, "line 2: the line is not valid JSON"),
        ('{"text": "a"}\n{"text": 3}\n', {}, "line 2: text is a number, not a text.*; repair the row, or name another"),
        ('{"text": "a"}\n{"text": null}\n', {}, r"line 2: a field is empty \(text is null\)"),
        ('{"text": "a"}\n{"id": 3}\n', {}, "line 2: `lbr prepare` would say: a field is missing .no text: .* has id"),
        ('{"text": "a"}\n{"text": 3}\n', {"field": "text"}, "line 2: field 'text' is a number, not a text"),
        ('{"text": "a"}\n{"text": null}\n', {"field": "text"}, "line 2: field 'text' is null"),
        ('{"answer": "a"}\n{"id": 3}\n', {}, "line 2: field 'answer' is missing"),
        ('{"text": "a"}\n{"text": "\\ud83d"}\n', {}, r"line 2: the text is not valid UTF-8 \(text, character 0\)"),
        ('{"text": "a", "id": "\\ud83d"}\n', {}, r"line 1: the text is not valid UTF-8 \(id, character 0\)"),
        ('{"text": "a", "id": [1]}\n', {}, "line 1: id is a list, not a text or a whole number"),
        ('{"note": "a"}\n', {}, "no field 'answer' or .* which has note; name one with --field"),
        ('{"body": "a"}\n', {"field": "txet"}, "no field 'txet' in its first row, which has body"),
        ('{"body": "a"}\n', {"field": "text=body"}, "which has body; give the name alone: --field body$"),
    ],
)
def test_bad_input_is_named(tmp_path, content, options, message):
    source = tmp_path / "in.jsonl"
    if content is not None:
        source.write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_texts(source, "passage", **options))


CHOICE = {"question": "which pumps", "options": ["vein", "heart"], "answer": "B"}


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        (CHOICE, "which pumps\nA. vein\nB. heart", "heart"),
        ({**CHOICE, "answer": "  "}, "which pumps\nA. vein\nB. heart", None),
        ({"question": "2 + 2", "answer": 4}, "2 + 2", "4"),
        ({"question": "who", "answer": ["me", "I"]}, "who", "me"),
        ({"question": "who", "answers": {"text": ["me"], "answer_start": [0]}}, "who", "me"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "q", "a"),
        ({"instruction": "say", "input": "it", "output": "so"}, "say\nit", "so"),
        ({"QUESTION": "is it", "LONG_ANSWER": "it is"}, "is it", "it is"),
        ({"_id": "1", "title": "T", "abstract": ["one.", "two."]}, "one.\ntwo.", "one.\ntwo."),
        ({"questions": [["what"]], "answers": ["that"]}, "what", "that"),
        ({"questions": ["what", "which"], "answers": ["that"]}, None, "that"),
        ({"question": "q", "answer": ""}, "q", ""),
        ({"question": "", "text": "t"}, "", None),
        ({"question": "q", "answer": "a", "label": 0}, "q", None),
        ({"query": "q", "code": 3}, "q", "3"),
        ({"question": "q", "options": ["a", "b"]}, "q\nA. a\nB. b", None),
        ({"options": ["vein", "heart"], "answer": "B"}, None, None),
        ({"text": "t", "answer": "a"}, "t", "a"),
    ],
)
def test_a_row_is_read_as_prepare_reads_it(tmp_path, row, question, answer):
    source = write_jsonl(tmp_path / "in.jsonl", [row])
    for side, expected in (("query", question), ("passage", answer)):
        if expected is None:
            with pytest.raises(UserError, match=r"in\.jsonl: line 1: "):
                list(read_texts(source, side))
        else:
            assert [text for _, text in read_texts(source, side)] == [expected]


def test_a_row_of_several_questions_has_no_vector_of_one(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"questions": ["what", "which"], "answers": ["that"]}])
    with pytest.raises(UserError, match=r"line 1: the row has 2 questions, of which `lbr prepare` makes as many rec"):
        list(read_texts(source, "query"))


def test_rows_of_another_kind_than_the_first(tmp_path):
    """The letter of a right option is never taken for its text."""
    source = write_jsonl(tmp_path / "in.jsonl", [{"answer": "a"}, {"question": "q", "answer": 2}, CHOICE])
    rows = read_texts(source, "passage")
    assert [next(rows), next(rows)] == [("0", "a"), ("1", "2")]
    with pytest.raises(UserError, match="line 3: `lbr prepare` would say: the row has options"):
        next(rows)


def test_cells_of_a_table(tmp_path):
    (tmp_path / "t.csv").write_text('question,answers\na,"[""x"", ""y""]"\nb,\n,\n')
    assert list(read_texts(tmp_path / "t.csv", "passage")) == [("0", "x"), ("1", "")]


def test_a_row_without_an_id_gets_its_number(tmp_path):
    rows = [
        {"text": "a", "id": None},
        {"text": "b", "id": ""},
        {"text": "c", "id": 7},
        {"text": ""},
        {"text": "\u200b"},
    ]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    assert list(read_texts(source, "passage")) == [("0", "a"), ("1", "b"), ("7", "c"), ("3", ""), ("4", "\u200b")]


def test_a_line_of_text_is_found_by_its_number(tmp_path):
    """Whatever lines without text lie before it."""
    (tmp_path / "t.txt").write_text("a\n\n \nb\n\n")
    assert list(read_texts(tmp_path / "t.txt", "passage")) == [("0", "a"), ("3", "b")]
    (tmp_path / "t.csv").write_text("text\na\n\nb\n")
    assert list(read_texts(tmp_path / "t.csv", "passage")) == [("0", "a"), ("1", "b")]


def test_ids_and_fields_are_found_as_sources_have_them(tmp_path):
    rows = [{"_id": "d7", "title": "Pain", "Text": "relief"}, {"_id": "d9", "title": "", "Text": "fever"}]
    source = write_jsonl(tmp_path / "corpus.jsonl", rows)
    assert list(read_texts(source, "passage")) == [("d7", "relief"), ("d9", "fever")]
    assert list(read_texts(source, "passage", "title,Text")) == [("d7", "Pain\nrelief"), ("d9", "fever")]
    with pytest.raises(UserError, match="no field 'title,body' in its first row"):
        read_texts(source, "passage", "title,body")
    source = write_jsonl(tmp_path / "trivia.jsonl", [{"answer": {"value": "Paris"}}, {"answer": {}}])
    with pytest.raises(UserError, match=r"line 2: field 'answer\.value' is missing"):
        list(read_texts(source, "passage", "answer.value"))


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL.GZ", "a.Jsonl.zst", "a.jsonl.bz2", "a.txt", "a.csv", "a.json"])
def test_files_are_read_as_sources_are(tmp_path, name):
    """With a byte order mark, under any ending, in capitals or not."""
    content = {"txt": "fever\r\n\r\npain\r\n", "csv": "text,n\r\nfever,1\r\npain,2\r\n"}
    default = '{"text": "fever"}\n{"text": "pain"}\n'
    data = b"\xef\xbb\xbf" + content.get(name.rpartition(".")[2], default).encode()
    (tmp_path / name).write_bytes(compressed(data, name))
    second = "2" if name == "a.txt" else "1"  # there the number of its line
    assert list(read_texts(tmp_path / name, "passage")) == [("0", "fever"), (second, "pain")]


@pytest.mark.parametrize("ending", ["gz", "zst", "bz2", "xz"])
@pytest.mark.parametrize("harm", ["truncated", "emptied", "changed"])
def test_a_damaged_file_is_never_taken_for_whole(tmp_path, ending, harm):
    lines = (json.dumps({"text": " ".join(map(str, np.random.default_rng(row).random(20)))}) for row in range(3000))
    data = compressed("\n".join(lines).encode(), ending)
    source = tmp_path / f"a.jsonl.{ending}"
    changed = data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :]
    source.write_bytes({"truncated": data[: len(data) // 2], "emptied": b"", "changed": changed}[harm])
    told = "(damaged|line)" if harm == "changed" else "damaged"
    with pytest.raises(UserError, match=f"a.jsonl.{ending}: {told}"):
        list(read_texts(source, "passage"))


def compressed(data, name):
    import bz2
    import lzma

    import zstandard

    ending = name.lower().rpartition(".")[2]
    kinds = {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress, "xz": lzma.compress}
    return kinds.get(ending, bytes)(data)


def test_other_bad_files_are_named(tmp_path):
    for name, data, message in (
        ("a.jsonl", b'{"text": "\xff"}', r"line 1: the text is not valid UTF-8 \(byte 10: convert .* iconv"),
        ("b.jsonl", b"\xff\xfe{\0", "is UTF-16"),
        ("a.jsonl.gz", b"no gzip", "damaged"),
        ("a.parquet", b"no parquet", "damaged or not a parquet file"),
        ("a.doc", b"x", "a.doc: unknown format; names end in"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            list(read_texts(tmp_path / name, "passage"))
    with pytest.raises(UserError, match="is not a file"):
        read_texts(tmp_path, "passage")
