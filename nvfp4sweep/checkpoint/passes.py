"""The two passes over each shard: the order in which its weights are read, and what the second must know."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from nvfp4sweep.checkpoint.reader import TensorInfo

Array = npt.NDArray[Any]
Item = TypeVar("Item")

STAGES = AMAX, QUANTIZE = ("amax", "quantize")


class Step(NamedTuple):
    """What is done with a weight once it is read: one of STAGES."""

    stage: str
    tensor: TensorInfo


def by_turns(shards: Sequence[Sequence[Item]]) -> Iterator[tuple[str, Item]]:
    """A shard's weights to be quantized, by turns with those of the next for their amaxes."""
    for shard, following in pairwise([(), *shards, ()]):
        for weight, coming in zip_longest(shard, following):
            if weight is not None:
                yield QUANTIZE, weight
            if coming is not None:
                yield AMAX, coming


def steps(shards: Sequence[Sequence[TensorInfo]], known: Collection[str]) -> list[Step]:
    """What is to be done with these weights; not the amaxes of those that are known."""
    return [
        Step(stage, tensor)
        for stage, tensor in by_turns(shards)
        if stage == QUANTIZE or tensor.name not in known
    ]


class Amaxes:
    """The largest magnitudes of weights, or of the experts in them; some threads find what others wait for.

    Args:
        groups: by name, the names of the weights that share its scale, its own among them.
        known: by name, what was found before.
        weights: those that are to be found or are known; others do not count in their groups.
    """

    def __init__(
        self, groups: Mapping[str, Sequence[str]], known: Mapping[str, Array], weights: Collection[str]
    ) -> None:
        self._groups = groups
        self._found: dict[str, Future[Array]] = {name: Future() for name in {*weights, *known}}
        for name, amax in known.items():
            self._found[name].set_result(amax)

    def find(self, name: str, search: Callable[[], Array]) -> None:
        """What `search` returns or raises is this weight's. Once for each that is not known."""
        try:
            self._found[name].set_result(search())
        except BaseException as error:
            self._found[name].set_exception(error)
            raise

    def shared(self, name: str) -> Array:
        """The largest of the weight's group. Waits for those that are being found."""
        members = [self._found[member] for member in self._groups[name] if member in self._found]
        return np.asarray(np.max([member.result() for member in members], axis=0))
