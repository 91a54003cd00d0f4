from __future__ import annotations

import contextlib
import errno
import http.server
import io
import json
import os
import pickle
import resource
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest
from prepared import Bytes

from lbr_dist.data import remote, shard_reader
from lbr_dist.data.record import Record, normalised_hash
from lbr_dist.data.shard_reader import ShardReader
from lbr_dist.data.shard_writer import write_set
from lbr_dist.data.shards import check_tokenizer, open_set, verify
from lbr_dist.errors import UserError

RECORDS = [
    Record(f"r{i}", question=f"q{i}", answer="ä" * i, domain="d", source="s", negatives=("n",) * (i % 3))
    for i in range(1, 24)
]
TEXTS = [Record(f"t{i}", text=f"text {i}") for i in range(3)]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    write_set(
        root,
        {"gl": [*RECORDS, *TEXTS], "cl": RECORDS[:4]},
        Bytes(),
        name="demo",
        tokenizer_path="models/b",
        shard_records=10,
    )
    return root


def test_index_and_reader(prepared: Path) -> None:
    opened = open_set(prepared)
    index = opened.index("gl")
    everything = [*RECORDS, *TEXTS]
    assert (opened.name, len(index), opened.splits["gl"].texts) == ("demo", 26, 3)
    assert index.shard.tolist() == [0] * 10 + [1] * 10 + [2] * 6
    assert index.ids.tolist() == [record.id for record in everything]
    assert index.question_tokens.tolist() == [len(record.question or "") or -1 for record in everything]
    assert index.answer_tokens.tolist() == [2 * i for i in range(1, 24)] + [-1] * 3
    assert index.text_tokens.tolist() == [-1] * 23 + [6] * 3
    assert [index.negative_tokens[row].tolist() for row in range(26)] == [[1] * len(r.negatives) for r in everything]
    assert index.negative_tokens.lengths.tolist() == [len(record.negatives) for record in everything]
    assert index.answer_hash.tolist() == [normalised_hash(record.document) for record in everything]
    reader = ShardReader(opened, "gl")
    rows = [25, 0, 13, 0]
    assert [Record.from_dict(row) for row in reader.read(rows)] == [everything[row] for row in rows]


