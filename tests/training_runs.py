"""Tiny prepared sets, recipes for them, and a worker that trains many recipes in one start of the ranks."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

from lbr_dist.data.record import Record
from lbr_dist.data.shard_writer import write_set
from lbr_dist.environment import Environment
from lbr_dist.errors import UserError
from lbr_dist.logs import read_rows
from lbr_dist.model.tokenizer import Tokenization
from lbr_dist.recipes import parse_recipe

CUT = 4  # the step after which a run is cut off and goes on elsewhere
WORDS = ["aspirin", "salicylate", "drug", "fever", "heart", "blood", "vessel", "rash", "measles", "water", "unknown"]


def make_set(folder: Path, model_dir: Path, gl: int = 90, cl: int = 40) -> Path:
    """A prepared set whose questions and answers differ much in length."""
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    def records(prefix: str, count: int) -> list[Record]:
        return [Record(id=f"{prefix}:{i}", question=text(2, 9), answer=f"{text(1, 16)} {i}") for i in range(count)]

    folder.mkdir(parents=True)
    splits = {"gl": records("g", gl), "cl": records("c", cl), "eval": records("e", 8)}
    write_set(folder, splits, Tokenization.load(str(model_dir)), name="tiny", shard_records=32)
    return folder


def recipe(output: Path, model_dir: Path, data_dir: Path, stage: str = "generative", **sections: Any) -> dict[str, Any]:
    """A recipe as a mapping; sections given are merged into the defaults."""
    generative = stage == "generative"
    raw: dict[str, Any] = {
        "stage": stage,
        "output": str(output),
        "model": {"path": str(model_dir)},
        "data": {"sets": [{"path": str(data_dir)}], "max_x_tokens": 60, "max_y_tokens": 90, "workers": 0},
        "bottleneck": {"tokens": 2},
        "batch": {"global_batch": 5} if generative else {"global_batch": 11, "micro_tokens": 160},
        "optim": {"lr": 3e-3, "z_lr": 1e-2},
        "duration": {"epochs": 2},
        "checkpoint": {"every_steps": 100},
    }
    raw["data"]["bin_tokens"] = 160
    for name, value in sections.items():
        raw[name] = {**raw[name], **value} if isinstance(raw.get(name), dict) else value
    return raw


def train_all(rank: int, world: int, recipes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train each recipe in turn on this rank; what each ended with."""
    from lbr_dist.training.run import train

    results: list[dict[str, Any]] = []
    for raw in recipes:
        settings = {key: value for key, value in raw.items() if not key.startswith("train.")}
        options = {key.removeprefix("train."): value for key, value in raw.items() if key.startswith("train.")}
        try:
            outcome = train(
                parse_recipe(settings, "test"),
                environment=Environment(rank, world, rank, world, None, "test"),
                **options,
            )
            results.append({"step": outcome.step, "code": outcome.exit_code})
        except UserError as error:
            results.append({"error": str(error)})
    return results


def losses(output: str) -> list[float]:
    return [row["loss"] for row in read_rows(Path(output) / "metrics.jsonl")]


def cut_off(finished: str, output: Path, step: int = CUT) -> str:
    """What a run that was killed after its checkpoint at `step` leaves behind (it had gone on for a while)."""
    copied(finished, output)
    for checkpoint in (output / "checkpoints").glob("step-*"):
        if checkpoint.name != f"step-{step:06d}":
            shutil.rmtree(checkpoint)
    (output / "checkpoints" / "latest").write_text(f"step-{step:06d}")
    return str(output)


def copied(finished: str, output: Path) -> str:
    """A copy of a run in another folder."""
    shutil.copytree(finished, output)
    (output / "recipe.yaml").write_text(
        (output / "recipe.yaml").read_text().replace(f"output: {finished}", f"output: {output}")
    )
    return str(output)
