"""A rank that hangs ends, also where its report cannot be written; the stacks of real ranks: tests/recovery."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
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


SAVES = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from lbr_dist.training import collective, position, run, watchdog  # position: slow, and imported by a save
from lbr_dist.training.checkpoint.random_state import random_state
watchdog.START_S = watchdog.GRACE_S = 0.5

def slow(*_, **__):
    time.sleep(3.5)  # more than 2 + 0.375 (how often is looked) + 0.5

collective.on_rank_zero = lambda function: function()
saved = SimpleNamespace(wait=slow, save=slow)
job = SimpleNamespace(plan=SimpleNamespace(fingerprint="", identity={}))
loop = object.__new__(run._Loop)
loop._recipe = SimpleNamespace(checkpoint=SimpleNamespace(asynchronous=True))
loop._s = SimpleNamespace(
    lock=SimpleNamespace(check=lambda: True), done=1, samples=1, skipped=0, wandb_id=None, job=job, checkpointer=saved,
    began_with=None, audit=SimpleNamespace(sync=lambda: None),
)
loop._meter, loop._write_s, run.COPY_S = SimpleNamespace(saved=lambda _: None), 60.0, 2.0
with watchdog.Watchdog(Path(sys.argv[1]), 0, 1.5) as loop._watchdog:
    loop._save(wait=sys.argv[2] == "waits")
    print("saved", flush=True)
    time.sleep(60)
"""


SUSPENDED = """
import sys, time
from pathlib import Path
from lbr_dist.training import watchdog
watchdog.START_S = watchdog.GRACE_S = 0.5
with watchdog.Watchdog(Path(sys.argv[1]), 0, 2.5) as watch:
    watch.alive("running step 2")
    print("running", flush=True)
    for _ in range(15):  # a sleep would be over, however long it was suspended for
        time.sleep(0.1)
    watch.alive("running step 3")
    print("done", flush=True)
"""


def test_a_run_that_was_suspended_did_not_hang(tmp_path: Path) -> None:
    """It is woken, and its step, which takes 1.5 of the 2.5 s that it may, goes on."""
    run = subprocess.Popen([sys.executable, "-c", SUSPENDED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "running\n"
    run.send_signal(signal.SIGSTOP)
    time.sleep(3)
    run.send_signal(signal.SIGCONT)
    assert run.communicate(timeout=30)[0] == "done\n"
    assert run.returncode == 0


def test_a_slow_write_is_no_hang_and_what_follows_may_be(tmp_path: Path) -> None:
    """Waiting for the last checkpoint and for this one takes longer than a step may."""
    command = [sys.executable, "-c", SAVES, str(tmp_path), "waits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert "saved" in done.stdout, done.stderr
    assert "while going on after the save of step 1" in done.stderr
    assert done.returncode == 1


def test_a_copy_to_host_memory_that_does_not_end_is_a_hang(tmp_path: Path) -> None:
    """What is written in the background has its two hours; the copy before it, for which the run waits, has not."""
    command = [sys.executable, "-c", SAVES, str(tmp_path), "copies"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert "saved" not in done.stdout, done.stderr
    assert "no progress for 2 s, while saving step 1" in done.stderr
    assert done.returncode == 1


def test_a_rank_ends_though_its_report_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "stacks").write_text("a file where the folder goes")
    command = [sys.executable, "-c", HANGS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "rank 0: no progress for 0.5 s, while waiting for nothing" in done.stderr
    assert "Current thread" in done.stderr or "Thread 0x" in done.stderr