def test_plain_webdataset_reads_the_shards(prepared: Path) -> None:
    import webdataset

    samples = list(webdataset.WebDataset(open_set(prepared).urls("gl"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(26)]
    assert [sample["json"]["id"] for sample in samples] == open_set(prepared).index("gl").ids.tolist()


def test_tar_headers_are_those_of_tarfile(prepared: Path) -> None:
    path = prepared / "gl/000000.tar"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert len(members) == 10
    data = path.read_bytes()
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)
        assert data[member.offset : member.offset + 512] == member.tobuf(tarfile.USTAR_FORMAT)


def test_shards_are_bounded_in_bytes(tmp_path: Path) -> None:
    records = [Record(str(i), text="x" * (5000 if i == 3 else 100)) for i in range(8)]
    write_set(tmp_path / "set", {"gl": records}, Bytes(), name="n", shard_bytes=4096)
    shards = open_set(tmp_path / "set").splits["gl"].shards
    assert sum(shard.records for shard in shards) == 8
    for shard in shards:
        assert shard.bytes == (tmp_path / "set" / shard.name).stat().st_size
        assert shard.bytes <= 4096 or shard.records == 1


def test_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_set(tmp_path / name, {"gl": RECORDS}, Bytes(), name="n", shard_records=10)
        time.sleep(0.01)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 7
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_fingerprint_is_of_the_content_and_not_of_paths(tmp_path: Path) -> None:
    made = [
        write_set(tmp_path / str(i), {"gl": records}, Bytes(), name="n", tokenizer_path=path)["fingerprint"]
        for i, (records, path) in enumerate([(RECORDS, "x"), (RECORDS, "y"), (RECORDS[1:], "x")])
    ]
    assert made[0] == made[1] != made[2]


def test_reader_travels_to_another_process(prepared: Path) -> None:
    reader = ShardReader(open_set(prepared), "gl")
    first = reader.read([3])
    assert pickle.loads(pickle.dumps(reader)).read([3]) == first


def test_verify_reads_every_byte(prepared: Path) -> None:
    opened = open_set(prepared)
    assert verify(opened) == sum(path.stat().st_size for path in prepared.rglob("0*"))
    path = prepared / "gl/000001.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    assert verify(open_set(prepared), deep=False)
    with pytest.raises(
        UserError, match=r"gl/000001.tar: its checksum changed: copy the set again, or prepare it with --overwrite"
    ):
        verify(open_set(prepared))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def edit(path: Path, change: Callable[[dict], Any]) -> None:
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: cut(root / "gl/000001.tar"), "gl/000001.tar: 11263 bytes instead of 11264"),
        (lambda root: cut(root / "gl/000001.parquet"), "gl/000001.parquet: .* bytes instead of"),
        (lambda root: (root / "cl/000000.tar").unlink(), "cl/000000.tar: missing from the prepared set"),
        (lambda root: (root / "manifest.json").unlink(), "not a prepared set .no manifest.json in it."),
        (lambda root: (root / "manifest.json").write_text("{"), "manifest.json: not the manifest of a prepared set"),
        (lambda root: (root / "manifest.json").write_text("[1]"), "manifest.json: not the manifest of a prepared set"),
        (lambda root: edit(root / "manifest.json", lambda m: m.update(seed=1)), "it was changed after the set was"),
        (lambda root: edit(root / "manifest.json", lambda m: m.update(format=2)), "prepared by a newer lbr .format 2"),
    ],
)
def test_damaged_sets_are_refused_at_opening(prepared: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(prepared)
    with pytest.raises(UserError, match=message):
        open_set(prepared)


def test_what_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: not a prepared set \(no such folder\): give the folder that"):
        open_set(tmp_path / "nowhere")


def test_empty_and_unknown_splits(prepared: Path) -> None:
    with pytest.raises(UserError, match="its eval split is empty: prepare it again with --eval"):
        open_set(prepared).index("eval")
    with pytest.raises(UserError, match="no split 'test'; it has gl, cl, eval"):
        open_set(prepared).index("test")


def test_index_that_is_not_that_of_its_shard(prepared: Path) -> None:
    opened = open_set(prepared)
    (prepared / "gl/000000.parquet").write_bytes((prepared / "gl/000001.parquet").read_bytes())
    with pytest.raises(UserError, match=r"gl/000000.parquet: this index is not that of gl/000000.tar"):
        opened.index("gl")
    (prepared / "gl/000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"gl/000000.parquet: damaged index"):
        opened.index("gl")


def test_a_changed_byte_in_an_index(prepared: Path) -> None:
    file = prepared / "gl/000000.parquet"
    whole = file.read_bytes()
    opened = open_set(prepared)
    for place in range(4, len(whole) // 2, 97):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"gl/000000.parquet: damaged index"):
            opened.index("gl")


def test_index_of_another_tokenizer(prepared: Path) -> None:
    opened = open_set(prepared)
    check_tokenizer(opened, Bytes())
    other = Bytes()
    other.fingerprint = "bytes-2"
    with pytest.raises(UserError, match=r"made with tokenizer bytes-1 \(models/b\), the model has bytes-2: prepare"):
        check_tokenizer(opened, other)
    path = prepared / "cl/000000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"tokenizer": b"bytes-2"}), path)
    with pytest.raises(UserError, match=r"cl/000000.parquet: this index was made with another tokenizer than its set"):
        opened.index("cl")


def test_shard_that_changes_under_the_reader(prepared: Path) -> None:
    reader = ShardReader(open_set(prepared), "gl")
    path = prepared / "gl/000002.tar"
    path.write_bytes(path.read_bytes()[:1100])
    with pytest.raises(UserError, match=r"gl/000002.tar: record 25 is cut off"):
        reader.read([25])
    path = prepared / "gl/000001.tar"
    path.write_bytes(path.read_bytes().replace(b'"domain"', b'"dom"ain'))
    with pytest.raises(UserError, match=r"gl/000001.tar: record 11 is damaged"):
        reader.read([11])
    (prepared / "gl/000000.tar").unlink()
    with pytest.raises(UserError, match=r"gl/000000.tar: No such file"):
        reader.read([0])


class Server:
    """A folder over HTTP. `drop[name]` connections to a file are closed half way; -1: all of them."""

    def __init__(self, root: Path) -> None:
        self.drop: dict[str, int] = {}
        self.stall: set[str] = set()
        self.requests: list[str] = []
        self.release = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                outer.requests.append(name)
                data = (root / name).read_bytes() if (root / name).is_file() else None
                self.send_response(404 if data is None else 200)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                if name in outer.stall:
                    outer.release.wait(30)
                elif data and outer.drop.get(name, 0):
                    outer.drop[name] -= 1
                    self.wfile.write(data[: len(data) // 2])
                elif data:
                    self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.release.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "BACKOFF_S", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    served = Server(prepared)
    yield served
    served.close()


def test_remote_set_through_dropped_connections(prepared: Path, server: Server) -> None:
    server.drop = {"manifest.json": 1, "gl/000000.parquet": 1, "gl/000001.tar": 3}
    opened = open_set(server.url)
    reader = ShardReader(opened, "gl")
    rows = [0, 12, 25, 13]
    assert reader.read(rows) == ShardReader(open_set(prepared), "gl").read(rows)
    assert server.requests.count("gl/000001.tar") == 4
    assert opened.fingerprint == open_set(prepared).fingerprint
    server.requests.clear()
    assert ShardReader(open_set(server.url), "gl").read([12])  # a second reader finds shard and index in the cache
    assert server.requests == ["manifest.json"]


def test_an_address_is_taken_as_it_is_written(prepared: Path, server: Server, tmp_path: Path) -> None:
    names = {"a b.json": "one", "p[1-2].json": "two", "{x,y}.json?v=[1]": "three"}
    for name, text in names.items():
        found = tmp_path / "found"
        (prepared / quote(name, safe="?=,")).write_text(text)  # the server does not decode
        remote.fetch(f"{server.url}/{name}", found)
        assert found.read_text() == text
    with pytest.raises(UserError, match=r"\(last: the address is malformed\)"):
        remote.fetch("http://127.0.0.1:port/a", tmp_path / "none")


def test_a_login_page_is_no_manifest(prepared: Path, server: Server) -> None:
    (prepared / "manifest.json").write_text("<html>")
    with pytest.raises(UserError, match=r"not the manifest of a prepared set: see what the address gives"):
        open_set(server.url)


def test_connections_that_always_drop_name_the_address(server: Server) -> None:
    reader = ShardReader(open_set(server.url), "gl")
    server.drop = {"gl/000000.tar": -1}
    with pytest.raises(
        UserError,
        match=rf"{server.url}/gl/000000.tar: could not be read in 5 attempts \(last: the transfer ended early",
    ):
        reader.read([0])
    assert server.requests.count("gl/000000.tar") == 5
    assert not [path for path in reader.cache.folder.iterdir() if path.suffix != ".lock"]


def test_remote_bytes_are_checked(prepared: Path, server: Server) -> None:
    reader = ShardReader(open_set(server.url), "gl")
    path = prepared / "gl/000000.tar"
    path.write_bytes(path.read_bytes().replace(b'"q1"', b'"q2"'))
    with pytest.raises(UserError, match=r"gl/000000.tar: could not be read .*checksum"):
        reader.read([0])
    with pytest.raises(UserError, match=r"gl/000000.tar: could not be read .*checksum"):
        verify(open_set(server.url))


def test_a_changed_byte_of_a_text_is_found_when_it_is_read(prepared: Path) -> None:
    """It is still JSON, and has as many tokens."""
    path = prepared / "gl/000000.tar"
    path.write_bytes(path.read_bytes().replace(b'"q1"', b'"q?"', 1))
    reader = ShardReader(open_set(prepared), "gl")
    with pytest.raises(UserError, match=r"gl/000000.tar: record 0 is damaged \(its bytes changed\)"):
        reader.read([0])
    assert reader.read([1])


def test_a_damaged_copy_in_the_cache_is_fetched_again(prepared: Path, server: Server) -> None:
    expected = ShardReader(open_set(prepared), "gl").read([0, 1])
    opened = open_set(server.url)
    reader = ShardReader(opened, "gl")
    reader.read([0])
    copy = reader.cache.folder / opened.splits["gl"].shards[0].xxh128
    copy.write_bytes(bytes(copy.stat().st_size))  # as a machine may leave it that lost its power
    (copy.parent / f".{copy.name}.1.2.partial").write_bytes(b"of a process that was killed")
    assert ShardReader(opened, "gl").read([0, 1]) == expected
    assert server.requests.count("gl/000000.tar") == 2
    assert not list(copy.parent.glob(".*.partial"))


def held_below(folder: Path) -> list[str]:
    """Files of a folder that this process has open."""
    held = (os.path.realpath(file) for file in Path("/proc/self/fd").iterdir())
    return [file for file in held if file.startswith(str(folder))]


def test_all_readers_of_a_process_share_one_bound_of_open_files(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_reader, "OPEN_FILES", 4)
    readers = [ShardReader(open_set(prepared), "gl") for _ in range(3)]
    expected = readers[0].read([0, 10, 25])
    for _ in range(2):
        assert [reader.read([0, 10, 25]) for reader in readers] == [expected] * 3
        assert len(held_below(prepared)) == 4
    readers.pop().close()
    assert len(held_below(prepared)) == 1
    del readers
    assert held_below(prepared) == []


def test_a_process_without_files_to_open_closes_its_shards_first(prepared: Path) -> None:
    """It said that the set had changed."""
    one, other = (ShardReader(open_set(prepared), "gl") for _ in range(2))
    expected = one.read([0, 10])
    assert other.index.digests is not None  # read from a file on first use
    limits, taken = resource.getrlimit(resource.RLIMIT_NOFILE), list[int]()
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))

    def take_all() -> None:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))

    try:
        take_all()
        assert other.read([0, 10]) == expected
        other.close()
        take_all()
        with pytest.raises(UserError, match=r"gl/000000\.tar: Too many open files: raise the limit \(`ulimit -n`\)"):
            other.read([0])
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_storage_that_fails_is_no_mistake(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: object, *_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error", file)

    reader = ShardReader(open_set(prepared), "gl")
    for name in ("pread", "open"):
        with monkeypatch.context() as patched:
            patched.setattr(f"lbr_dist.data.shard_reader.os.{name}", fail)
            with pytest.raises(OSError, match=r"Input/output error.*gl/000000\.tar"):
                reader.read([0])
        reader.close()


def test_remote_address_without_a_set(server: Server) -> None:
    with pytest.raises(
        UserError, match=r"/nothing/manifest.json: could not be read .*the server refuses: a wrong path, or no perm"
    ):
        open_set(server.url + "/nothing")


def test_stalled_transfer_is_ended(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "STALL_S", 0.2)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    server.stall = {"manifest.json"}
    start = time.monotonic()
    with pytest.raises(UserError, match=r"could not be read in 2 attempts \(last: no byte came for 0.2 s\)"):
        remote.fetch(f"{server.url}/manifest.json", tmp_path / "file")
    assert time.monotonic() - start < 20
    assert not list(tmp_path.glob("*file*"))


@pytest.mark.parametrize("command", ["echo begun; sleep 300", "sleep 300 | cat", "(sleep 300 &)"])
def test_a_stalled_pipe_ends_with_all_its_processes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "STALL_S", 0.3)
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"\(last: no byte came for 0.3 s\)"):
        remote.fetch(f"pipe:echo $$ > {tmp_path}/group; {command}", tmp_path / "file")
    assert time.monotonic() - start < 60
    group = int((tmp_path / "group").read_text())
    while time.monotonic() - start < 60 and [*_members(group)]:  # killed, but perhaps not yet gone
        time.sleep(0.05)
    assert not [*_members(group)]


