"""What a checkpoint is on disk, and how to tell a good one from a bad one. Needs no process group and no model.

    checkpoints/
      latest                          name of the checkpoint committed last
      step-000500/
        manifest.json                 written last; names every other file with its size and checksum
        weights-00000-of-00004.safetensors      float32 master weights: this rank's slices
        optimizer-00000-of-00004.safetensors    optimizer moments of the same slices
        frozen-00000-of-00004.safetensors       weights that are not trained, if any; hard links after two saves
        rank-00000-of-00004.safetensors         this rank's random state
        recipe.yaml, model/...                  what else a reader needs

A slice is a run [start, end) of one parameter's flat elements. Every ZeRO stage partitions flat, so every stage's
share of a parameter is a slice, and loading at another stage or world size is reading other slices of the same
parameters. The alternative, torch's distributed checkpoint, gives the same but needs a planner, a pickled metadata file
and a tensor subclass to say what three integers say here, has no checksums, and is not safetensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from lbr_dist.disk import file_xxh128, mark
from lbr_dist.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
REPLACED = ".replaced-"
DISCARDED = ".discarded-"
STEP_NAME = re.compile(r"step-(\d{6,})")

Kind = Literal["weights", "optimizer", "frozen", "rank", "extra"]

_sound: dict[Path, tuple[str, tuple[int, int] | None]] = {}
"""Files that this process has read and found to be as they were written: checksum, and `mark` then."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Parameter(_Frozen):
    """One parameter of the model, as the whole run sees it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """safetensors dtype on disk: F32 for trained ones (the master weights), the model's own for frozen ones."""
    trained: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class FileEntry(_Frozen):
    """One file: what it must look like, and which slices it holds."""

    kind: Kind
    bytes: int
    xxh128: str
    slices: list[tuple[int, int, int]] = []
    """(index into `parameters`, start, end) in flat elements."""


class OptimizerEntry(_Frozen):
    """The optimizer's family, the moments it keeps per element, and how many steps it has made."""

    family: Literal["adam", "sgd"]
    keys: list[str]
    step: float | None
    """None where the optimizer keeps no count, or has not stepped yet."""


class Manifest(_Frozen):
    """The whole checkpoint in one JSON file."""

    format: int
    step: int
    sequence: int
    """Counts commits in this run folder: a run that went back to step 300 and on to 350 prefers 350 to an older 500."""
    attempt: str
    created: str
    world_size: int
    zero_stage: int
    versions: dict[str, str]
    parameters: list[Parameter]
    tied: dict[str, str]
    """Other names of a parameter, to its name in `parameters`; its data is stored once."""
    optimizer: OptimizerEntry
    engine: dict[str, int]
    """DeepSpeed's own counters."""
    state: dict[str, Any]
    """The training loop's state, the same on every rank."""
    files: dict[str, FileEntry]

    def of_kind(self, kind: Kind) -> dict[str, FileEntry]:
        """The files of one kind, by name."""
        return {name: entry for name, entry in self.files.items() if entry.kind == kind}


def rank_file(kind: Kind, rank: int, world: int) -> str:
    """Name of a rank's file."""
    return f"{kind}-{rank:05d}-of-{world:05d}.safetensors"


def step_name(step: int) -> str:
    """Folder name of a committed checkpoint."""
    return f"step-{step:06d}"


