"""A checkpoint folder of safetensors shards: its headers, its tensors by row block, and a writer that streams.

A safetensors file is 8 bytes of header length (little endian), the header, JSON {name: {dtype, shape, data_offsets}},
then the payload. Names, shapes, dtypes and lengths are all checked from the headers, before any payload is read.
"""

from __future__ import annotations

import json
import mmap
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
# Elements read at once: small beside any model, so that a block on its way (stored, dequantised) hardly counts.
BLOCK_ELEMENTS = 1 << 20
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


class WeightError(ValueError):
    """A checkpoint that cannot be loaded; the message names the tensor, the file and the fix."""


@dataclass(frozen=True)
class TensorSpec:
    """What a safetensors header says of a tensor, besides its place. `dtype` is the header's word: F32, BF16, ..."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    path: Path
    offset: int  # bytes from the start of the file

    @property
    def row_elements(self) -> int:
        return prod(self.shape[1:])

    def row_blocks(self, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """(first, last) of blocks of about BLOCK_ELEMENTS; all but the final one are a multiple of `multiple` rows."""
        step = max(1, BLOCK_ELEMENTS // max(1, self.row_elements) // multiple) * multiple
        for first in range(0, self.shape[0], step):
            yield first, min(first + step, self.shape[0])

    def __str__(self) -> str:
        return f"{self.name} ({self.dtype} {list(self.shape)}, in {self.path.name})"


# Reading


def open_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder by name, from the headers of its shards.

    Raises: WeightError for no checkpoint, a missing shard, a truncated file, an index that disagrees with the shards.
    """
    index_path = folder / INDEX_NAME
    if not index_path.is_file():
        single = folder / SINGLE_NAME
        if not single.is_file():
            raise WeightError(
                f"{folder} holds neither {INDEX_NAME} nor {SINGLE_NAME}: point to a safetensors checkpoint folder"
            )
        return {tensor.name: tensor for tensor in read_header(single)}
    weight_map = _read_weight_map(index_path)
    for name, file in weight_map.items():
        if not (folder / file).is_file():
            raise WeightError(
                f"{folder / file}, which {INDEX_NAME} names for {name}, does not exist: download the shard again"
            )
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        for tensor in read_header(folder / file):
            if weight_map.get(tensor.name) != file:
                listed = weight_map.get(tensor.name)
                says = f"places it in {listed}" if listed else "does not list it"
                raise WeightError(
                    f"{tensor.name} is in {file}, but {INDEX_NAME} {says}: shards and index are of different saves"
                )
            found[tensor.name] = tensor
    for name, file in weight_map.items():
        if name not in found:
            raise WeightError(
                f"{name} is not in {file}, where {INDEX_NAME} places it: shards and index are of different saves"
            )
    return found


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        files = set(weight_map.values())
        plain_names = all(isinstance(file, str) and Path(file).name == file for file in files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightError(f"{path} is not a safetensors index ({error!r}): download it again") from error
    if not plain_names:
        raise WeightError(f"{path}: weight_map must name files of its own folder")
    return weight_map


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file. Raises WeightError when it is not one or is shorter than its header says."""
    file_bytes = path.stat().st_size
    tensors: list[StoredTensor] = []
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
            raise WeightError(f"{path}: the safetensors header is truncated or damaged: download the file again")
        raw = file.read(header_bytes)
    data_start = 8 + header_bytes
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(int(size) for size in entry["shape"])
            stored = StoredTensor(name, str(entry["dtype"]), shape, path, data_start + begin)
            tensors.append(_checked(stored, begin, end, file_bytes - data_start))
    except WeightError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightError(f"{path}: the safetensors header is damaged ({error!r}): download the file again") from error
    return tensors


def _checked(tensor: StoredTensor, begin: int, end: int, payload_bytes: int) -> StoredTensor:
    if end > payload_bytes:
        raise WeightError(
            f"{tensor} is truncated: it ends at payload byte {end} of {payload_bytes} in {tensor.path}: "
            "download the file again"
        )
    known = tensor.dtype in DTYPES
    if (
        begin < 0
        or end < begin
        or not tensor.shape
        or min(tensor.shape) < 0
        or (known and end - begin != tensor.num_bytes)
    ):
        raise WeightError(
            f"{tensor}: {tensor.path} gives it bytes {begin} to {end}, which do not fit: download the file again"
        )
    return tensor


class ShardReader:
    """Copies row blocks out of mapped shards, one shard mapped at a time.

    Mapped pages that were read count as the process's own memory, so they are given back block by block: the peak does
    not grow with the shard. One staging buffer holds the block: what `rows` returns is valid until the next call.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._map: mmap.mmap | None = None
        self._staging = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def rows(self, tensor: StoredTensor, first: int, last: int) -> torch.Tensor:
        """Rows first..last of a tensor, [last - first, *shape[1:]] in its stored dtype; valid until the next call."""
        dtype = DTYPES[tensor.dtype]
        row_bytes = tensor.row_elements * dtype.itemsize
        start, count = tensor.offset + first * row_bytes, (last - first) * row_bytes
        if self._staging.numel() < count:
            self._staging = torch.empty(count, dtype=torch.uint8)
        block = self._staging[:count]
        # The copy also aligns: a payload offset need not be a multiple of the item size.
        block.numpy().data[:] = memoryview(self._mapped(tensor.path))[start : start + count]
        self._forget(start, count)
        return block.view(dtype).view(last - first, *tensor.shape[1:])

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """The whole tensor, in memory of its own."""
        whole = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
        for first, last in tensor.row_blocks():
            whole[first:last] = self.rows(tensor, first, last)
        return whole

    def _mapped(self, path: Path) -> mmap.mmap:
        if self._map is None or self._path != path:
            self._close()
            with path.open("rb") as file:
                self._map, self._path = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path
        return self._map

    def _forget(self, start: int, count: int) -> None:
        if sys.platform != "win32" and self._map is not None and count:
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, page, start + count - page)

    def _close(self) -> None:
        if self._map is not None:
            self._map.close()
        self._map = self._path = None


