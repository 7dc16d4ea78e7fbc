"""One NVFP4 checkpoint out of another, tensor by tensor: what `convert` and `rescale-groups` share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nvfp4sweep.checkpoint.folders import WorkFolder, check_apart, state_of
from nvfp4sweep.checkpoint.layouts import Layout
from nvfp4sweep.checkpoint.reader import Checkpoint, CheckpointError, TensorInfo
from nvfp4sweep.checkpoint.verifier import Verifier
from nvfp4sweep.checkpoint.writer import Entry, open_shard

#: Called with each tensor that was written.
Advance = Callable[[TensorInfo], None]
#: The entries of each shard, by its name.
Entries = dict[str, list[Entry]]


class Change(NamedTuple):
    """What becomes of a tensor: its new entry, and its new bytes unless they stay."""

    entry: Entry
    content: Callable[[], bytes] | None = None


def open_sound(source: Path, target: Path) -> tuple[Verifier, Layout]:
    """A checkpoint whose modules can be read, and their layout.

    Raises:
        CheckpointError: it is broken, or mixes layouts, or one of the folders lies in the other.
    """
    check_apart(source, target)
    verifier = Verifier(source)
    for problem in verifier.structure():
        raise CheckpointError(f"{source}: {problem}")
    layouts = {module.layout.name: module.layout for module in verifier.modules.values()}
    if len(layouts) > 1:
        raise CheckpointError(f"{source} has weights in the layouts {' and '.join(layouts)}: one is needed")
    return verifier, next(iter(layouts.values()))


def work_folder(verifier: Verifier, target: Path, arguments: dict[str, Any]) -> WorkFolder:
    """Where the work goes on that this command began on this input with these arguments."""
    return WorkFolder(target, state_of(verifier.checkpoint, arguments))


def unchanged(checkpoint: Checkpoint, tensor: TensorInfo) -> Entry:
    return Entry(tensor.name, tensor.dtype, tensor.shape, checkpoint.n_bytes(tensor))


def rewrite(
    checkpoint: Checkpoint,
    folder: WorkFolder,
    changes: Mapping[str, Change],
    write_others: Callable[[Path, Entries], None],
    advance: Advance,
) -> None:
    """Write all tensors, those in `changes` changed, then all else; then it takes its name.

    Args:
        changes: by the tensors' present names.
        write_others: writes what is no shard into the folder that it is given.
    """
    if not folder.finished:
        entries = {}
        for file, tensors in checkpoint.shards.items():
            new = [changes.get(tensor.name) or Change(unchanged(checkpoint, tensor)) for tensor in tensors]
            entries[file] = [change.entry for change in new]
            path = folder.checkpoint / file
            if path.exists():  # by an interrupted call
                for tensor in tensors:
                    advance(tensor)
                continue
            with open_shard(path, entries[file]) as shard:
                for tensor, (entry, content) in zip(tensors, new, strict=True):
                    shard.write(entry.name, checkpoint.chunks(tensor) if content is None else [content()])
                    advance(tensor)
        write_others(folder.checkpoint, entries)
    folder.finish()
