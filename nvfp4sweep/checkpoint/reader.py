"""A safetensors checkpoint on disk: a file, or a folder of shards. Tensors are read one at a time."""

import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

#: What is read as numbers; tensors of other dtypes are only ever copied.
_DTYPES: dict[str, npt.DTypeLike] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
#: As numpy.empty: gives an array of a shape and a dtype.
Empty = Callable[[tuple[int, ...], npt.DTypeLike], npt.NDArray[Any]]
INDEX_NAME = "model.safetensors.index.json"
_CHUNK = 1 << 24


class CheckpointError(ValueError):
    """The checkpoint cannot be used as it is; the message says why."""


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a safetensors file says about a tensor.

    Attributes:
        name: unique in the checkpoint.
        shape: axes as stored.
        dtype: as safetensors names it: "F32", "BF16", "F8_E4M3", "U8", ...
        file: the file that holds it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Checkpoint:
    """The tensors of a .safetensors file or of a Hugging Face folder.

    A folder with model.safetensors.index.json has the tensors that the index names; one without it
    has those of all its *.safetensors files.

    Attributes:
        tensors: one TensorInfo a tensor, file by file.

    Raises:
        CheckpointError: nothing there, not safetensors, or an index that does not fit its shards.
    """

    def __init__(self, path: Path) -> None:
        self._handles: dict[Path, Any] = {}
        self._ranges: dict[Path, dict[str, tuple[int, int]]] = {}
        if path.is_dir():
            index = path / INDEX_NAME
            self.tensors = self._indexed(index) if index.is_file() else self._all_in(path)
        elif path.is_file():
            self.tensors = self._header(path)
        else:
            raise CheckpointError(f"{path} does not exist")

    @functools.cached_property
    def shards(self) -> dict[str, list[TensorInfo]]:
        """The tensors of each file, by its name."""
        shards: dict[str, list[TensorInfo]] = {}
        for tensor in self.tensors:
            shards.setdefault(tensor.file.name, []).append(tensor)
        return shards

    def read(self, tensor: TensorInfo, empty: Empty = np.empty) -> npt.NDArray[Any]:
        """The tensor, a copy in memory: float32, float16 or bfloat16; float64 becomes float32.

        Args:
            empty: gives the memory, as numpy.empty.

        Raises:
            CheckpointError: the data cannot be read.
        """
        array = empty(tensor.shape, _DTYPES[tensor.dtype])
        start, _ = self._data_range(tensor)
        try:
            # Not through the library's memory map: what was read of it counts as this process's memory.
            with tensor.file.open("rb", buffering=0) as stream:
                stream.seek(start)
                left = array.reshape(-1).view(np.uint8).data
                while left and (n_read := stream.readinto(left)):
                    left = left[n_read:]
        except OSError as error:
            raise CheckpointError(f"{tensor.name} in {tensor.file} cannot be read: {error}") from None
        if left:
            raise CheckpointError(f"{tensor.name} in {tensor.file} cannot be read: the file has ended")
        if array.dtype == np.float64:
            # As `sweep` does it: beyond float32's range it becomes infinite, which `sweep` reports.
            with np.errstate(over="ignore"):
                return array.astype(np.float32)
        return array

    def chunks(self, tensor: TensorInfo) -> Iterator[bytes]:
        """The tensor's bytes as they are stored, of any dtype, some megabytes at a time.

        Raises:
            CheckpointError: the data cannot be read.
        """
        start, stop = self._data_range(tensor)
        try:
            with tensor.file.open("rb") as stream:
                stream.seek(start)
                while start < stop and (chunk := stream.read(min(stop - start, _CHUNK))):
                    start += len(chunk)
                    yield chunk
        except OSError as error:
            raise CheckpointError(f"{tensor.name} in {tensor.file} cannot be read: {error}") from None

    def n_bytes(self, tensor: TensorInfo) -> int:
        """How many bytes the tensor takes in its file."""
        start, stop = self._data_range(tensor)
        return stop - start

    def _data_range(self, tensor: TensorInfo) -> tuple[int, int]:
        """Where in its file the tensor's bytes are: the library tells shapes, and not this."""
        if tensor.file not in self._ranges:
            with tensor.file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            ranges = {name: entry["data_offsets"] for name, entry in header.items()}
            self._ranges[tensor.file] = {k: (8 + length + a, 8 + length + b) for k, (a, b) in ranges.items()}
        return self._ranges[tensor.file][tensor.name]

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from None
        return self._handles[file]

    def _header(self, file: Path) -> list[TensorInfo]:
        handle = self._handle(file)
        slices = ((name, handle.get_slice(name)) for name in handle.keys())  # noqa: SIM118
        return [TensorInfo(name, tuple(s.get_shape()), s.get_dtype(), file) for name, s in slices]

    def _all_in(self, folder: Path) -> list[TensorInfo]:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder} holds no *.safetensors file")
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for tensor in self._header(file):
                if tensor.name in tensors:
                    other = tensors[tensor.name].file.name
                    raise CheckpointError(
                        f"{tensor.name} is in both {other} and {file.name}, and {folder} has no "
                        f"{INDEX_NAME} to say which counts: name one file"
                    )
                tensors[tensor.name] = tensor
        return list(tensors.values())

    def _indexed(self, index: Path) -> list[TensorInfo]:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f'{index} is not a JSON file with a "weight_map" of names') from None
        tensors = []
        for shard in shards:
            file = index.parent / str(shard)
            if not file.is_file():
                raise CheckpointError(f"{index} names the shard {shard}, which does not exist")
            wanted = {name for name, value in weight_map.items() if value == shard}
            found = [tensor for tensor in self._header(file) if tensor.name in wanted]
            missing = wanted - {tensor.name for tensor in found}
            if missing:
                raise CheckpointError(f"{index} names {min(missing)} in {shard}, which does not hold it")
            tensors += found
        return tensors
