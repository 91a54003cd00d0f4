"""Run folders without training: a checkpoint in the real format, of a tiny random model with random adapters and Z."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from lbr_dist.config import Recipe
from lbr_dist.disk import file_xxh128
from lbr_dist.model.bottleneck import LbrModel
from lbr_dist.recipes import parse_recipe, save_recipe
from lbr_dist.training.checkpoint.format import (
    FORMAT,
    FileEntry,
    Manifest,
    OptimizerEntry,
    Parameter,
    encode_manifest,
    step_name,
)
from lbr_dist.training.checkpoint.tensor_file import NAMES, TensorSpec, write_tensors


def make_run(folder: Path, model_dir: Path, *, step: int = 10, seed: int = 0, **settings: Any) -> Path:
    """A run folder with one checkpoint; `settings` are recipe sections."""
    recipe = parse_recipe(
        {
            "stage": "contrastive",
            "output": str(folder),
            "model": {"path": str(model_dir), **settings.pop("model", {})},
            "data": {"sets": [{"path": "data/domain"}], "max_x_tokens": 48, **settings.pop("data", {})},
            "batch": {"global_batch": 4},
            "duration": {"steps": step},
            "bottleneck": {"tokens": 2},
            **settings,
        },
        "test",
    )
    model = LbrModel.build(recipe)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "z" or "lora_" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    write_checkpoint(folder / "checkpoints" / step_name(step), recipe, model, step)
    save_recipe(recipe, folder / "recipe.yaml")
    (folder / "checkpoints" / "latest").write_text(step_name(step))
    return folder


def write_checkpoint(checkpoint: Path, recipe: Recipe, model: LbrModel, step: int) -> None:
    checkpoint.mkdir(parents=True)
    save_recipe(recipe, checkpoint / "recipe.yaml")
    (checkpoint / "model").mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(recipe.model.path) / name, checkpoint / "model" / name)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    parameters = [
        Parameter(name=name, shape=tuple(t.shape), dtype=NAMES[t.dtype], trained=True) for name, t in tensors.items()
    ]
    file = checkpoint / "weights-00000-of-00001.safetensors"
    specs = [TensorSpec(p.name, p.dtype, (p.numel,)) for p in parameters]
    written = write_tensors(file, specs, [t.reshape(-1) for t in tensors.values()])
    slices = [(i, 0, p.numel) for i, p in enumerate(parameters)]
    files = {file.name: FileEntry(kind="weights", bytes=written.bytes, xxh128=written.xxh128, slices=slices)}
    for extra in sorted(p for p in checkpoint.rglob("*") if p.is_file() and p != file):
        files[str(extra.relative_to(checkpoint))] = FileEntry(
            kind="extra", bytes=extra.stat().st_size, xxh128=file_xxh128(extra)
        )
    write_manifest(checkpoint, parameters, files, step=step)


def write_manifest(
    checkpoint: Path,
    parameters: list[Parameter],
    files: dict[str, FileEntry],
    *,
    step: int = 1,
    sequence: int | None = None,
    world: int = 1,
    tied: dict[str, str] | None = None,
) -> None:
    manifest = Manifest(
        format=FORMAT,
        step=step,
        sequence=step if sequence is None else sequence,
        attempt="test",
        created="2026-01-01T00:00:00Z",
        world_size=world,
        zero_stage=3,
        versions={},
        parameters=parameters,
        tied=tied or {},
        optimizer=OptimizerEntry(family="adam", keys=[], step=step),
        engine={},
        state={},
        files=files,
    )
    (checkpoint / "manifest.json").write_bytes(encode_manifest(manifest))


class Alone:
    """A `collective.Team` of one."""

    rank, world = 0, 1

    def __init__(self, *_: Any) -> None: ...

    def gather(self, value: Any) -> list[Any]:
        """The value."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """The value."""
        return value
