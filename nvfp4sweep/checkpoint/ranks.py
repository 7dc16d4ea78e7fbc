"""Several processes that make one checkpoint: what they must tell each other."""

import heapq
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from nvfp4sweep.checkpoint.reader import CheckpointError

Item = TypeVar("Item")
Found = TypeVar("Found")


class Ranks(Protocol):
    """The processes of a job, of which this one has the number `rank` of 0 .. `size` - 1."""

    rank: int
    size: int

    def gather(self, mine: Any) -> list[Any]:
        """What each process gave, by rank; it waits for all of them. CheckpointError: one has ended."""


class Alone:
    """The only process."""

    rank = 0
    size = 1

    def gather(self, mine: Any) -> list[Any]:
        return [mine]


ALONE = Alone()


def together(ranks: Ranks, work: Callable[[], Found]) -> list[Found]:
    """What `work` returned to each process. If it failed in one, it has failed in all of them.

    Raises:
        Exception: what `work` raised here.
        CheckpointError: it failed elsewhere.
    """
    failure: Exception | None = None
    found: Found | None = None
    try:
        found = work()
    except Exception as error:
        failure = error
    outcomes = ranks.gather((found, None if failure is None else str(failure)))
    failed = [(rank, message) for rank, (_, message) in enumerate(outcomes) if message is not None]
    if failed:
        part(ranks)
        rank, message = failed[0]
        raise failure or CheckpointError(f"rank {rank} of {ranks.size} failed: {message}")
    return [found for found, _ in outcomes]


def part(ranks: Ranks) -> None:
    """Before processes end: one that ends too early may take what others were about to get from it."""
    with suppress(CheckpointError):  # of those that have ended meanwhile
        ranks.gather(None)


def share(items: Sequence[Item], size: Callable[[Item], int], ranks: Ranks) -> list[Item]:
    """This process's part of the items."""
    return shares(items, size, ranks.size)[ranks.rank]


def shares(items: Sequence[Item], size: Callable[[Item], int], ranks: int) -> list[list[Item]]:
    """The items of each rank, in their order: the largest go first, each to whoever has least."""
    sizes = [size(item) for item in items]
    least = [(0, rank) for rank in range(ranks)]
    owners = [0] * len(items)
    for i in sorted(range(len(items)), key=lambda i: (-sizes[i], i)):
        load, owners[i] = least[0]
        heapq.heapreplace(least, (load + sizes[i], owners[i]))
    found: list[list[Item]] = [[] for _ in range(ranks)]
    for item, owner in zip(items, owners, strict=True):
        found[owner].append(item)
    return found
