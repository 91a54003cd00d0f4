"""Streamed safetensors with checksums.

The safetensors layout (8 bytes of header length, a JSON header, the raw tensors) is written here by hand, because the
library's own writer takes all tensors at once and copies each: streaming needs one chunk of memory, checksums the bytes
on their way out, and turns a full disk into an ordinary `OSError`. Large files are read by hand too: the library maps
them into memory, and every page that was read then counts as this process's until the file is closed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lbr_dist.training.checkpoint.files import CHUNK_BYTES, Sink, Written, flush

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The safetensors names of the dtypes that a checkpoint may hold."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, safetensors dtype and shape of one tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_tensors(
    path: Path, specs: Sequence[TensorSpec], tensors: Iterable[torch.Tensor], metadata: dict[str, str] | None = None
) -> Written:
    """Write a safetensors file and force it to disk.

    Args:
        path: the new file.
        specs: what the header says; one per tensor, in order.
        tensors: the data; taken one at a time, so a generator bounds the memory. Must match `specs`.
        metadata: strings for the header.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.bytes],
        }
        offset += spec.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        sink = Sink(file)
        sink.write(len(text).to_bytes(8, "little") + text)
        for spec, tensor in zip(specs, tensors, strict=True):
            if NAMES[tensor.dtype] != spec.dtype or tensor.numel() != math.prod(spec.shape):
                raise ValueError(
                    f"{path.name}: {spec.name} is {tensor.dtype} {tuple(tensor.shape)}, announced as {spec}"
                )
            sink.write(tensor_bytes(tensor))
        flush(file)
    return Written(sink.bytes, sink.hash.hexdigest())


class TensorFileReader:
    """Random access to a safetensors file by plain reads.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a safetensors file.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("rb", buffering=0)
        length = int.from_bytes(self._file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is longer than the file")
        self._data = 8 + length
        self._entries: dict[str, Any] = json.loads(self._file.read(length))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read_into(self, out: torch.Tensor, name: str, start: int) -> None:
        """Fill `out` (1-D, any device and dtype) with a tensor's flat elements from `start` on.

        Raises:
            ValueError: no such tensor, or the file ends before it.
        """
        if name not in self._entries:
            raise ValueError(f"it has no tensor {name}")
        entry = self._entries[name]
        dtype = DTYPES[entry["dtype"]]
        first, last = entry["data_offsets"]
        if (start + out.numel()) * dtype.itemsize > last - first:
            raise ValueError(f"{name} has {(last - first) // dtype.itemsize} elements")
        as_is = out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous()
        target = out if as_is else torch.empty(out.numel(), dtype=dtype)
        rest = tensor_bytes(target)
        self._file.seek(self._data + first + start * dtype.itemsize)
        while len(rest):
            count = self._file.readinto(rest[:CHUNK_BYTES])
            if not count:
                raise ValueError("it is truncated")
            rest = rest[count:]
        if not as_is:
            out.copy_(target)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a CPU tensor, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
