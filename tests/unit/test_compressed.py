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

from lbr_dist.data.sources.compressed import DAMAGE, open_file
from lbr_dist.data.sources.parts import Source, expand
from lbr_dist.data.sources.readers import rows
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


def test_a_window_of_zstd_that_is_not_taken_unasked(tmp_path: Path) -> None:
    """`zstd --long=31`, as large dumps are compressed; the file is whole."""
    wide = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(lines(50)) + compressor.flush())
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: was compressed with a window .*zstd -d --long=31"):
        count(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize("ending", COMPRESS)
def test_several_frames_are_one_file(tmp_path: Path, ending: str) -> None:
    compress, data = COMPRESS[ending], lines(50)
    (tmp_path / f"a{ending}").write_bytes(compress(data[:999]) + compress(data[999:]))
    with open_file(tmp_path / f"a{ending}") as file:
        assert file.read() == data
    (tmp_path / f"b{ending}").write_bytes(compress(data) + compress(data)[:-9])
    with pytest.raises(DAMAGE), open_file(tmp_path / f"b{ending}") as file:
        file.read()


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_damaged_part_behind_a_whole_one(tmp_path: Path, ending: str) -> None:
    """Python's readers of bz2 and xz take it for the end of the file, and zeros in a .gz for padding."""
    first, second, third = (COMPRESS[ending](lines(count)) for count in (50, 60, 70))
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(first + second + third)
    assert count(path) == 180
    for middle in (bytes([second[0] ^ 1]) + second[1:], bytes(len(second)), b"x"):
        path.write_bytes(first + middle + third)
        with pytest.raises(UserError, match=f"{path}: damaged or not a jsonl"):
            count(path)
    for end in (second[:2], second[:4], b"x", b"\0" * 99 + b"x"):
        path.write_bytes(first + end)
        with pytest.raises(UserError, match=f"{path}: damaged or not a jsonl"):
            count(path)


@pytest.mark.parametrize("ending", [".gz", ".xz"])
@pytest.mark.parametrize("zeros", [4, 1 << 18])
def test_zeros_at_the_end_are_padding(tmp_path: Path, ending: str, zeros: int) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](lines(50)) + bytes(zeros))
    assert count(path) == 50


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_content_of_any_size(tmp_path: Path, ending: str, size: int) -> None:
    """Sizes at which a buffer is full when the stream ends, of what compresses well and of what does not."""
    for data in (bytes(size), random.Random(0).randbytes(size)):
        (tmp_path / f"a{ending}").write_bytes(COMPRESS[ending](data))
        with open_file(tmp_path / f"a{ending}") as file:
            assert file.read() == data


def test_a_tar_behind_another(tmp_path: Path) -> None:
    """What cat makes of two: tarfile ends at the first one's end mark."""
    for ending, compress in {"": bytes, **COMPRESS}.items():
        path = tmp_path / f"a.tar{ending}"
        path.write_bytes(compress(tarred(3) + tarred(5)))
        with pytest.raises(UserError, match="more than zeros follows its end mark, at byte 4608: were tars joined"):
            count(path)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_padding_of_tars(tmp_path: Path, form: int) -> None:
    """Zeros to the end of a block of 10,240 bytes, or of another; GNU tar, bsdtar and Python write them."""
    path, buffer = tmp_path / "a.tar", io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        member = tarfile.TarInfo("deep/" * 30 + "1.json")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"{}"))
    end = len(buffer.getvalue().rstrip(b"\0")) // 512 * 512 + 512
    for zeros in (512, 1024, 10_240, 1 << 20):
        path.write_bytes(buffer.getvalue()[:end] + bytes(zeros))
        assert count(path) == 1
    for compress, mode in ((gzip.compress, "gz"), (bz2.compress, "bz2"), (lzma.compress, "xz")):
        path.write_bytes(compress(buffer.getvalue()))  # compressed, and not named so
        assert count(path) == 1, mode


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