def _members(group: int) -> Iterator[str]:
    """Names of the processes of a group that are not dead."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = file.read_text().rpartition(")")
            state, _, of = rest.split()[:3]
            if int(of) == group and state not in "ZX":
                yield name


def test_a_pipe_that_webdataset_is_told_to_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("webdataset.utils.enforce_security", True)  # WDS_SECURE
    with pytest.raises(UserError, match="webdataset has no opener for this address"):
        remote.fetch("pipe:echo", tmp_path / "file")


def test_set_behind_a_pipe(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    opened = open_set(f"pipe:cat {prepared}/{{}}")
    assert ShardReader(opened, "cl").read([2]) == [RECORDS[2].as_dict()]
    with pytest.raises(UserError, match=r"gone/manifest\.json: could not be read.*it ended with exit code 1\)"):
        open_set(f"pipe:cat {prepared}/gone/{{}}")
    with pytest.raises(UserError, match=r"pipe: needs \{\}"):
        open_set(f"pipe:cat {prepared}")


def test_cache_is_bounded_and_drops_the_least_recently_used(prepared: Path, tmp_path: Path) -> None:
    opened = open_set(prepared)
    shards = opened.splits["gl"].shards
    cache = remote.ShardCache(tmp_path / "cache", (shards[0].bytes + shards[1].bytes) / (1 << 30))
    descriptors = []
    for number in (0, 1, 0, 2):
        shard = shards[number]
        url = f"file://{opened.address(shard.name)}"
        descriptors.append(cache.open(url, size=shard.bytes, xxh128=shard.xxh128))
        time.sleep(0.02)
    kept = {path.name for path in cache.folder.iterdir() if path.suffix != ".lock"}
    assert kept == {shards[0].xxh128, shards[2].xxh128}
    assert len(os.pread(descriptors[1], shards[1].bytes, 0)) == shards[1].bytes  # dropped, yet open: still readable
    for descriptor in descriptors:
        os.close(descriptor)


def test_a_cache_leaves_files_alone_that_are_not_its_own(prepared: Path, tmp_path: Path) -> None:
    opened, folder = open_set(prepared), tmp_path / "cache"
    (folder / "sub").mkdir(parents=True)
    for name in ("thesis.tex", "sub"):
        (folder / name).touch()
        os.utime(folder / name, (1, 1))  # least recently used
    cache = remote.ShardCache(folder, 0)
    for shard in opened.splits["gl"].shards[:2]:
        os.close(cache.open(f"file://{opened.address(shard.name)}", size=shard.bytes, xxh128=shard.xxh128))
    kept = {path.name for path in folder.iterdir() if path.suffix != ".lock"}
    assert kept == {"thesis.tex", "sub", opened.splits["gl"].shards[1].xxh128}


def test_a_file_that_is_evicted_while_it_is_opened_is_fetched_again(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_set(prepared)
    shard = opened.splits["gl"].shards[0]
    url = f"file://{opened.address(shard.name)}"
    cache = remote.ShardCache(tmp_path / "cache", 1)
    evictors = ["another process", "and one more"]

    def evict_first(path: Path, real: Callable[[Path], None] = os.utime) -> None:
        if evictors and evictors.pop():
            path.unlink()
        real(path)

    monkeypatch.setattr(os, "utime", evict_first)
    descriptor = cache.open(url, size=shard.bytes, xxh128=shard.xxh128)
    assert len(os.pread(descriptor, shard.bytes, 0)) == shard.bytes
    assert not evictors
    os.close(descriptor)


def test_a_cache_that_cannot_be_written_is_a_mistake_with_a_remedy(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    opened = open_set(f"pipe:cat {prepared}/{{}}")
    with pytest.raises(UserError, match=r"data\.cache_dir .*/file/sub: cannot be written .*; give another folder"):
        ShardReader(opened, "gl", tmp_path / "file/sub").read([0])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cache of indexes .*/file/.* \(XDG_CACHE_HOME\): cannot be written"):
        opened.index("gl")


def test_missing_program_and_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"the program that reads it is missing \(curl"):
        remote.fetch("http://127.0.0.1:9/x", tmp_path / "x")
    if os.path.exists("/dev/full"):  # noqa: PTH110
        full = io.FileIO("/dev/full", "w")
        monkeypatch.setattr(Path, "open", lambda *args, **kwargs: full)
        with pytest.raises(UserError, match=r"the disk is full.*a lower data\.cache_gib"):
            remote.fetch(f"file://{__file__}", tmp_path / "y")


def test_a_reader_holds_no_file_open_that_left_the_cache(prepared: Path, tmp_path: Path) -> None:
    """Its space on the disk would stay taken."""
    opened = open_set(f"pipe:cat {prepared}/{{}}")
    shards, folder = opened.splits["gl"].shards, tmp_path / "cache"
    reader = ShardReader(opened, "gl", folder, (shards[0].bytes + shards[1].bytes) / (1 << 30))
    assert reader.read([0, 10, 25]) == ShardReader(open_set(prepared), "gl").read([0, 10, 25])
    held = held_below(folder)
    assert len(held) == 2
    assert not [file for file in held if file.endswith("(deleted)")]
    assert reader.read([0]) == ShardReader(open_set(prepared), "gl").read([0])


def test_a_cache_on_a_file_system_without_locks(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(remote.fcntl, "flock", refused)
    opened = open_set(f"pipe:cat {prepared}/{{}}")
    other = tmp_path / "cache" / f".{opened.splits['gl'].shards[0].xxh128}.1.2.partial"
    other.parent.mkdir()
    other.touch()
    rows = [0, 12, 25]
    assert ShardReader(opened, "gl", tmp_path / "cache", 0).read(rows) == ShardReader(open_set(prepared), "gl").read(
        rows
    )
    assert [
        message for message in caplog.messages if "no lock to be had (No locks available)" in message
    ] == caplog.messages
    assert len(caplog.messages) == 1
    assert other.exists()  # another process may be at work on it
