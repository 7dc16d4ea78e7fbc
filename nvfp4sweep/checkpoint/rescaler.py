"""One global scale for layers that runtimes fuse, in a checkpoint where theirs differ."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from nvfp4sweep.checkpoint.folders import CONFIG_NAME, copy_others
from nvfp4sweep.checkpoint.plan import shared_groups
from nvfp4sweep.checkpoint.reader import INDEX_NAME, CheckpointError, TensorInfo
from nvfp4sweep.checkpoint.rewriter import (
    Advance,
    Change,
    Entries,
    open_sound,
    rewrite,
    unchanged,
    work_folder,
)
from nvfp4sweep.checkpoint.settings import check_patterns
from nvfp4sweep.checkpoint.verifier import Module, Verifier
from nvfp4sweep.formats import BLOCK_SIZE, E2M1_VALUES, E4M3_VALUES, MAX_CODE, MIN_CODE
from nvfp4sweep.problem import check_min_code

Codes = npt.NDArray[np.uint8]

#: (2 q)^2 of the two E2M1 values q in a byte, summed.
_SQUARES = np.square(2 * E2M1_VALUES[np.arange(16) & 7]).astype(np.uint16)
_SQUARES_OF_BYTES = (_SQUARES[:, None] + _SQUARES).reshape(-1)
_E4M3_MIDPOINTS = (E4M3_VALUES[:-1] + E4M3_VALUES[1:]) / 2


@dataclass(frozen=True)
class Rescaled:
    """A member of a group whose scales differed, and what the common one costs it.

    Attributes:
        module: its name.
        group: the names of all members.
        ratio: its multiplier over the new one, at most 1.
        blocks: how many it has.
        exact: how many of their scales, block scale times global scale, are what they were.
        error: the squared error that the others add, as a part of the sum of all squared values.
    """

    module: str
    group: tuple[str, ...]
    ratio: float
    blocks: int
    exact: int
    error: float


def rescale_groups(
    source: Path,
    target: Path,
    *,
    groups: Sequence[str] = (),
    min_code: int = MIN_CODE,
    advance: Advance = lambda tensor: None,
) -> tuple[Rescaled, ...]:
    """Give the members of each group one global scale and one input scale, where they differ.

    It is the largest multiplier, so no block scale grows. Each block scale of the other members becomes
    the E4M3 value nearest to what it was, exact ties to the even code. All other bytes stay; codes, the
    configuration, and what is no tensor, too. If nothing differs, nothing is written. Whoever has the
    original weights should quantize them again: then blocks choose among the scales that there are.

    An interrupted call leaves a folder `target`.partial, from which the same call goes on. In memory are
    the block scales of one tensor.

    Args:
        source: a folder with an NVFP4 checkpoint of either layout, whoever made it.
        target: a folder that is not there yet, or is empty.
        groups: regular expressions: weights whose name, "module.weight", matches one, with the same text
            in its parentheses, share a scale, besides those that plan.FUSED_LAYERS names.
        min_code: the lowest code that a block scale may become.
        advance: told of each tensor that was written.

    Returns:
        All members of the groups that differed.

    Raises:
        CheckpointError: `source` is broken, or `target` is in the way.
        ValueError: an argument is not what it must be.
        OSError: the disk refuses.
    """
    check_patterns("groups", groups)
    check_min_code(min_code)
    verifier, layout = open_sound(source, target)
    largest = min if layout.reciprocal else max
    changes: dict[str, Change] = {}
    members: list[_Member] = []
    for names in shared_groups([f"{name}.weight" for name in verifier.modules], groups):
        group = tuple(name.removesuffix(".weight") for name in names)
        modules = [verifier.modules[name] for name in group]
        before = len(changes)
        scales = _unify(verifier, (module.global_scale for module in modules), largest, changes)
        _unify(verifier, (module.input_scale for module in modules), largest, changes)
        if len(changes) > before:
            pairs = zip(modules, scales, strict=True)
            members += [_Member(verifier, m, group, old, new, min_code) for m, (old, new) in pairs]
    for member in members:
        changes |= member.changes()
    if not members:
        return ()
    arguments = {"command": "rescale-groups", "groups": list(groups), "min_code": min_code}
    folder = work_folder(verifier, target, arguments)
    rescaled = tuple(member.cost() for member in members)

    def write_others(folder: Path, entries: Entries) -> None:
        copy_others(source, folder, set(entries))
        for name in (INDEX_NAME, CONFIG_NAME):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)

    rewrite(verifier.checkpoint, folder, changes, write_others, advance)
    return rescaled


def rounded_codes(old: float, new: float, min_code: int = MIN_CODE) -> Codes:
    """For each E4M3 code, 0 .. 126, the one whose value times `new` is nearest to its value times `old`.

    Ties go to the even code; none is below `min_code`. Exact: products of float32 and at most five bits
    are float64 values. (ml_dtypes rounds float64 twice on its way to float8_e4m3fn.)
    """
    edges = _E4M3_MIDPOINTS * new
    wanted = E4M3_VALUES * old
    code = np.searchsorted(edges, wanted)
    tie = edges[np.minimum(code, len(edges) - 1)] == wanted
    rounded: Codes = np.maximum(code + (tie & (code % 2 == 1)), min_code).astype(np.uint8)
    return rounded


def _unify(
    verifier: Verifier,
    tensors: Iterable[TensorInfo | None],
    largest: Callable[[Iterable[np.float32]], np.float32],
    changes: dict[str, Change],
) -> list[tuple[np.float32, np.float32]]:
    """Note the changes of these scalars, where there are any; what each is, and what it becomes."""
    scalars = [(tensor, verifier.scalar(tensor)) for tensor in tensors if tensor is not None]
    if not scalars:
        return []
    new = largest(value for _, value in scalars)
    for tensor, old in scalars:
        if old != new:
            changes[tensor.name] = Change(unchanged(verifier.checkpoint, tensor), new.tobytes)
    return [(old, new) for _, old in scalars]


class _Member:
    """A module whose stored global scale becomes another, or stays.

    Raises:
        CheckpointError: it becomes another, and there are block scales that are no scales.
    """

    def __init__(
        self,
        verifier: Verifier,
        module: Module,
        group: tuple[str, ...],
        old: np.float32,
        new: np.float32,
        min_code: int,
    ) -> None:
        self._verifier, self._name, self._group = verifier, module.name, group
        # They are there: open_sound has looked.
        self._packed, self._scale = cast(TensorInfo, module.packed), cast(TensorInfo, module.scale)
        self._changes = bool(old != new)
        # A divisor that shrinks is a multiplier that grows.
        divides = module.layout.reciprocal
        self._old, self._new = (float(new), float(old)) if divides else (float(old), float(new))
        self._code = rounded_codes(self._old, self._new, min_code)
        if self._changes:
            for problem in verifier.scale_problems(module):
                raise CheckpointError(str(problem))

    def changes(self) -> dict[str, Change]:
        if not self._changes:
            return {}
        entry = unchanged(self._verifier.checkpoint, self._scale)
        return {self._scale.name: Change(entry, self._rounded)}

    def _rounded(self) -> bytes:
        return self._code[self._verifier.bytes_of(self._scale)].tobytes()

    def cost(self) -> Rescaled:
        ratio, blocks = self._old / self._new, self._scale.size
        if not self._changes:
            return Rescaled(self._name, self._group, ratio, blocks, blocks, 0.0)
        stored = self._verifier.bytes_of(self._scale)
        squares = np.zeros(MAX_CODE + 1)  # of E2M1 values, by the codes of their blocks
        start = 0
        for chunk in self._verifier.checkpoint.chunks(self._packed):  # of whole blocks
            found = _SQUARES_OF_BYTES[np.frombuffer(chunk, np.uint8)].reshape(-1, BLOCK_SIZE // 2).sum(axis=1)
            stop = start + len(found)
            squares += np.bincount(stored[start:stop], found, MAX_CODE + 1)
            start = stop
        before, after = E4M3_VALUES * self._old, E4M3_VALUES[self._code] * self._new
        exact = np.bincount(stored, minlength=MAX_CODE + 1)[before == after].sum()
        total = float(squares @ np.square(before))
        error = float(squares @ np.square(after - before)) / total if total else 0.0
        return Rescaled(self._name, self._group, ratio, blocks, int(exact), error)
