"""A rank that hangs ends, also where its report cannot be written; the stacks of real ranks: tests/recovery."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HANGS = """
import sys, time
from pathlib import Path
from lbr_dist.training import watchdog
watchdog.START_S = watchdog.GRACE_S = 0.5
with watchdog.Watchdog(Path(sys.argv[1]), 0, 0.5) as watch:
    watch.alive("waiting for nothing")
    time.sleep(60)
"""


def test_a_rank_ends_though_its_report_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "stacks").write_text("a file where the folder goes")
    command = [sys.executable, "-c", HANGS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "rank 0: no progress for 0.5 s, while waiting for nothing" in done.stderr
    assert "Current thread" in done.stderr or "Thread 0x" in done.stderr