def misnamed(checkpoint: Path, manifest: Manifest) -> str:
    """In words, that a checkpoint is in the folder of another step, as after a rename; "" where it is not.

    It is resumed from all the same: the manifest says what it is.
    """
    name = step_name(manifest.step)
    return "" if checkpoint.name == name or not STEP_NAME.fullmatch(checkpoint.name) else f"its own name is {name}"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is meant as one checkpoint, whole or not."""
    return (folder / MANIFEST).is_file() or bool(STEP_NAME.fullmatch(folder.name))


def checkpoints_folder(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def encode_manifest(manifest: Manifest) -> bytes:
    """JSON with a checksum over itself, so that a flipped bit in the manifest is found too."""
    body = manifest.model_dump(mode="json")
    return json.dumps({**body, "checksum": _digest(body)}, separators=(",", ":")).encode()


def read_manifest(checkpoint: Path) -> Manifest:
    """Parse and check a checkpoint's manifest.

    Raises:
        UserError: there is none, it is damaged, or it is of another format.
    """
    file = checkpoint / MANIFEST
    try:
        body = json.loads(file.read_bytes())
        found = body.pop("checksum")
        if found != _digest(body):
            raise UserError(f"{file}: damaged (its checksum does not match)")
        if body.get("format") != FORMAT:
            raise UserError(f"{file}: checkpoint format {body.get('format')}; this version of lbr reads {FORMAT}")
        return Manifest.model_validate(body)
    except FileNotFoundError:
        incomplete = f"{file}: missing, so this is not a complete checkpoint"
        raise UserError(incomplete if checkpoint.is_dir() else gone(checkpoint)) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise UserError(f"{file}: damaged ({type(error).__name__})") from None


def gone(checkpoint: Path) -> str:
    """In words, that a checkpoint which was there is not any more."""
    return (
        f"{checkpoint}: was removed meanwhile, as a run at work does with older checkpoints: run again, or name one "
        "that is kept (checkpoint.keep_every)"
    )


def _digest(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, separators=(",", ":"), sort_keys=True).encode())


def verify(
    checkpoint: str | Path, deep: bool = True, *, kinds: Container[Kind] | None = None, again: bool = True
) -> list[str]:
    """Everything wrong with a checkpoint, each problem named by its file; an empty list means it is good.

    Args:
        checkpoint: a `step-*` folder.
        deep: read every byte and compare checksums; False compares existence and sizes only.
        kinds: files that are read; None: all. Of the others existence and sizes are compared.
        again: read also what this process has read and found sound, and whose size and time are still the same.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return [f"{folder}: no such folder"]
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return [str(error)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        checks = pool.map(
            lambda item: _file_problem(
                folder / item[0], item[1], deep and (kinds is None or item[1].kind in kinds), again
            ),
            manifest.files.items(),
        )
        problems = [problem for problem in checks if problem]
    return problems + [f"{folder / MANIFEST}: {gap}" for gap in gaps(manifest)]


def is_sound(checkpoint: Path, folder: str) -> bool:
    """Whether a checkpoint has files in this folder, all as they were written; the others are not looked at."""
    try:
        files = read_manifest(checkpoint).files
    except UserError:
        return False
    inside = [name for name in files if name.startswith(f"{folder}/")]
    problems = (_file_problem(checkpoint / name, files[name], deep=True, again=False) for name in inside)
    return bool(inside) and not any(problems)


def _file_problem(file: Path, entry: FileEntry, deep: bool, again: bool) -> str | None:
    try:
        size = file.stat().st_size
        if size != entry.bytes:
            return f"{file}: {size} bytes, expected {entry.bytes} ({'truncated' if size < entry.bytes else 'too long'})"
        known = (entry.xxh128, mark(file))
        if deep and (again or _sound.get(file.absolute()) != known):
            if file_xxh128(file) != entry.xxh128:
                return f"{file}: damaged (its checksum does not match)"
            _sound[file.absolute()] = known
    except FileNotFoundError:
        return f"{file}: missing"
    except OSError as error:
        return f"{file}: cannot be read ({error.strerror})"
    return None


def gaps(manifest: Manifest) -> list[str]:
    """Elements of parameters that no file holds, or that two files hold: none in a good checkpoint."""
    found = []
    for kind, trained in (("weights", True), ("optimizer", True), ("frozen", False)):
        if kind == "optimizer" and not manifest.optimizer.keys:
            continue
        slices: dict[int, list[tuple[int, int]]] = {
            index: [] for index, parameter in enumerate(manifest.parameters) if parameter.trained is trained
        }
        for entry in manifest.of_kind(kind).values():  # type: ignore[arg-type]
            for index, start, end in entry.slices:
                slices[index].append((start, end))
        for index, runs in slices.items():
            parameter, position, tiled = manifest.parameters[index], 0, True
            for start, end in sorted(runs):
                tiled &= start == position
                position = end
            if not tiled or position != parameter.numel:
                found.append(
                    f"{kind} of {parameter.name}: elements are missing or stored twice (slices {sorted(runs)})"
                )
    return found
