"""What the model behind `lbr plan` says for 1.5B and 7B models up to 1,024 GPUs; needs no data and no GPU.

Weak scaling: every GPU has the same work, `MICROS` micro-batches of 16,384 tokens a step, so the global batch grows.
Nothing is measured here: docs/scaling.md has the assumptions, benchmarks/memory.py what was measured.

    python -m benchmarks.scaling
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import common
from lbr_dist.recipes import parse_recipe
from lbr_dist.training.cost.estimate import communication
from lbr_dist.training.cost.machines import MACHINES
from lbr_dist.training.cost.memory_model import GIB, Shape, memory

SHAPES = {
    "1.5B": Shape(layers=28, width=1536, query=1536, key=256, inner=8960, vocabulary=151936, tied=True),
    "7B": Shape(layers=28, width=3584, query=3584, key=512, inner=18944, vocabulary=152064, tied=False),
}
TOKENS = 16_384
MICROS = 4
FITS = 0.95  # of a GPU's memory, as in `lbr plan`
SAMPLE = 512  # tokens of a sample, half of them targets: sets the attention's and the head's share


def operations(shape: Shape) -> float:
    """Of one micro-batch, forward and backward, without recomputation."""
    cells = TOKENS / SAMPLE * (SAMPLE / 2) ** 2
    head = 6.0 * shape.table * TOKENS / 2
    return 6.0 * shape.layers * shape.per_layer * TOKENS + head + 12.0 * shape.layers * shape.query * cells


def rows(name: str, gpu: str) -> list[dict[str, Any]]:
    """One row per world size."""
    shape, machine = SHAPES[name], MACHINES[gpu]
    found = []
    for world in (1, 8, 64, 256, 1024):
        recipe = parse_recipe(
            {
                "stage": "generative",
                "output": "none",
                "model": {"path": "none", "dtype": "bfloat16", "activation_checkpointing": True},
                "data": {"sets": [{"path": "none"}], "bin_tokens": TOKENS},
                "batch": {"global_batch": world * MICROS},
                "duration": {"steps": 1},
            },
            "scaling",
        )
        zero = {"stage": 3}
        need = memory(shape, recipe, machine, world=world, zero=zero, micro=TOKENS).total / GIB
        sent = communication(shape, recipe, stage=3, world=world, micros=MICROS)
        link = machine.outside if world > machine.per_node else machine.inside
        compute = MICROS * operations(shape) * 4 / 3 / (machine.peak_flops * machine.share)
        step = max(compute, sent / link)
        row: dict[str, Any] = {"gpu": machine.name, "model": name, "gpus": world, "gib": f"{need:.0f}"}
        if need > FITS * machine.memory_gib:
            found.append({**row, "gib": f"{need:.0f}: does not fit"})
            continue
        row |= {"compute_s": f"{compute:.2f}", "network_s": f"{sent / link:.2f}", "step_s": f"{step:.2f}"}
        row["tokens"] = f"{world * MICROS * TOKENS / step / 1e6:.2f}M"
        row["mfu"] = f"{MICROS * operations(shape) / (step * machine.peak_flops):.0%}"
        found.append(row)
    return found


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    found = [row for gpu in ("h100", "a100") for name in SHAPES for row in rows(name, gpu)]
    about = common.head("python -m benchmarks.scaling")
    columns = {
        **{"gpu": "GPU", "model": "model", "gpus": "GPUs", "gib": "GiB per GPU", "compute_s": "compute s"},
        **{"network_s": "network s", "step_s": "step s", "tokens": "tokens/s", "mfu": "MFU"},
    }
    lines = [*common.title("ZeRO-3 to 1,024 GPUs: the model's figures, not measurements", about)]
    common.save(options.out, "scaling", about, found, [*lines, *common.table(columns, found)])


if __name__ == "__main__":
    main()
