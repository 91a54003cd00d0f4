"""What was cut short or damaged is never taken for whole, whatever compresses it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from lbr_dist.data.compressed import DAMAGE, open_file
from lbr_dist.data.readers import rows
from lbr_dist.data.sources import Source, expand
from lbr_dist.errors import UserError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
}  # fmt: skip


def lines(count: int = 20_000) -> bytes:
    rng = random.Random(0)
    return b"".join(
        json.dumps({"question": f"q {i}", "answer": f"a {rng.random()}"}).encode() + b"\n" for i in range(count)
    )


def tarred(count: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(count):
            data = json.dumps({"question": f"q {number}", "answer": "a" * 600}).encode()
            member = tarfile.TarInfo(f"{number}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def count(path: Path) -> int:
    (part,) = expand(Source(str(path)), path.parent)
    return sum(1 for _ in rows(part))


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.tar"])
def test_whole_and_cut(tmp_path: Path, name: str, ending: str) -> None:
    path = tmp_path / (name + (ending.upper() if name.isupper() else ending))
    data = COMPRESS[ending](tarred(300) if "tar" in name else lines())
    path.write_bytes(data)
    assert count(path) == (300 if "tar" in name else 20_000)
    for kept in (len(data) // 2, len(data) - 1, 0):
        path.write_bytes(data[:kept])
        with pytest.raises(UserError, match=f"{path}: damaged or not a"):
            count(path)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    path.write_bytes(flipped)
    with pytest.raises(UserError, match=f"{path}: damaged or not a"):
        count(path)


@pytest.mark.parametrize("ending", COMPRESS)
def test_several_frames_are_one_file(tmp_path: Path, ending: str) -> None:
    compress, data = COMPRESS[ending], lines(50)
    (tmp_path / f"a{ending}").write_bytes(compress(data[:999]) + compress(data[999:]))
    with open_file(tmp_path / f"a{ending}") as file:
        assert file.read() == data
    (tmp_path / f"b{ending}").write_bytes(compress(data) + compress(data)[:-9])
    with pytest.raises(DAMAGE), open_file(tmp_path / f"b{ending}") as file:
        file.read()


def test_tars_that_end_too_early(tmp_path: Path) -> None:
    """tarfile takes a header that is cut or damaged for the end of the archive."""
    path, data = tmp_path / "a.tar", tarred(5)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        third = tar.getmembers()[2].offset
    for damaged, problem in (
        (data[:third], f"its end mark is missing: it was cut short, at byte {third}"),
        (data[: third + 100], f"its end mark is missing: it was cut short, at byte {third}"),
        (data[: third + 700], "unexpected end of data"),
        (data[:third] + b"x" * 512 + data[third + 512 :], f"invalid header|bad checksum, at byte {third}"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{path}: damaged or not a tar file \(.*({problem})"):
            count(path)
