"""`lbr checkpoint list`, `verify` and `consolidate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lbr_dist.cli.options import dtype_option, place, positive
from lbr_dist.errors import UserError

app = typer.Typer(help="List, verify and consolidate checkpoints.", no_args_is_help=True)


@app.command("list")
def list_checkpoints(run: Annotated[Path, typer.Argument(callback=place, help="Run folder.")]) -> None:
    """The checkpoints of a run, newest first."""
    from lbr_dist.training.checkpoint.format import checkpoints_folder
    from lbr_dist.training.checkpoint.listing import list_checkpoints as found

    if not checkpoints_folder(run).is_dir():
        raise UserError(f"{run}: no run folder (it has no checkpoints/)")
    for path, manifest in found(run):
        print(f"{path.name}  {_describe(path, manifest)}")


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(callback=place, help="Checkpoint, or run folder: all of its checkpoints.")],
) -> None:
    """Read every byte and compare it with the checksums; exit code 1 if anything is wrong."""
    from lbr_dist.training.checkpoint.format import MANIFEST, checkpoints_folder, is_checkpoint, misnamed, read_manifest
    from lbr_dist.training.checkpoint.format import verify as problems_of
    from lbr_dist.training.checkpoint.listing import list_checkpoints as found

    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run or one of its checkpoints")
    is_run = checkpoints_folder(path).is_dir()
    if not is_run and not is_checkpoint(path):
        raise UserError(f"{path}: no run folder (it has no checkpoints/), and no checkpoint (it has no {MANIFEST})")
    folders = [folder for folder, _ in found(path)] if is_run else [path]
    if not folders:
        raise UserError(f"{path}: has no checkpoint")
    bad = False
    for folder in folders:
        problems = problems_of(folder)
        bad = bad or bool(problems)
        note = "" if problems else misnamed(folder.absolute(), read_manifest(folder))
        print(f"{folder}: {'; '.join(problems) or 'verified'}{f', but {note}' * bool(note)}")
    if bad:
        raise typer.Exit(1)


@app.command()
def consolidate(
    path: Annotated[Path, typer.Argument(callback=place, help="Run (its newest verified checkpoint) or checkpoint.")],
    out: Annotated[Path, typer.Argument(callback=place, help="Folder to make.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    max_shard_gib: Annotated[float, typer.Option(callback=positive, help="Largest file, in GiB.")] = 4,
) -> None:
    """Write the weights as plain safetensors shards."""
    from lbr_dist.training.checkpoint.weights import consolidate as write

    for shard in write(path, out, dtype_option(dtype), max_shard_gib):
        print(f"written: {shard}")


def _describe(path: Path, manifest: Any) -> str:
    from lbr_dist.training.checkpoint.format import misnamed

    if manifest is None:
        return "incomplete: cannot be resumed from"
    note = misnamed(path, manifest)
    return f"step {manifest.step}, {manifest.world_size} ranks, {len(manifest.files)} files{f'; {note}' * bool(note)}"
