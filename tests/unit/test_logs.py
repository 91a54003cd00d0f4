from __future__ import annotations

from pathlib import Path

import pytest

from lbr_dist.logs import is_torn, read_rows
from lbr_dist.training.tracking import keep_rows

GOOD = [{"step": 1, "id": "caf\u00e9\u2028"}, {"step": 2}]
LINES = '{"step": 1, "id": "caf\u00e9\u2028"}\n%s{"step": 2}\n'


@pytest.mark.parametrize("middle", [b"", b'{"step": 7, "lo\n', b"\0" * 4096 + b"\n", b"\xff\xfe\x81\n", b"5\n", b"\n"])
def test_what_became_of_one_line_harms_no_other(tmp_path: Path, middle: bytes) -> None:
    first, second = LINES.encode().split(b"%s")
    (tmp_path / "log").write_bytes(first + middle + second)
    assert read_rows(tmp_path / "log") == GOOD
    assert not is_torn(tmp_path / "log")
    keep_rows(tmp_path / "log", 1)
    assert read_rows(tmp_path / "log") == GOOD[:1]


@pytest.mark.parametrize("end", [b'{"st', b"\0\0\0", b"{}"])
def test_torn(tmp_path: Path, end: bytes) -> None:
    (tmp_path / "log").write_bytes(b"{}\n" + end)
    assert is_torn(tmp_path / "log")


def test_no_file(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "log") == []
    assert not is_torn(tmp_path / "log")
    (tmp_path / "log").touch()
    assert not is_torn(tmp_path / "log")
