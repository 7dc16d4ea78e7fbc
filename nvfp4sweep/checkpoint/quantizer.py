"""From a folder of safetensors shards to an NVFP4 checkpoint: shard by shard, without the model's code.

The first pass over a shard finds every weight's largest magnitude, and so what groups share; the second
quantizes and writes, while the first goes over the next shard. What shares a scale across shards is searched
before all. All goes to a folder beside the target, which takes the target's name at the very end: what is
interrupted looks like nothing, and goes on from there. Several processes may share the work.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import nvfp4sweep
from nvfp4sweep.checkpoint.baselines import scale_errors
from nvfp4sweep.checkpoint.engines import Engine, numpy_engine
from nvfp4sweep.checkpoint.folders import CONFIG_NAME, WorkFolder, check_apart, copy_others, write_index
from nvfp4sweep.checkpoint.passes import AMAX, QUANTIZE, Amaxes, Step, steps
from nvfp4sweep.checkpoint.pipeline import ahead
from nvfp4sweep.checkpoint.plan import Matrix, matrices
from nvfp4sweep.checkpoint.quality import Quality, write_quality
from nvfp4sweep.checkpoint.ranks import ALONE, Ranks, part, share, together
from nvfp4sweep.checkpoint.reader import Empty, TensorInfo
from nvfp4sweep.checkpoint.report import batch_dims, naming
from nvfp4sweep.checkpoint.selection import Selection
from nvfp4sweep.checkpoint.settings import Settings
from nvfp4sweep.checkpoint.writer import Entry, ShardWriter, open_shard, write_json
from nvfp4sweep.formats import E4M3_MAX

Array = npt.NDArray[Any]

_NOT_FINITE = "NaN or infinity"
_DEFAULT = Settings()

#: Called with one of STAGES and a tensor that has passed it.
Advance = Callable[[str, TensorInfo], None]


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
    what they become until it is written. An interrupted call leaves a folder `target`.partial, from which
    the same call goes on. The result depends neither on interruptions nor on the engines and processes.

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
        amaxes = self._early_amaxes(folder)
        bad = tuple(tensor.name for tensor in selection.early if tensor.name not in amaxes)
        chosen = {tensor.name for tensor in selection.plan.tensors}.difference(bad)
        skipped = selection.plan.skipped | ({_NOT_FINITE: bad} if bad else {})
        ignored = selection.ignored(skipped)
        entries = {
            file: [entry for tensor in tensors for entry in selection.entries(tensor, tensor.name in chosen)]
            for file, tensors in selection.shards.items()
        }
        if not folder.finished:
            self._write_shards(folder, entries, chosen, amaxes)

        def finish() -> None:
            if first and not folder.finished:
                self._write_others(folder, entries, skipped, ignored)
            if first:
                folder.finish()

        together(self._ranks, finish)
        part(self._ranks)
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

    def _early_amaxes(self, folder: WorkFolder) -> dict[str, Array]:
        """Of Selection.early; none of those to skip."""
        kept = folder.interim()
        if kept is None:
            mine = share(self.selection.early, self._checkpoint.n_bytes, self._ranks)
            everybody = together(self._ranks, lambda: self._find_early_amaxes(mine))
            kept = {name: amax for part in everybody for name, amax in part.items()}
            if self._ranks.rank == 0:
                folder.keep(kept)
        else:  # by an interrupted call
            for tensor in self.selection.early:
                self._advance(AMAX, tensor)
        return {name: np.asarray(value, np.float32) for name, value in kept.items()}

    def _find_early_amaxes(self, tensors: Sequence[TensorInfo]) -> dict[str, Any]:
        def find(tensor: TensorInfo, weight: Callable[[], Array]) -> Any:
            try:
                return self._amax(tensor, weight()).tolist()
            except ValueError:
                if not self._settings.skip_bad:
                    raise
                return None

        amaxes = {}
        for tensor, amax in zip(tensors, ahead(tensors, self._read, find), strict=True):
            if amax is not None:
                amaxes[tensor.name] = amax
            self._advance(AMAX, tensor)
        return amaxes

    def _read(self, tensor: TensorInfo) -> Array:
        return self._checkpoint.read(tensor, self._empty)

    def _amax(self, tensor: TensorInfo, weight: Array) -> Array:
        """The largest magnitude, or that of each expert of a stack."""
        with naming(tensor):
            return np.asarray(nvfp4sweep.global_amax(weight, batch_dims=batch_dims(tensor)))

    def _write_shards(
        self,
        folder: WorkFolder,
        entries: dict[str, list[Entry]],
        chosen: set[str],
        early: dict[str, Array],
    ) -> None:
        shards = self.selection.shards
        weights = {file: [t for t in tensors if t.name in chosen] for file, tensors in shards.items()}
        # Since an interruption.
        there = self._ranks.gather([file for file in shards if (folder.checkpoint / file).exists()])[0]
        for step in steps([weights[file] for file in there], early):
            self._advance(*step)
        left = [file for file in shards if file not in there]
        mine = share(left, lambda file: sum(map(self._checkpoint.n_bytes, shards[file])), self._ranks)

        plan = steps([weights[file] for file in mine], early)
        amaxes = Amaxes(self.selection.groups, early, {step.tensor.name for step in plan})

        def write() -> None:
            made = self._made(plan, amaxes)
            with ThreadPoolExecutor(1) as finisher:
                finished = finisher.submit(_nothing)
                for file in mine:
                    with ExitStack() as unfinished:
                        shard = unfinished.enter_context(open_shard(folder.checkpoint / file, entries[file]))
                        qualities = self._write_quantized(shard, weights[file], made)
                        folder.keep_of(file, [quality.as_json() for quality in qualities])
                        finished.result()
                        others = [tensor for tensor in shards[file] if tensor.name not in chosen]
                        finished = finisher.submit(self._finish, unfinished.pop_all(), shard, others)
                finished.result()

        together(self._ranks, write)

    def _made(self, plan: Sequence[Step], amaxes: Amaxes) -> Iterator[_Made]:
        """What becomes of each weight that is to be quantized, in their order."""

        def do(step: Step, weight: Callable[[], Array]) -> _Made | None:
            tensor = step.tensor
            if step.stage == AMAX:
                amaxes.find(tensor.name, lambda: self._amax(tensor, weight()))
                return None
            return self._make(tensor, weight(), amaxes.shared(tensor.name))

        done = ahead(plan, lambda step: self._read(step.tensor), do, self._workers)
        for step in plan:
            made = next(done)
            if made is None:
                self._advance(*step)
            else:
                yield made
                del made  # not kept in memory until the next is there

    def _write_quantized(
        self, shard: ShardWriter, weights: Sequence[TensorInfo], made: Iterator[_Made]
    ) -> list[Quality]:
        """While the next weights are read and quantized."""
        qualities: list[Quality] = []
        for tensor in weights:
            result = next(made)
            for name, array in result.arrays:
                shard.write(name, [np.ascontiguousarray(array).view(np.uint8).data])
            qualities += result.qualities
            del result
            self._advance(QUANTIZE, tensor)
        return qualities

    def _finish(self, unfinished: ExitStack, shard: ShardWriter, others: Sequence[TensorInfo]) -> None:
        """While the next shard is written: the tensors that are copied, and the disk takes the file."""
        with unfinished:
            for tensor in others:
                shard.write(tensor.name, self._checkpoint.chunks(tensor))

    def _make(self, tensor: TensorInfo, weight: Array, amaxes: Array) -> _Made:
        importance = None if self.selection.importances is None else self.selection.importances.of(tensor)
        made = _Made([], [])
        for matrix in matrices(tensor, self.selection.model_type):
            one = () if matrix.expert is None else (matrix.expert,)
            weighing = None if importance is None else importance[one]
            self._quantize(matrix, matrix.of(weight), amaxes[one], weighing, made)
        return made

    def _quantize(
        self, matrix: Matrix, weight: Array, amax: Any, importance: Array | None, made: _Made
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
