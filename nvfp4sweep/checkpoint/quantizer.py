"""From a folder of safetensors shards to an NVFP4 checkpoint: shard by shard, without the model's code.

The first pass finds every weight's largest magnitude, and so what groups share; the second quantizes and
writes. All goes to a folder beside the target, which takes the target's name at the very end: what is
interrupted looks like nothing, and goes on from there. Several processes may share the work.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import nvfp4sweep
from nvfp4sweep.checkpoint.baselines import scale_errors
from nvfp4sweep.checkpoint.folders import CONFIG_NAME, WorkFolder, check_apart, copy_others, write_index
from nvfp4sweep.checkpoint.pipeline import ahead
from nvfp4sweep.checkpoint.plan import Matrix, matrices
from nvfp4sweep.checkpoint.quality import Quality, write_quality
from nvfp4sweep.checkpoint.ranks import ALONE, Ranks, share, together
from nvfp4sweep.checkpoint.reader import Empty, TensorInfo
from nvfp4sweep.checkpoint.report import batch_dims, naming
from nvfp4sweep.checkpoint.selection import Selection
from nvfp4sweep.checkpoint.settings import Settings
from nvfp4sweep.checkpoint.writer import Entry, open_shard, write_json
from nvfp4sweep.formats import E4M3_MAX

Array = npt.NDArray[Any]

_NOT_FINITE = "NaN or infinity"


class Packed(NamedTuple):
    """A matrix in NVFP4, on the host.

    Attributes:
        packed: uint8 [N, K / 2].
        scale: float8_e4m3fn [N, K / 16], or its bytes.
        global_scale: the multiplier, float32 [].
    """

    packed: Array
    scale: Array
    global_scale: Array


#: (matrix [N, K], global amax, importance [K] or None, min_code) -> Packed
Engine = Callable[[Array, np.float32, Array | None, int], Packed]
STAGES = ("amax", "quantize")
#: Called with one of STAGES and a tensor that has passed it.
Advance = Callable[[str, TensorInfo], None]


def numpy_engine(matrix: Array, amax: np.float32, importance: Array | None, min_code: int) -> Packed:
    found = nvfp4sweep.quantize(matrix, global_amax=amax, importance=importance, min_code=min_code)
    return Packed(found.packed, found.scale, np.asarray(found.global_scale))


_DEFAULT = Settings()


@dataclass(frozen=True)
class Written:
    """What `quantize_checkpoint` did.

    Attributes:
        modules: the layers quantized, one an expert.
        ignored: the layers named in the configuration as not quantized.
        skipped: the names of all tensors that were copied, by the reason.
        warnings: what may not be as the caller wants it, a sentence each.
        n_bytes: of all tensors written.
    """

    modules: tuple[str, ...]
    ignored: tuple[str, ...]
    skipped: dict[str, tuple[str, ...]] = field(repr=False)
    warnings: tuple[str, ...]
    n_bytes: int


class _Made(NamedTuple):
    """What becomes of a tensor."""

    arrays: list[tuple[str, Array]]
    qualities: list[Quality]


def quantize_checkpoint(
    source: Path,
    target: Path,
    settings: Settings = _DEFAULT,
    *,
    importance: Path | None = None,
    engines: Sequence[Engine] = (numpy_engine,),
    off_cpu: bool = False,
    empty: Empty = np.empty,
    ranks: Ranks = ALONE,
    advance: Advance = lambda stage, tensor: None,
) -> Written:
    """Write an NVFP4 checkpoint of the model in `source` to `target`.

    In memory are one tensor for each engine, two with `off_cpu`, and the next, which is read meanwhile; and
    what as many became until it is written. An interrupted call leaves a folder `target`.partial, from
    which the same call goes on. The result depends neither on interruptions nor on the engines and
    processes.

    Args:
        source: a Hugging Face folder, with config.json and one or more *.safetensors files.
        target: a folder that is not there yet, or is empty.
        importance: a safetensors file with an importance per input, [K] or, for stacked experts, [E, K],
            under the names of the tensors; or llama.cpp's imatrix, *.gguf. Others are quantized without.
        engines: where the searches run, one at a time on each.
        off_cpu: the engines leave this CPU idle, so while they search a tensor it works on the report of
            the one before.
        empty: gives the memory that weights are read to, as numpy.empty: engines may prefer some.
        ranks: the processes that call this with the same arguments, on one file system.
        advance: told of each tensor that this process has read, in each of the two passes.

    Raises:
        CheckpointError: `source` cannot be quantized or read, or `target` cannot be written to as it is,
            or another process failed.
        ValueError: NaN or infinity in a weight (unless settings.skip_bad); the message names it.
        OSError: the disk refuses.
    """
    return Job(source, target, settings, importance, engines, off_cpu, empty, ranks).run(advance)


class Job:
    """`quantize_checkpoint` in two steps: what can be refused before the work is, then the work.

    Attributes:
        selection: what is to be done.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        settings: Settings,
        importance: Path | None = None,
        engines: Sequence[Engine] = (numpy_engine,),
        off_cpu: bool = False,
        empty: Empty = np.empty,
        ranks: Ranks = ALONE,
    ) -> None:
        check_apart(source, target)
        self.selection = Selection(source, settings, importance)
        self._checkpoint, self._settings = self.selection.checkpoint, settings
        self._target, self._ranks = target, ranks
        self._advance: Advance = lambda stage, tensor: None
        self._engines: SimpleQueue[Engine] = SimpleQueue()
        for engine in engines:
            self._engines.put(engine)
        self._empty = empty
        self._cores = Lock()
        self._workers = (2 if off_cpu else 1) * len(engines)

    def run(self, advance: Advance) -> Written:
        self._advance = advance
        selection, first = self.selection, self._ranks.rank == 0
        folder = self._open_folder()
        amaxes = self._amaxes(folder)
        chosen = {tensor.name for tensor in selection.plan.tensors if tensor.name in amaxes}
        bad = tuple(tensor.name for tensor in selection.plan.tensors if tensor.name not in amaxes)
        skipped = selection.plan.skipped | ({_NOT_FINITE: bad} if bad else {})
        ignored = selection.ignored(skipped)
        entries = {
            file: [entry for tensor in tensors for entry in selection.entries(tensor, tensor.name in chosen)]
            for file, tensors in selection.shards.items()
        }
        if not folder.finished:
            self._write_shards(folder, entries, chosen, selection.shared(amaxes))

        def finish() -> None:
            if first and not folder.finished:
                self._write_others(folder, entries, skipped, ignored)
            if first:
                folder.finish()

        together(self._ranks, finish)
        quantized = (tensor for tensor in selection.plan.tensors if tensor.name in chosen)
        modules = [m.module for tensor in quantized for m in matrices(tensor, selection.model_type)]
        n_bytes = sum(entry.n_bytes for shard in entries.values() for entry in shard)
        return Written(tuple(modules), ignored, skipped, selection.warnings, n_bytes)

    def _open_folder(self) -> WorkFolder:
        """One process makes it, and the others find it."""
        found: list[WorkFolder] = []

        def find() -> None:
            found.append(WorkFolder(self._target, self.selection.state()))

        first = self._ranks.rank == 0
        together(self._ranks, find if first else _nothing)
        together(self._ranks, _nothing if first else find)
        return found[0]

    def _amaxes(self, folder: WorkFolder) -> dict[str, Array]:
        """The largest magnitude of each weight, or of each expert of a stack; none of those to skip."""
        kept = folder.interim()
        if kept is None:
            mine = self._to_search()
            everybody = together(self._ranks, lambda: self._find_amaxes(mine))
            found = {name: amax for part in everybody for name, amax in part.items()}
            kept = {
                tensor.name: found[tensor.name]
                for tensor in self.selection.plan.tensors
                if tensor.name in found
            }
            if self._ranks.rank == 0:
                folder.keep(kept)
        else:  # by an interrupted call
            for tensor in self.selection.plan.tensors:
                self._advance("amax", tensor)
        return {name: np.asarray(value, np.float32) for name, value in kept.items()}

    def _to_search(self) -> list[TensorInfo]:
        """The weights whose amaxes this process finds.

        Those of the shards that it will write: its host then has them in memory. Of any shards where there
        are not enough for all processes.
        """
        weights, shards = self.selection.plan.tensors, self.selection.shards
        if len(shards) < self._ranks.size:
            return share(weights, self._checkpoint.n_bytes, self._ranks)
        mine = {tensor for file in self._to_write(list(shards)) for tensor in shards[file]}
        return [tensor for tensor in weights if tensor in mine]

    def _to_write(self, shards: Sequence[str]) -> list[str]:
        """This process's part of them."""

        def n_bytes(file: str) -> int:
            return sum(map(self._checkpoint.n_bytes, self.selection.shards[file]))

        return share(shards, n_bytes, self._ranks)

    def _find_amaxes(self, tensors: Sequence[TensorInfo]) -> dict[str, Any]:
        def find(tensor: TensorInfo, weight: Array) -> Any:
            try:
                with naming(tensor):
                    return nvfp4sweep.global_amax(weight, batch_dims=batch_dims(tensor)).tolist()
            except ValueError:
                if not self._settings.skip_bad:
                    raise
                return None

        amaxes = {}
        found = ahead(tensors, self._read, find)
        for tensor, amax in zip(tensors, found, strict=True):
            if amax is not None:
                amaxes[tensor.name] = amax
            self._advance("amax", tensor)
        return amaxes

    def _read(self, tensor: TensorInfo) -> Array:
        return self._checkpoint.read(tensor, self._empty)

    def _write_shards(
        self,
        folder: WorkFolder,
        entries: dict[str, list[Entry]],
        chosen: set[str],
        amaxes: dict[str, Array],
    ) -> None:
        # Since an interruption.
        there = [file for file in self.selection.shards if (folder.checkpoint / file).exists()]
        there = self._ranks.gather(there)[0]
        for file in there:
            for tensor in self.selection.shards[file]:
                if tensor.name in chosen:
                    self._advance("quantize", tensor)
        mine = self._to_write([file for file in self.selection.shards if file not in there])

        def write() -> None:
            weights = [
                tensor for file in mine for tensor in self.selection.shards[file] if tensor.name in chosen
            ]
            made = ahead(weights, self._read, lambda t, w: self._make(t, w, amaxes[t.name]), self._workers)
            for file in mine:
                self._write_shard(folder, file, entries[file], chosen, made)

        together(self._ranks, write)

    def _write_shard(
        self,
        folder: WorkFolder,
        file: str,
        entries: Sequence[Entry],
        chosen: set[str],
        made: Iterator[_Made],
    ) -> None:
        """A shard, while the next tensors are read and quantized."""
        qualities: list[Quality] = []
        with open_shard(folder.checkpoint / file, entries) as shard:
            for tensor in self.selection.shards[file]:
                if tensor.name in chosen:
                    result = next(made)
                    for name, array in result.arrays:
                        shard.write(name, [np.ascontiguousarray(array).view(np.uint8).data])
                    qualities += result.qualities
                    del result
                    self._advance("quantize", tensor)
                else:
                    shard.write(tensor.name, self._checkpoint.chunks(tensor))
            folder.keep_of(file, [quality.as_json() for quality in qualities])

    def _make(self, tensor: TensorInfo, weight: Array, amaxes: Array) -> _Made:
        importance = None if self.selection.importances is None else self.selection.importances.of(tensor)
        made = _Made([], [])
        for matrix in matrices(tensor, self.selection.model_type):
            one = () if matrix.expert is None else (matrix.expert,)
            weighing = None if importance is None else importance[one]
            self._quantize(matrix, matrix.of(weight), amaxes[one], weighing, made)
        return made

    def _quantize(
        self,
        matrix: Matrix,
        weight: Array,
        amax: Any,
        importance: Array | None,
        made: _Made,
    ) -> None:
        amax = amax * np.float32(E4M3_MAX / self._settings.scale_max)
        # A weight of zeros has no scale of its own, and runtimes divide by it.
        amax = np.float32(amax if amax > 0 else 1)
        engine = self._engines.get()
        try:
            found = engine(weight, amax, importance, self._settings.min_code)
        finally:
            self._engines.put(engine)
        arrays = self._settings.layout.arrays(
            matrix.module,
            found.packed,
            found.scale,
            float(found.global_scale),
            self._settings.input_scale,
        )
        made.arrays.extend(arrays.items())
        with self._cores:  # all of them: two at a time would keep the engines' threads waiting
            errors = scale_errors(np.ascontiguousarray(weight), found.scale.view(np.uint8), np.asarray(amax))
        made.qualities.append(Quality(matrix.module, matrix.shape, float(amax), errors))

    def _write_others(
        self,
        folder: WorkFolder,
        entries: dict[str, list[Entry]],
        skipped: dict[str, tuple[str, ...]],
        ignored: tuple[str, ...],
    ) -> None:
        """Everything but the weights; the configuration last."""
        target = folder.checkpoint
        copy_others(self.selection.source, target, {*self._checkpoint.shards, *self.selection.shards})
        write_index(self.selection.source, target, entries)
        layout, with_input = self._settings.layout, self._settings.input_scale is not None
        for name, content in layout.other_files(ignored, with_input).items():
            write_json(target / name, content)
        kept = {file: folder.kept_of(file) for file in self.selection.shards}
        qualities = [Quality.from_json(one) for shard in kept.values() for one in shard]
        write_quality(target, qualities, skipped, self.selection.warnings)
        quantization = {"quantization_config": layout.config(ignored, with_input)}
        write_json(target / CONFIG_NAME, self.selection.config | quantization)


def _nothing() -> None:
    pass
