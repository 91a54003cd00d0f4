"""The memory that `lbr plan --gpu cpu` foretells against the peak that a run's rank 0 had, on CPU ranks.

Every row trains a random model for two steps with a checkpoint after each, in processes of its own, and reads the peak
resident memory from the run's metrics. Nothing is timed, so a busy machine does no harm. Goal: within 15%.

    python -m benchmarks.memory
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common

SHAPES: dict[str, dict[str, int]] = {
    "28M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 16_384},
    "60M": {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 7, "vocab_size": 16_384},
}
RUNS: list[dict[str, Any]] = [
    {"model": "28M", "deepspeed": "zero0", "ranks": 1, "bin": 1024},
    {"model": "28M", "deepspeed": "zero1", "ranks": 1, "bin": 1024},
    {"model": "28M", "deepspeed": "cpu", "ranks": 1, "bin": 1024},
    {"model": "28M", "deepspeed": "cpu", "ranks": 2, "bin": 1024},
    {"model": "28M", "deepspeed": "zero2", "ranks": 2, "bin": 1024},
    {"model": "28M", "deepspeed": "cpu", "ranks": 4, "bin": 512},
    {"model": "28M", "deepspeed": "zero0", "ranks": 1, "bin": 2048},
    {"model": "28M", "deepspeed": "zero0", "ranks": 1, "bin": 4096},
    {"model": "28M", "deepspeed": "zero0", "ranks": 1, "bin": 4096, "extra": "recomputation"},
    {"model": "28M", "deepspeed": "zero0", "ranks": 1, "bin": 1024, "extra": "LoRA"},
    {"model": "28M", "deepspeed": "zero0", "ranks": 1, "bin": 2048, "extra": "LoRA"},
    {"model": "28M", "deepspeed": "zero0", "ranks": 1, "bin": 4096, "extra": "LoRA"},
    {"model": "28M", "deepspeed": "zero0", "ranks": 1, "bin": 2048, "extra": "LoRA, recomputation"},
    {"model": "60M", "deepspeed": "zero0", "ranks": 1, "bin": 2048, "extra": "LoRA"},
    {"model": "28M", "deepspeed": "zero1", "ranks": 1, "bin": 1024, "extra": "bfloat16"},
    {"model": "28M", "deepspeed": "zero0", "ranks": 1, "bin": 1024, "extra": "stage 2"},
    {"model": "28M", "deepspeed": "zero0", "ranks": 1, "bin": 2048, "extra": "stage 2"},
    {"model": "28M", "deepspeed": "zero0", "ranks": 1, "bin": 4096, "extra": "stage 2"},
    {"model": "60M", "deepspeed": "zero0", "ranks": 1, "bin": 512},
    {"model": "60M", "deepspeed": "cpu", "ranks": 2, "bin": 512},
]
EXTRAS: dict[str, dict[str, Any]] = {
    "recomputation": {"activation_checkpointing": True},
    "LoRA": {"lora": {"r": 16}},
    "LoRA, recomputation": {"lora": {"r": 16}, "activation_checkpointing": True},
    "bfloat16": {"dtype": "bfloat16"},
}
WORDS = ["aspirin", "fever", "heart", "blood", "vessel", "rash", "water", "salicylate", "unknown", "relieves"]


def make_inputs(folder: Path) -> None:
    """The models, and a set of which every step has enough."""
    import torch
    from conftest import make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    from lbr_dist.data.record import Record
    from lbr_dist.data.shard_writer import write_set
    from lbr_dist.model.tokenizer import Tokenization

    for name, sizes in SHAPES.items():
        torch.manual_seed(0)
        heads = sizes["hidden_size"] // 64
        shape: dict[str, Any] = {**sizes, "num_attention_heads": heads, "num_key_value_heads": heads // 2}
        LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).save_pretrained(folder / name)
        make_tokenizer(folder / name)
    rng = random.Random(0)
    records = [
        Record(id=str(i), question=" ".join(rng.choices(WORDS, k=30)), answer=" ".join(rng.choices(WORDS, k=40)))
        for i in range(600)
    ]
    (folder / "data").mkdir()
    splits = {"gl": records[:300], "cl": records[300:]}
    write_set(folder / "data", splits, Tokenization.load(str(folder / "28M")), name="memory")


def recipe_of(folder: Path, run: dict[str, Any], output: Path) -> dict[str, Any]:
    """Two steps of one bin a rank (stage 2: 32 pairs)."""
    stage2 = run.get("extra") == "stage 2"
    return {
        "stage": "contrastive" if stage2 else "generative",
        "output": str(output),
        "model": {"path": str(folder / run["model"]), **EXTRAS.get(run.get("extra", ""), {})},
        "data": {
            "sets": [{"path": str(folder / "data")}],
            "bin_tokens": run["bin"],
            "max_x_tokens": 250,
            "max_y_tokens": 250,
            "workers": 0,
        },
        "bottleneck": {"tokens": 2},
        "batch": {"global_batch": 32 if stage2 else run["ranks"]},
        "duration": {"steps": 2},
        "checkpoint": {"every_steps": 1},
        "deepspeed": run["deepspeed"],
    }


def measure(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Train in fresh processes; the peak that rank 0 logged, beside the estimate."""
    import yaml

    from lbr_dist.recipes import parse_recipe
    from lbr_dist.training.cost.estimate import estimate
    from lbr_dist.training.cost.memory_model import GIB

    with tempfile.TemporaryDirectory(dir=folder) as place:
        raw = recipe_of(folder, run, Path(place) / "run")
        foretold = estimate(parse_recipe(raw, "memory"), world=run["ranks"], gpu="cpu").memory.total / GIB
        file = Path(place) / "recipe.yaml"
        file.write_text(yaml.safe_dump(raw))
        command = [sys.executable, "-m", "lbr_dist", "train", str(file), "--nproc", str(run["ranks"])]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        rows = [json.loads(line) for line in (Path(place) / "run" / "metrics.jsonl").read_text().splitlines()]
    found = rows[-1]["memory_gib"]
    figures = {"measured_gib": round(found, 2), "plan_gib": round(foretold, 2), "off": f"{foretold / found - 1:+.0%}"}
    return {**run, **figures}


def main() -> None:
    """Measure all runs and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_options(parser)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        rows = []
        for run in RUNS[:1] if options.toy else RUNS:
            rows.append(measure(Path(folder), run))
            print(rows[-1], flush=True)
    about = common.head("python -m benchmarks.memory", toy=options.toy)
    columns = {
        **{
            "model": "parameters",
            "extra": "with",
            "deepspeed": "DeepSpeed file",
            "ranks": "ranks",
            "bin": "tokens a bin",
        },
        **{"measured_gib": "measured GiB", "plan_gib": "`lbr plan` GiB", "off": ""},
    }
    lines = [*common.title("Peak memory of rank 0, measured and foretold", about), *common.table(columns, rows)]
    common.save(options.out, "memory", about, rows, lines)


if __name__ == "__main__":
    main()
