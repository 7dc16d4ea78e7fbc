"""The folders of a job: a model's, the one that is made of it, and the one where that is done meanwhile."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nvfp4sweep
from nvfp4sweep.checkpoint.reader import INDEX_NAME, Checkpoint, CheckpointError
from nvfp4sweep.checkpoint.writer import Entry, write_json

CONFIG_NAME = "config.json"


class WorkFolder:
    """`target`.partial, for what is not finished: a state, an interim result, and the checkpoint so far.

    The checkpoint's own folder becomes `target` in one step at the end. What is interrupted before looks
    like nothing; what is interrupted after is finished.

    Attributes:
        checkpoint: the folder that becomes `target`.
        finished: an interrupted call came as far as that.

    Args:
        target: a folder that is not there, or is empty, or was finished by an interrupted call.
        state: what the result depends on, as JSON. A folder of another state is refused.

    Raises:
        CheckpointError: `target` or the folder is in the way.
    """

    def __init__(self, target: Path, state: dict[str, Any]) -> None:
        self._target = target
        self._path = target.with_name(f"{target.name}.partial")
        self._state = self._path / "state.json"
        self._result = self._path / "amax.json"
        self._parts = self._path / "parts"
        self.checkpoint = self._path / "checkpoint"
        if not target.parent.is_dir():
            raise CheckpointError(f"the folder {target.parent} does not exist")
        begun = self._state.exists()
        if begun and json.loads(self._state.read_text(encoding="utf-8")) != state:
            raise CheckpointError(
                f"{self._path} is of another call, or of another state of its input: delete it"
            )
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
        self.finished = begun and taken and not self.checkpoint.exists()
        if taken and not self.finished:
            raise CheckpointError(f"{target} is there already: name a new folder, or an empty one")
        if not begun:
            for folder in (self._path, self.checkpoint, self._parts):
                folder.mkdir(exist_ok=True)
            write_json(self._state, state)

    def interim(self) -> Any:
        """What `keep` kept, or None."""
        return json.loads(self._result.read_text(encoding="utf-8")) if self._result.exists() else None

    def keep(self, result: Any) -> None:
        write_json(self._result, result)

    def keep_of(self, part: str, result: Any) -> None:
        """Keep what belongs to a part of the checkpoint, before that is there."""
        write_json(self._parts / f"{part}.json", result)

    def kept_of(self, part: str) -> Any:
        return json.loads((self._parts / f"{part}.json").read_text(encoding="utf-8"))

    def finish(self) -> None:
        if not self.finished:
            os.replace(self.checkpoint, self._target)
            _sync(self._target.parent)
        self._result.unlink(missing_ok=True)
        shutil.rmtree(self._parts, ignore_errors=True)
        self._state.unlink()
        self._path.rmdir()


def state_of(checkpoint: Checkpoint, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a job's result depends on, as JSON has it: arguments, the files that it reads, and the version."""
    files = {name: identity(tensors[0].file) for name, tensors in checkpoint.shards.items()}
    state = arguments | {"version": nvfp4sweep.__version__, "files": files}
    return json.loads(json.dumps(state))  # type: ignore[no-any-return]


def check_apart(source: Path, target: Path) -> None:
    """
    Raises:
        CheckpointError: one lies in the other, or is it.
    """
    one, other = source.resolve(), target.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise CheckpointError(f"{target} and {source} must not lie in each other: the input stays as it is")


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: it is not there, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def read_config(source: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        CheckpointError: there is none, or it is of a quantized model.
    """
    config = read_json(source / CONFIG_NAME)
    if "quantization_config" in config:
        raise CheckpointError(f"{source} is quantized already: {CONFIG_NAME} has a quantization_config")
    return config


def identity(path: Path) -> list[int]:
    """What changes when a file is written."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def copy_others(source: Path, target: Path, shards: set[str]) -> None:
    """All files but these shards, the index and the configuration, in subfolders too."""
    written = {*shards, INDEX_NAME, CONFIG_NAME}
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_file() and str(relative) not in written:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)


def write_index(source: Path, target: Path, entries: Mapping[str, Sequence[Entry]]) -> None:
    """The index of these shards, where they are several, or the input has one."""
    if len(entries) > 1 or (source / INDEX_NAME).exists():
        n_bytes = sum(entry.n_bytes for shard in entries.values() for entry in shard)
        weight_map = {entry.name: file for file, shard in entries.items() for entry in shard}
        write_json(target / INDEX_NAME, {"metadata": {"total_size": n_bytes}, "weight_map": weight_map})


def _sync(folder: Path) -> None:
    """So that a new name outlives a loss of power, where folders can be opened for it."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
