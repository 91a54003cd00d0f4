"""One trial of every fault: do it to a run, let the run go on, and say what came of it.

Used by test_faults and test_kills (a few trials of each) and by benchmarks/resume.py (the table). A trial compares with
a calm run, to which nothing happened:

    exact resume    every loss and every final weight is the calm run's, bit for bit, and the audit finds the plan
    clear error     the run ended with an error that names the cause; with the cause mended it goes on exactly
    wrong           anything else; the trial's text says what
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fault_worker import train_with
from ranks import run_ranks, start_ranks
from training_runs import make_set, recipe, train_all

from lbr_dist.logs import read_rows
from lbr_dist.training.audit import audit
from lbr_dist.training.checkpoint.listing import list_checkpoints
from lbr_dist.training.checkpoint.weights import iterate_weights

EXACT, CLEAR = "exact resume", "clear error"
WORLD = 2


class WrongError(AssertionError):
    """What a trial found that may not be."""


def require(condition: object, what: object) -> None:
    if not condition:
        raise WrongError(str(what))


class Trials:
    """A folder with a model, a prepared set and a calm run; every method is one trial and returns its outcome."""

    def __init__(self, folder: Path, model: Path, *, seed: int = 0, workers: int = 0) -> None:
        self.folder, self.model, self.rng = folder, model, random.Random(seed)
        self.half_written = 0
        """Kills so far that fell into a save and left a part of a checkpoint."""
        self.data = make_set(folder / "data", model)
        self.calm = self.recipe("calm", workers=workers)
        (result,) = self.ranks(train_all, [self.calm])
        require(result.get("code") == 0, result)
        self._rows = self.rows(self.calm)
        self._weights = dict(iterate_weights(self.calm["output"]))

    def recipe(self, name: str, workers: int = 0, **sections: Any) -> dict[str, Any]:
        settings = {
            "duration": {"epochs": 8},
            "checkpoint": {"every_steps": 2, "keep_last": 3},
            "model": {"lora": {"r": 4, "dropout": 0.1}},
            "data": {"workers": workers},
        }
        return recipe(self.folder / name, self.model, self.data, **(settings | sections))

    def ranks(self, function: Callable[..., Any], *args: Any) -> list[dict[str, Any]]:
        return run_ranks(function, WORLD, self.fresh(), *args, timeout=900)[0]

    def fresh(self) -> Path:
        here = self.folder / f"ranks-{len(list(self.folder.glob('ranks-*')))}"
        here.mkdir()
        return here

    def rows(self, raw: dict[str, Any]) -> list[dict[str, Any]]:
        file = Path(raw["output"]) / "metrics.jsonl"
        return read_rows(file) if file.is_file() else []

    def finish(self, raw: dict[str, Any]) -> str:
        """Let the run go on to its end, and compare it with the calm one."""
        (result,) = self.ranks(train_all, [raw])
        require(result.get("code") == 0, result)
        require([r["loss"] for r in self.rows(raw)] == [r["loss"] for r in self._rows], "other losses")
        for name, weight in iterate_weights(raw["output"]):
            require(torch.equal(weight, self._weights[name]), f"other weights: {name}")
        found = audit(raw["output"])
        require(not found.problems, found.problems)
        return EXACT

    # SIGKILL

    def killed(self, raw: dict[str, Any], victims: list[int], *, saving: bool) -> None:
        """Start the run, kill the victims at a random moment (in the middle of a save, if so asked), await the rest."""
        here, before, moment = self.fresh(), len(self.rows(raw)), self.rng.randint(0, 4)
        temporary = Path(raw["output"]) / "checkpoints"
        left = set(temporary.glob(".tmp-step-*"))  # by an earlier kill; the next start removes it
        processes = start_ranks(train_all, WORLD, here, [raw])

        def ended() -> bool:
            return not all(process.is_alive() for process in processes)

        wait_for(lambda: len(self.rows(raw)) >= before + moment or ended())
        if saving:
            wait_for(lambda: set(temporary.glob(".tmp-step-*")) - left or ended())
        else:
            time.sleep(self.rng.random() * 0.3)
        for rank in victims:
            processes[rank].kill()
        end = time.monotonic() + 240  # a rank that has not met the others yet waits for them a minute
        for process in processes:
            process.join(max(0.1, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        require(not hanging, f"ranks {hanging} were still there four minutes after rank {victims} was killed")
        self.half_written += bool(list(temporary.glob(".tmp-step-*")))

    def kill(self, name: str, kills: int, *, everybody: bool, saving: bool) -> str:
        """Kill a run again and again, then let it end."""
        raw = {**self.calm, "output": str(self.folder / name)}
        for _ in range(kills):
            victims = [0, 1] if everybody else [self.rng.randrange(WORLD)]
            self.killed(raw, victims, saving=saving)
            if len(self.rows(raw)) == len(self._rows):
                break
        return self.finish(raw)

    # A checkpoint that was damaged

    def damage(self, name: str, kind: str) -> str:
        raw = {**self.calm, "output": str(self.folder / name)}
        shutil.copytree(self.calm["output"], raw["output"])
        newest = list_checkpoints(raw["output"])[0][0]
        file = self.rng.choice(sorted(p for p in newest.rglob("*") if p.is_file()))
        if kind == "truncated":
            os.truncate(file, self.rng.randrange(file.stat().st_size))
        elif kind == "flipped":
            data = bytearray(file.read_bytes())
            data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
            file.write_bytes(data)
        else:
            file = self.rng.choice(sorted(newest.glob("*-of-*.safetensors")))
            file.unlink()
        outcome = self.finish(raw)
        log = (Path(raw["output"]) / "log.txt").read_text()
        require(f"passed over {newest}/{file.name}" in log, f"the log does not name {file}")
        return outcome

    # The disk is full

    @contextmanager
    def disk(self, name: str, mib: int) -> Iterator[Path]:
        place = self.folder / name
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(place)], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)

    def full_disk(self, name: str) -> str:
        """A save meets a full disk: an error that names it; with space again the run goes on exactly."""
        newest = list_checkpoints(self.calm["output"])[0][0]
        size = sum(-(-p.stat().st_size // 4096) * 4096 for p in newest.rglob("*") if p.is_file())
        with self.disk(name, 8) as place:
            raw = {**self.calm, "output": str(place / "run")}
            room = int(size * self.rng.uniform(1.2, 1.8))  # for one checkpoint and a part of the next
            (place / "other").write_bytes(b"\0" * (shutil.disk_usage(place).free - room))
            (result,) = self.ranks(train_all, [raw])
            for part in ("was not written", "No space left on device", "GiB free", "earlier checkpoints are intact"):
                require(part in result.get("error", ""), result)
            (place / "other").unlink()
            require(self.finish(raw) == EXACT, "not exact")
        return CLEAR

    # The loss is not finite; a rank hangs; a shard goes away

    def nan(self, name: str, mode: str) -> str:
        """Stop: the samples are on disk and the run goes on exactly. Skip: no rank takes the step."""
        step = self.rng.randint(2, len(self._rows))
        raw = {**self.calm, "output": str(self.folder / name), "on_nan": mode}
        (result,) = self.ranks(train_with, f"nan {step}", [raw])
        for rank in range(WORLD):  # one of them may have none: an epoch's last step can have fewer bins than ranks
            dump = json.loads((self.folder / name / f"bad-step-{step}-rank-{rank}.json").read_text())
            audit = Path(self.calm["output"], "audit", f"rank-{rank}.jsonl").read_text().splitlines()
            (used,) = [row["ids"] for row in map(json.loads, audit) if row.get("step") == step - 1]
            require(dump["ids"] == used, f"rank {rank} wrote down other samples than it used")
        if mode == "skip":
            require(result.get("code") == 0, result)
            require([row["step"] for row in self.rows(raw) if row.get("skipped")] == [step], "not that step skipped")
            require(all(row["loss"] is not None for row in self.rows(raw) if row["step"] != step), "NaN elsewhere")
            return "step skipped"
        require(f"step {step}: loss" in result.get("error", ""), result)
        require(self.finish(raw) == EXACT, "not exact")
        return CLEAR

    def hang(self, name: str) -> str:
        """A rank stops: every rank's stack is written, all end, and the run goes on exactly."""
        step = self.rng.randint(2, len(self._rows))
        raw = {**self.calm, "output": str(self.folder / name), "step_timeout": 10}
        processes = start_ranks(train_with, WORLD, self.fresh(), f"hang {step}", [raw])
        for process in processes:
            process.join(300)
            process.kill()
        require([process.exitcode for process in processes] == [1, 1], [p.exitcode for p in processes])
        stacks = [(self.folder / name / "stacks" / f"rank-{rank}.txt").read_text() for rank in range(WORLD)]
        for text in stacks:
            require(f"no progress for 10 s, while running step {step}" in text, text[:200])
        require("in faulty" in stacks[-1] and "in faulty" not in stacks[0], "the stacks do not show who hangs")
        require(self.finish({**raw, "step_timeout": 600}) == EXACT, "not exact")
        return CLEAR

    def vanish(self, name: str) -> str:
        """A shard goes away in mid-epoch: it is named; when it is back the run goes on exactly."""
        copy = self.folder / f"{name}-data"
        shutil.copytree(self.data, copy)
        shard = self.rng.choice(sorted((copy / "gl").glob("*.tar")))
        raw = {**self.calm, "output": str(self.folder / name)}
        raw["data"] = {**raw["data"], "sets": [{"path": str(copy)}], "workers": 0}  # which do not see the patches
        step = self.rng.randint(1, 3)
        message = self._vanish(raw, f"vanish {step} {shard}")
        require(str(shard) in message, message[-2000:])
        shutil.copytree(self.data, copy, dirs_exist_ok=True)
        require(self.finish(raw) == EXACT, "not exact")
        return CLEAR

    def _vanish(self, raw: dict[str, Any], fault: str) -> str:
        """What the ranks said; the one that misses the shard ends, and its launcher ends the others: here, us."""
        here = self.fresh()
        processes = start_ranks(train_with, WORLD, here, fault, [raw])
        told = Path(raw["output"]) / "told"
        wait_for(lambda: told.exists() or not any(process.is_alive() for process in processes))
        for process in processes:
            process.join(2)
            process.kill()
            process.join()
        return told.read_text() if told.exists() else "it ended without an error"

    def stopped(self, name: str, number: int) -> str:
        """SIGTERM or SIGUSR1 to one rank: all stop after the same step with a checkpoint and code 75."""
        step = self.rng.randint(1, len(self._rows) - 1)
        raw = {**self.calm, "output": str(self.folder / name)}
        (result,) = self.ranks(train_with, f"signal {step} {number}", [raw])
        require(result == {"step": step, "code": 75}, result)
        require(list_checkpoints(raw["output"])[0][0].name == f"step-{step:06d}", "no checkpoint of the last step")
        return self.finish(raw)


def wait_for(condition: Callable[[], Any], timeout: float = 300) -> None:
    end = time.monotonic() + timeout
    while not condition():
        require(time.monotonic() < end, "nothing happened")
        time.sleep(0.01)


SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
