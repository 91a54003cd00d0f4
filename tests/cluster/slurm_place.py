"""A folder to submit jobs from: a tiny base model, a prepared set and the recipes of both stages."""

from __future__ import annotations

import random
from pathlib import Path

import yaml

from lbr_dist.data.record import Record
from lbr_dist.data.shard_writer import write_set
from lbr_dist.model.tokenizer import Tokenization

WORDS = ["aspirin", "salicylate", "drug", "fever", "heart", "blood", "vessel", "rash", "measles", "water", "unknown"]
STEPS = 70
"""Of stage 1."""


def make_place(folder: Path) -> None:
    """Fill a folder that holds a model in `base`."""
    rng = random.Random(0)

    def records(prefix: str, count: int) -> list[Record]:
        texts = [[" ".join(rng.choices(WORDS, k=rng.randint(2, 9))) for _ in "qa"] for _ in range(count)]
        return [Record(id=f"{prefix}:{i}", question=q, answer=f"{a} {i}") for i, (q, a) in enumerate(texts)]

    splits = {"gl": records("g", 400), "cl": records("c", 80), "eval": records("e", 8)}
    write_set(folder / "data", splits, Tokenization.load(str(folder / "base")), name="tiny")
    common = {
        "model": {"path": "base"},
        "data": {"sets": [{"path": "data"}], "bin_tokens": 160, "max_x_tokens": 60, "max_y_tokens": 90, "workers": 0},
        "bottleneck": {"tokens": 1},
        "optim": {"lr": 3e-3},
        "deepspeed": "cpu",
    }
    steps = {"duration": {"steps": STEPS}, "checkpoint": {"every_steps": 20}}
    one = {**common, **steps, "stage": "generative", "output": "runs/one", "batch": {"global_batch": 2}}
    two = {**common, "duration": {"steps": 3}, "stage": "contrastive", "output": "runs/two"}
    (folder / "one.yaml").write_text(yaml.safe_dump(one))
    (folder / "two.yaml").write_text(yaml.safe_dump({**two, "batch": {"global_batch": 8}}))
