"""A safetensors file written tensor by tensor. It has its name only once it is whole."""

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

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
    """The safetensors library writes a file from tensors that are all in memory; this takes one at a time.

    Use it as a context: where that ends in an exception, no file is left.

    Args:
        path: the file, replaced if it exists.
        entries: all tensors, in any order. The file has those of the largest elements first, as aligned
            readers need it, then by name.
    """

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self._path = path
        self._temporary = path.with_name(f"{path.name}.tmp")
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
        self._stream = self._temporary.open("wb")
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._places:
                    raise ValueError(f"{min(self._places)} was announced and not written")
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self._stream.close()
                self._temporary.replace(self._path)
        finally:
            self._stream.close()
            with suppress(FileNotFoundError):
                self._temporary.unlink()


def write_json(path: Path, content: object) -> None:
    """Replace a file by this, whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=2, sort_keys=True)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
