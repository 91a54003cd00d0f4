"""Lose a node in the middle of a job, and print what happens: the transcript in docs/transcripts.

    PYTHONPATH=tests python tests/cluster/node_loss.py > docs/transcripts/slurm_node_loss.txt

Lines that begin with $ are commands; what follows is what they printed. Paths are shortened.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import make_model
from slurm_cluster import LONG, PROJECT, SlurmCluster, wait_for
from slurm_place import make_place

from lbr_dist.logs import read_rows


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="node-loss-") as name:
        place = Path(name) / "place"
        make_model(place / "base", "llama")
        make_place(place)
        cluster = SlurmCluster(Path(name) / "slurm", "lbrloss", "10.213.91", 19017, nodes=3)
        cluster.start()
        try:
            Transcript(cluster, place).write()
        finally:
            cluster.stop()


class Transcript:
    def __init__(self, cluster: SlurmCluster, place: Path) -> None:
        self._cluster, self._place = cluster, place
        self._env = {
            "LBR_HOME": str(PROJECT),
            "LBR_PYTHON": sys.executable,
            "PYTHONPATH": str(PROJECT),
            "LAUNCHER": "srun",
        }

    def write(self) -> None:
        self._show("sinfo -N -o '%N %T'")
        disturbed = self._submit("runs/disturbed")
        run = self._place / "runs" / "disturbed"
        metrics = run / "metrics.jsonl"
        wait_for(
            lambda: metrics.is_file() and len(read_rows(metrics)) >= 45, LONG, lambda: self._cluster.log(disturbed)
        )
        self._show("squeue -o '%i %T %N %r'")
        print(f"$ mini_slurm.sh node-down n2        # at step {len(read_rows(metrics))}")
        self._cluster.mini("node-down", "n2")
        began, before = time.monotonic(), ""
        while True:
            facts = self._cluster.facts(disturbed)
            state = f"{facts['JobState']} on {facts['NodeList']}, restarts {facts['Restarts']}"
            if state != before:
                print(f"  {time.monotonic() - began:4.0f} s later: job {disturbed} is {state}")
                before = state
            if facts["JobState"] == "COMPLETED" or time.monotonic() - began > LONG:
                break
            time.sleep(0.2)
        self._show("sinfo -N -o '%N %T'")
        self._show(f"cat lbr-stage1-{disturbed}.log")
        self._show("cat runs/disturbed/slurm.jsonl")
        self._show("lbr audit runs/disturbed", [sys.executable, "-m", "lbr_dist", "audit", "runs/disturbed"])
        calm = self._submit("runs/calm")
        self._cluster.finish(calm)
        losses = [
            [row["loss"] for row in read_rows(self._place / "runs" / r / "metrics.jsonl")]
            for r in ("disturbed", "calm")
        ]
        same = sum(a == b for a, b in zip(*losses, strict=True))
        print(f"\n{same} of {len(losses[0])} losses are those of the undisturbed run, digit for digit")

    def _submit(self, output: str) -> int:
        print(f"$ sbatch --nodes=2 --time=30 slurm/stage1.sh one.yaml output={output}")
        options = ("--nodes=2", "--time=30")
        job = self._cluster.submit(
            self._place, "stage1.sh", "one.yaml", f"output={output}", options=options, **self._env
        )
        print(f"Submitted batch job {job}")
        return job

    def _show(self, line: str, command: list[str] | None = None) -> None:
        done = subprocess.run(
            command or shlex.split(line), cwd=self._place, env={**self._cluster.env, **self._env},
            capture_output=True, text=True, timeout=LONG, check=True,
        )  # fmt: skip
        output = done.stdout.replace(f"{self._place}/", "").replace(str(self._place), ".")
        print(f"\n$ {line}\n{output}", end="", flush=True)


if __name__ == "__main__":
    main()
