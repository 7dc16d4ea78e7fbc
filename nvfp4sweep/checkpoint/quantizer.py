"""From a folder of safetensors shards to an NVFP4 checkpoint: shard by shard, without the model's code.

The first pass finds every weight's largest magnitude, and so what groups share; the second quantizes and
writes. All goes to a folder beside the target, which takes the target's name at the very end: what is
interrupted looks like nothing, and goes on from there.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import nvfp4sweep
from nvfp4sweep.checkpoint.folders import (
    CONFIG_NAME,
    WorkFolder,
    check_apart,
    copy_others,
    identity,
    read_config,
)
from nvfp4sweep.checkpoint.layouts import MODELOPT, Layout
from nvfp4sweep.checkpoint.plan import (
    Matrix,
    fusion_groups,
    make_plan,
    matrices,
    reason_to_skip,
)
from nvfp4sweep.checkpoint.reader import INDEX_NAME, Checkpoint, CheckpointError, TensorInfo
from nvfp4sweep.checkpoint.report import batch_dims, naming
from nvfp4sweep.checkpoint.writer import Entry, open_shard, write_json
from nvfp4sweep.formats import E4M3_MAX, MIN_CODE

Array = npt.NDArray[Any]

_EXCLUDED = "excluded by the caller"
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


@dataclass(frozen=True)
class Settings:
    """What the checkpoint is to be.

    Attributes:
        layout: one of layouts.LAYOUTS.
        input_scale: the multiplier of activations, written for each weight (W4A4); None for W4A16.
        include: regular expressions: tensors to quantize though the rules leave them out by name.
        exclude: tensors to leave as they are.
        groups: tensors that match one of these, with the same text in its parentheses, share a global
            scale, besides those that plan.FUSED_LAYERS names.
        min_code: the lowest code of a block scale: 8 where a runtime flushes subnormal ones to zero.
        scale_max: the largest block scale, up to 448. A lower one leaves headroom, as 256 does for 4/6.
        strict: refuse a linear weight with a K that 16 does not divide.
        skip_bad: leave weights with NaN or infinity as they are.
    """

    layout: Layout = MODELOPT
    input_scale: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    min_code: int = MIN_CODE
    scale_max: float = E4M3_MAX
    strict: bool = False
    skip_bad: bool = False

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "groups"):
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"{name}: {pattern!r} is not a regular expression: {error}") from None
        if self.input_scale is not None and not 0 < self.input_scale < float("inf"):
            raise ValueError(f"input_scale={self.input_scale} must be positive and finite")
        if not 0 < self.scale_max <= E4M3_MAX:
            raise ValueError(f"scale_max={self.scale_max} must lie in (0, {E4M3_MAX:g}]")


@dataclass(frozen=True)
class Written:
    """What `quantize_checkpoint` did.

    Attributes:
        modules: the layers quantized, one an expert.
        ignored: the layers named in the configuration as not quantized.
        skipped: the names of all tensors that were copied, by the reason.
        n_bytes: of all tensors written.
    """

    modules: tuple[str, ...]
    ignored: tuple[str, ...]
    skipped: dict[str, tuple[str, ...]] = field(repr=False)
    n_bytes: int


def quantize_checkpoint(
    source: Path,
    target: Path,
    settings: Settings = Settings(),
    *,
    importance: Path | None = None,
    engine: Engine = numpy_engine,
    advance: Advance = lambda stage, tensor: None,
) -> Written:
    """Write an NVFP4 checkpoint of the model in `source` to `target`.

    In memory are one tensor and the next, which is read meanwhile. An interrupted call leaves a folder
    `target`.partial, from which the same call goes on; the result does not depend on interruptions.

    Args:
        source: a Hugging Face folder, with config.json and one or more *.safetensors files.
        target: a folder that is not there yet, or is empty.
        importance: a safetensors file with an importance per input, [K] or, for stacked experts, [E, K],
            under the names of the tensors. Others are quantized without.
        engine: where the search runs.
        advance: told of each tensor that was read, in each of the two passes.

    Raises:
        CheckpointError: `source` cannot be quantized or read, or `target` cannot be written to as it is.
        ValueError: NaN or infinity in a weight (unless settings.skip_bad); the message names it.
        OSError: the disk refuses.
    """
    return Job(source, target, settings, importance, engine).run(advance)


class Job:
    """`quantize_checkpoint` in two steps: what can be refused before the work is, then the work.

    Attributes:
        plan: which tensors are quantized, and why others are not.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        settings: Settings,
        importance: Path | None = None,
        engine: Engine = numpy_engine,
    ) -> None:
        self.source, self.target, self.settings, self.engine = source, target, settings, engine
        self.advance: Advance = lambda stage, tensor: None
        check_apart(source, target)
        self.config = read_config(source)
        self.model_type = str(self.config.get("model_type", ""))
        self.checkpoint = Checkpoint(source)
        self.importance = _Importances(importance)
        self.plan = make_plan(self.checkpoint.tensors, self._reason_to_skip)
        self.shards: dict[str, list[TensorInfo]] = {}
        for tensor in self.checkpoint.tensors:
            self.shards.setdefault(tensor.file.name, []).append(tensor)
        self._check_plan()

    def run(self, advance: Advance) -> Written:
        self.advance = advance
        folder = WorkFolder(self.target, self._state())
        amaxes = self._amaxes(folder)
        chosen = {tensor.name: tensor for tensor in self.plan.tensors if tensor.name in amaxes}
        bad = tuple(tensor.name for tensor in self.plan.tensors if tensor.name not in amaxes)
        skipped = self.plan.skipped | ({_NOT_FINITE: bad} if bad else {})
        ignored = self._ignored(skipped)
        entries = {
            file: [entry for tensor in tensors for entry in self._entries(tensor, chosen)]
            for file, tensors in self.shards.items()
        }
        if not folder.finished:
            shared = self._shared(amaxes)
            for file, tensors in self.shards.items():
                self._write_shard(folder.checkpoint / file, tensors, entries[file], chosen, shared)
            self._write_others(folder.checkpoint, entries, ignored)
        folder.finish()
        modules = [m.module for t in chosen.values() for m in matrices(t, self.model_type)]
        n_bytes = sum(entry.n_bytes for shard in entries.values() for entry in shard)
        return Written(tuple(modules), ignored, skipped, n_bytes)

    # --- what is to be done ---------------------------------------------------------------------------

    def _reason_to_skip(self, tensor: TensorInfo) -> str | None:
        included = any(re.search(pattern, tensor.name) for pattern in self.settings.include)
        reason = reason_to_skip(tensor, self.model_type, whatever_its_name=included)
        if reason is None and any(re.search(pattern, tensor.name) for pattern in self.settings.exclude):
            return _EXCLUDED
        return reason

    def _check_plan(self) -> None:
        if not self.plan.tensors:
            raise CheckpointError(f"{self.source} has no linear weight to quantize")
        uneven = [n for reason, names in self.plan.skipped.items() if "divisible" in reason for n in names]
        if self.settings.strict and uneven:
            raise CheckpointError(f"{uneven[0]} has a K that 16 does not divide, and strict is set")

    def _shared(self, amaxes: dict[str, Array]) -> dict[str, Array]:
        """The global amaxes to use: what the groups share."""
        groups = [list(group) for group in fusion_groups(amaxes)]
        for pattern in self.settings.groups:
            matching: dict[tuple[str, ...], list[str]] = {}
            for name in amaxes:
                if match := re.search(pattern, name):
                    matching.setdefault(match.groups(), []).append(name)
            groups += matching.values()
        shared = dict(amaxes)
        for group in groups:
            if len({amaxes[name].shape for name in group}) > 1:
                raise CheckpointError(f"{group[0]} and {group[-1]} share a scale, but not their experts")
        # Groups may overlap: what they join has one scale. Those that do not are done in the first round.
        changed = True
        while changed:
            changed = False
            for group in groups:
                most = np.asarray(np.max([shared[name] for name in group], axis=0))
                changed |= any((shared[name] != most).any() for name in group)
                shared.update(dict.fromkeys(group, most))
        return shared

    def _state(self) -> dict[str, Any]:
        """What the result depends on, as JSON has it."""
        state = {
            "version": nvfp4sweep.__version__,
            "settings": asdict(self.settings) | {"layout": self.settings.layout.name},
            "importance": self.importance.identity(),
            "config": self.config,
            "files": {file: identity(self.source / file) for file in self.shards},
        }
        return json.loads(json.dumps(state))  # type: ignore[no-any-return]

    def _ignored(self, skipped: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
        """The layers with a matrix that is not quantized."""
        matrix = {tensor.name for tensor in self.checkpoint.tensors if len(tensor.shape) == 2}
        names = (name for group in skipped.values() for name in group if name in matrix)
        return tuple(sorted(name.removesuffix(".weight") for name in names if name.endswith(".weight")))

    # --- the two passes -------------------------------------------------------------------------------

    def _amaxes(self, folder: WorkFolder) -> dict[str, Array]:
        """The largest magnitude of each weight, or of each expert of a stack; none of those to skip."""
        kept = folder.interim()
        if kept is not None:  # by an interrupted call
            for tensor in self.plan.tensors:
                self.advance("amax", tensor)
            return {name: np.asarray(value, np.float32) for name, value in kept.items()}
        amaxes: dict[str, Array] = {}
        for tensor, weight in self._read_ahead(self.plan.tensors):
            try:
                with naming(tensor):
                    amaxes[tensor.name] = nvfp4sweep.global_amax(weight, batch_dims=batch_dims(tensor))
            except ValueError:
                if not self.settings.skip_bad:
                    raise
            self.advance("amax", tensor)
        folder.keep({name: value.tolist() for name, value in amaxes.items()})
        return amaxes

    def _read_ahead(self, tensors: Sequence[TensorInfo]) -> Iterator[tuple[TensorInfo, Array]]:
        """Each tensor with its values; the next is read meanwhile."""
        with ThreadPoolExecutor(1) as reader:
            coming = [reader.submit(self.checkpoint.read, tensor) for tensor in tensors[:1]]
            for i, tensor in enumerate(tensors):
                weight = coming.pop().result()
                coming += [
                    reader.submit(self.checkpoint.read, following) for following in tensors[i + 1 : i + 2]
                ]
                yield tensor, weight
                del weight

    def _entries(self, tensor: TensorInfo, chosen: dict[str, TensorInfo]) -> list[Entry]:
        if tensor.name not in chosen:
            return [Entry(tensor.name, tensor.dtype, tensor.shape, self.checkpoint.n_bytes(tensor))]
        with_input = self.settings.input_scale is not None
        return [
            entry
            for matrix in matrices(tensor, self.model_type)
            for entry in self.settings.layout.entries(matrix.module, matrix.shape, with_input)
        ]

    def _write_shard(
        self,
        path: Path,
        tensors: Sequence[TensorInfo],
        entries: Sequence[Entry],
        chosen: dict[str, TensorInfo],
        amaxes: dict[str, Array],
    ) -> None:
        weights = [tensor for tensor in tensors if tensor.name in chosen]
        if path.exists():  # by an interrupted call
            for tensor in weights:
                self.advance("quantize", tensor)
            return
        with open_shard(path, entries) as shard:
            for tensor in tensors:
                if tensor.name not in chosen:
                    shard.write(tensor.name, self.checkpoint.chunks(tensor))
            for tensor, weight in self._read_ahead(weights):
                importance = self.importance.of(tensor, self.model_type)
                for matrix in matrices(tensor, self.model_type):
                    for name, array in self._quantize(matrix, weight, amaxes[tensor.name], importance):
                        shard.write(name, [np.ascontiguousarray(array).tobytes()])
                self.advance("quantize", tensor)
                del weight

    def _quantize(
        self, matrix: Matrix, weight: Array, amaxes: Array, importance: Array | None
    ) -> Iterator[tuple[str, Array]]:
        one = () if matrix.expert is None else (matrix.expert,)
        amax = amaxes[one] * np.float32(E4M3_MAX / self.settings.scale_max)
        # A weight of zeros has no scale of its own, and runtimes divide by it.
        amax = np.float32(amax if amax > 0 else 1)
        weighing = None if importance is None else importance[one]
        found = self.engine(matrix.of(weight), amax, weighing, self.settings.min_code)
        arrays = self.settings.layout.arrays(
            matrix.module,
            found.packed,
            found.scale,
            float(found.global_scale),
            self.settings.input_scale,
        )
        yield from arrays.items()

    def _write_others(self, folder: Path, entries: dict[str, list[Entry]], ignored: tuple[str, ...]) -> None:
        """Everything but the weights; the configuration last."""
        copy_others(self.source, folder, set(self.shards))
        if len(self.shards) > 1 or (self.source / INDEX_NAME).exists():
            n_bytes = sum(entry.n_bytes for shard in entries.values() for entry in shard)
            weight_map = {entry.name: file for file, shard in entries.items() for entry in shard}
            write_json(folder / INDEX_NAME, {"metadata": {"total_size": n_bytes}, "weight_map": weight_map})
        layout, with_input = self.settings.layout, self.settings.input_scale is not None
        for name, content in layout.other_files(ignored, with_input).items():
            write_json(folder / name, content)
        quantization = {"quantization_config": layout.config(ignored, with_input)}
        write_json(folder / CONFIG_NAME, self.config | quantization)


class _Importances:
    """The importances of a file, by the names of tensors."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._checkpoint = None if path is None else Checkpoint(path)
        tensors = [] if self._checkpoint is None else self._checkpoint.tensors
        self._tensors = {tensor.name: tensor for tensor in tensors}

    def identity(self) -> list[int] | None:
        return None if self._path is None else identity(self._path)

    def of(self, tensor: TensorInfo, model_type: str) -> Array | None:
        """[K], or [E, K] for a stack.

        Raises:
            CheckpointError: it has another shape.
        """
        found = self._tensors.get(tensor.name)
        if found is None or self._checkpoint is None:
            return None
        columns = matrices(tensor, model_type)[0].shape[1]
        expected = (*tensor.shape[:-2], columns)
        if found.shape != expected:
            raise CheckpointError(
                f"the importance of {tensor.name} in {self._path} has the shape {found.shape}, "
                f"and must have {expected}"
            )
        return self._checkpoint.read(found)
