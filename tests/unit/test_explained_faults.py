"""What ends a run and is no bug; with real ranks: tests/distributed/test_train.py and test_launchers.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lbr_dist.environment import Environment
from lbr_dist.errors import UserError
from lbr_dist.recipes import parse_recipe
from lbr_dist.training.faults import ContactLostError, FaultError, explained

GLOO = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:17")
SPENT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")


def job(world: int = 2, stage: int = 2, **model: Any) -> Any:
    raw = {
        "stage": "generative",
        "output": "run",
        "model": {"path": "model", **model},
        "data": {"sets": [{"path": "set"}], "bin_tokens": 16384},
        "batch": {"global_batch": 32},
        "duration": {"steps": 9},
    }
    environment = Environment(world - 1, world, 0, 1, ("n", 1), "test")
    return SimpleNamespace(
        recipe=parse_recipe(raw, "test"), environment=environment, regime=SimpleNamespace(stage=stage)
    )


@pytest.mark.parametrize(
    ("done", "kind", "at"),
    [
        (None, UserError, "while the model was loaded"),
        (0, UserError, "in step 1, with micro-batches of up to 16,384 tokens"),
        (3, FaultError, "after step 3, with micro-batches of up to 16,384 tokens"),
    ],
)
def test_memory_that_is_spent_in_the_first_step_is_so_again(done: int | None, kind: type[Exception], at: str) -> None:
    told = explained(SPENT, job(), done)
    assert type(told) is kind
    said = f"rank 1: out of memory {at} (CUDA out of memory. Tried to allocate 2.00 GiB.): try "
    assert str(told).startswith(said)
    assert ("batch.micro_tokens" in str(told)) is (done is not None)


def test_what_helps_is_what_is_not_done_yet() -> None:
    words = "more ranks, or deepspeed=zero3_offload"
    more = "model.activation_checkpointing=true, then deepspeed=zero3, then "
    assert str(explained(SPENT, job(), 0)).endswith(f"(or data.bin_tokens), then {more}{words}")
    done = job(stage=3, activation_checkpointing=True)
    assert str(explained(SPENT, done, 0)).endswith(f"(or data.bin_tokens), then {words}")
    assert explained(MemoryError(), job(world=1), None) is not None


def test_one_rank_alone_loses_no_contact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    assert isinstance(explained(GLOO, job(), 0), ContactLostError)
    assert explained(GLOO, job(world=1), 0) is None
    assert explained(RuntimeError("a bug"), job(), 0) is None