# Writing


class ShardWriter:
    """Writes tensors, given in the order of `layout`, into shards of at most `shard_bytes` (or one tensor).

    Keeps no tensor: the layout is known, so each shard's header is written before its payload.
    """

    def __init__(self, folder: Path, layout: Sequence[TensorSpec], shard_bytes: int) -> None:
        self._folder = folder
        self._shards: list[list[TensorSpec]] = [[]]
        filled = 0
        for spec in layout:
            if self._shards[-1] and filled + spec.num_bytes > shard_bytes:
                self._shards.append([])
                filled = 0
            self._shards[-1].append(spec)
            filled += spec.num_bytes
        self._order = iter([(number, spec) for number, shard in enumerate(self._shards) for spec in shard])
        self._current = -1
        self._file: BinaryIO | None = None
        self._offsets: dict[str, int] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor of the layout. Raises ValueError when it is not what the layout says comes next."""
        number, spec = next(self._order, (-1, None))
        if spec is None or (name, DTYPES[spec.dtype], spec.shape) != (spec.name, tensor.dtype, tuple(tensor.shape)):
            raise ValueError(f"expected {spec}, got {name} {tensor.dtype} {list(tensor.shape)}")
        if number != self._current or self._file is None:
            self._open(number)
        assert self._file is not None
        self._file.seek(self._offsets[name])
        self._file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Close the last shard and write the index. Raises ValueError when a tensor of the layout was not given."""
        left = next(self._order, None)
        if left is not None:
            raise ValueError(f"{left[1].name} was not written")
        if self._file is not None:
            self._file.close()
        weight_map = {spec.name: self._name(number) for number, shard in enumerate(self._shards) for spec in shard}
        total_size = sum(spec.num_bytes for shard in self._shards for spec in shard)
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def _name(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _open(self, number: int) -> None:
        if self._file is not None:
            self._file.close()
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin, begins = 0, {}
        # Wide items first, as the safetensors library lays them out: every tensor is then aligned to its item size.
        for spec in sorted(self._shards[number], key=lambda spec: -DTYPES[spec.dtype].itemsize):
            begins[spec.name] = begin
            end = begin + spec.num_bytes
            header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
            begin = end
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        self._offsets = {name: 8 + len(raw) + at for name, at in begins.items()}
        self._file = (self._folder / self._name(number)).open("wb")
        self._current = number
        self._file.write(len(raw).to_bytes(8, "little") + raw)
        self._file.truncate(8 + len(raw) + begin)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder, which becomes `folder` when the block ends without an error and else is removed.

    Raises: OSError when `folder` appeared meanwhile and is not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        partial.chmod(0o755)  # mkdtemp's 0700 would keep a server that runs as another user out
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
