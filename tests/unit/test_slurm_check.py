"""What the first node makes of nodes that die while it asks them; real nodes are in tests/cluster."""

from __future__ import annotations

from typing import Any

import pytest

from lbr_dist.environment import Environment
from lbr_dist.launch import slurm_check
from lbr_dist.launch.slurm_check import Server

HERE = Environment(0, 3, 0, 1, ("a", 20000), "srun, job 7")


class Node:
    """Answers, until it is given the task at which it dies."""

    def __init__(self, dies_at: str = "") -> None:
        self.dies_at, self.tasks, self.gone = dies_at, list[str](), False

    def send(self, task: str, **_: Any) -> None:
        if self.gone:
            raise BrokenPipeError
        self.tasks.append(task)

    def receive(self, _: float) -> dict[str, Any]:
        task = self.tasks[-1]
        if task == self.dies_at:
            self.gone = True
            raise ConnectionError("the connection was closed")
        if task == "pair" and any(
            node.tasks[-1] == node.dies_at == "pair" and not node.gone for node in NODES.values()
        ):
            return {"error": "pair: timed out"}
        return {"clock": {"time": 0.0}, "gpus": {"gpus": 0}, "port": {"port": 1}, "pair": {"gb_s": 1.0}}[task]


NODES: dict[int, Node] = {}


@pytest.mark.parametrize("task", ["clock", "gpus", "port", "pair"])
@pytest.mark.parametrize("dead", [1, 2])
def test_a_node_that_dies_is_named_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, task: str, dead: int
) -> None:
    monkeypatch.setattr(slurm_check.time, "time", lambda: 0.0)
    NODES.clear()
    NODES.update({index: Node(task if index == dead else "") for index in range(3)})
    server = Server(["a", "b", "c"], HERE, 20000)
    server._wires = dict(NODES)  # type: ignore[assignment]
    monkeypatch.setattr(server, "_accept", lambda: None)
    well = server.run([], quick=False)
    bad = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bad: ")]
    if task == "port" and dead == 2:  # the second of every pair is not asked for a port
        assert well
    else:
        assert not well
        assert bad == [f"bad: {'abc'[dead]}: {task}: no answer (the connection was closed)"]
