"""Reading weights out of checkpoints: any slice of any parameter, without a process group or the model.

Everything here holds one tensor at a time, so a checkpoint of any size can be exported on a small machine.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from lbr_dist.disk import new_folder
from lbr_dist.errors import UserError
from lbr_dist.training.checkpoint.chosen import with_checkpoint
from lbr_dist.training.checkpoint.files import replace_bytes, write_bytes
from lbr_dist.training.checkpoint.format import Kind, Manifest, Parameter, gone, read_manifest
from lbr_dist.training.checkpoint.listing import resolve
from lbr_dist.training.checkpoint.tensor_file import DTYPES, NAMES, TensorFileReader, TensorSpec, write_tensors

OPEN_FILES = 128


def tensor_name(kind: Kind, key: str, parameter: str) -> str:
    """Name of a slice in its safetensors file."""
    return f"{key}:{parameter}" if kind == "optimizer" else parameter


class SliceReader:
    """Random access to the slices of one checkpoint; opens files as it needs them."""

    def __init__(self, checkpoint: Path, manifest: Manifest):
        self.checkpoint, self.manifest = checkpoint, manifest
        self.parameters = {parameter.name: parameter for parameter in manifest.parameters}
        self._runs: dict[tuple[Kind, str], list[tuple[int, int, str]]] = {}
        for name, entry in manifest.files.items():
            for index, start, end in entry.slices:
                key = (entry.kind, manifest.parameters[index].name)
                self._runs.setdefault(key, []).append((start, end, name))
        self._open: OrderedDict[str, TensorFileReader] = OrderedDict()

    def read_into(self, out: torch.Tensor, kind: Kind, key: str, parameter: str, start: int) -> None:
        """Fill `out` (1-D) with the parameter's flat elements from `start` on.

        Raises:
            UserError: a file is missing or cannot be read.
        """
        end, filled = start + out.numel(), 0
        for run_start, run_end, file in self._runs.get((kind, parameter), ()):
            low, high = max(start, run_start), min(end, run_end)
            if low < high:
                self._read(file, out[low - start : high - start], tensor_name(kind, key, parameter), low - run_start)
                filled += high - low
        if filled != out.numel():
            raise UserError(f"{self.checkpoint}: {kind} of {parameter}: {out.numel() - filled} elements are missing")

    def weight(self, parameter: Parameter) -> torch.Tensor:
        """A whole parameter, in the dtype it is stored in."""
        flat = torch.empty(parameter.numel, dtype=DTYPES[parameter.dtype])
        self.read_into(flat, "weights" if parameter.trained else "frozen", "weight", parameter.name, 0)
        return flat.view(parameter.shape)

    def _read(self, file: str, out: torch.Tensor, tensor: str, start: int) -> None:
        path = self.checkpoint / file
        try:
            if file not in self._open:
                while len(self._open) >= OPEN_FILES:
                    self._open.popitem(last=False)[1].close()
                self._open[file] = TensorFileReader(path)
            self._open.move_to_end(file)
            self._open[file].read_into(out, tensor, start)
        except (OSError, ValueError, KeyError) as error:
            if not self.checkpoint.is_dir():
                raise UserError(gone(self.checkpoint)) from None
            raise UserError(f"{path}: cannot be read ({error}); `lbr checkpoint verify` tells more") from None


def read_rank_state(path: Path) -> dict[str, Any]:
    """What `pack_rank_state` was given, from the file it was written to."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        state = json.loads(file.metadata()["json"])
        state.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
    return state


def pack_rank_state(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Split a rank's state into tensors (top-level values) and JSON for the file's header; tuples become lists."""
    tensors = {name: value.detach().cpu() for name, value in state.items() if torch.is_tensor(value)}
    rest = {name: value for name, value in state.items() if name not in tensors}
    return tensors, {"json": json.dumps(rest)}


def iterate_weights(path_or_run: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights of a checkpoint, or of a run's newest verified one, one tensor at a time.

    Yields:
        (name in the model, float32 tensor in its shape): the master weights of trained parameters, and the frozen
        ones as they are. Tied parameters come once, under their first name; the manifest's `tied` has the others.

    Raises:
        UserError: nothing to read there, or it is damaged.
    """
    checkpoint = resolve(path_or_run)
    manifest = read_manifest(checkpoint)
    reader = SliceReader(checkpoint, manifest)
    for parameter in manifest.parameters:
        yield parameter.name, reader.weight(parameter).float()


def consolidate(
    path_or_run: str | Path,
    out: str | Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_shard_gib: float = 4,
) -> list[Path]:
    """Write a checkpoint's weights as plain safetensors shards with an index, holding one tensor at a time.

    Tied weights are stored once, under their first name, as transformers does. The checkpoint's other files (recipe,
    model configuration, tokenizer) are copied beside them.

    Returns:
        The shards.

    Raises:
        UserError: `out` exists and is not empty, or cannot be made, or the checkpoint cannot be read. A folder that
            exists is complete.
    """
    if not 0 < max_shard_gib < math.inf:
        raise UserError(f"--max-shard-gib {max_shard_gib}: expected a finite number above 0")
    out = Path(out)
    with new_folder(out, f"consolidate to {out}") as folder:
        limit = int(max_shard_gib * 2**30)
        names = with_checkpoint(path_or_run, lambda checkpoint: _consolidate(checkpoint, folder, dtype, limit))
    return [out / name for name in names]


def _consolidate(checkpoint: Path, out: Path, dtype: Literal["float32", "bfloat16"], limit: int) -> list[str]:
    for left in out.iterdir():  # by a try before this one
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    manifest = read_manifest(checkpoint)
    reader, target = SliceReader(checkpoint, manifest), getattr(torch, dtype)
    shards = _plan_shards(manifest.parameters, NAMES[target], limit)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = (reader.weight(reader.parameters[spec.name]).to(target) for spec in shard)
        write_tensors(out / name, shard, tensors, {"format": "pt"})
        weight_map.update({spec.name: name for spec in shard})
    for name in manifest.of_kind("extra"):
        write_bytes(out / name, (checkpoint / name).read_bytes())
    index = {"metadata": {"total_size": sum(s.bytes for shard in shards for s in shard)}, "weight_map": weight_map}
    replace_bytes(out / "model.safetensors.index.json", json.dumps(index, indent=1).encode())
    return sorted(set(weight_map.values()))


def _plan_shards(parameters: list[Parameter], dtype: str, limit: int) -> list[list[TensorSpec]]:
    """Parameters in order, cut so that no shard exceeds `limit` bytes unless a single tensor does."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for parameter in parameters:
        spec = TensorSpec(parameter.name, dtype, parameter.shape)
        if shards[-1] and size + spec.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.bytes
    return shards
