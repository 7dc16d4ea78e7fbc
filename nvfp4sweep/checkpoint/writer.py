"""Files that have their name only once they are whole; a safetensors file written tensor by tensor."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

#: Bytes an element. Tensors of other dtypes are only ever copied.
ITEM_SIZES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
}
_HEADER_ALIGNMENT = 8


class Entry(NamedTuple):
    """A tensor of a file to be written: `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int


class ShardWriter:
    """A safetensors file in the making: `open_shard` gives one."""

    def __init__(self, stream: BinaryIO, entries: Sequence[Entry]) -> None:
        self._stream = stream
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, tuple[int, int]] = {}
        end = 0
        for entry in sorted(entries, key=lambda e: (-ITEM_SIZES.get(e.dtype, 1), e.name)):
            start, end = end, end + entry.n_bytes
            header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, end]}
            self._places[entry.name] = (start, entry.n_bytes)
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % _HEADER_ALIGNMENT)
        self._data = 8 + len(encoded)
        self._stream.write(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """All bytes of one tensor.

        Raises:
            ValueError: they are not as many as its entry says, or it was written before.
        """
        start, expected = self._places.pop(name)
        self._stream.seek(self._data + start)
        written = sum(self._stream.write(chunk) for chunk in chunks)
        if written != expected:
            raise ValueError(f"{name} has {written} bytes, and {expected} were announced")

    def check_whole(self) -> None:
        """
        Raises:
            ValueError: a tensor was not written.
        """
        if self._places:
            raise ValueError(f"{min(self._places)} was announced and not written")


@contextmanager
def open_shard(path: Path, entries: Sequence[Entry]) -> Iterator[ShardWriter]:
    """The safetensors library writes a file from tensors that are all in memory; this takes one at a time.

    Args:
        path: the file, replaced if it exists.
        entries: all tensors, in any order. The file has those of the largest elements first, as aligned
            readers need it, then by name.
    """
    with replacing(path, resumed=True) as temporary, temporary.open("wb") as stream:
        shard = ShardWriter(stream, entries)
        yield shard
        shard.check_whole()
        _sync(stream)


def write_json(path: Path, content: object) -> None:
    """Replace a file by this, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, content: str) -> None:
    """Replace a file by this, whole or not at all."""
    with replacing(path, resumed=True) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.write(content)
        _sync(stream)


@contextmanager
def replacing(path: Path, *, resumed: bool = False) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place on success and vanishes on failure.

    Args:
        resumed: the name is the same in every process: one overwrites what another was killed over.
    """
    name = f"{path.name}.tmp" if resumed else f".{path.name}.{os.getpid()}.tmp"
    temporary = path.with_name(name)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _sync(stream: IO[Any]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
