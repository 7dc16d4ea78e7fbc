"""Several processes that make one checkpoint: what they must tell each other."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from nvfp4sweep.checkpoint.reader import CheckpointError

Item = TypeVar("Item")
Found = TypeVar("Found")


class Ranks(Protocol):
    """The processes of a job, of which this one has the number `rank` of 0 .. `size` - 1."""

    rank: int
    size: int

    def gather(self, mine: Any) -> list[Any]:
        """What each process gave, by rank; it waits for all of them."""


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
    if failure is not None:
        raise failure
    for rank, (_, message) in enumerate(outcomes):
        if message is not None:
            raise CheckpointError(f"rank {rank} of {ranks.size} failed: {message}")
    return [found for found, _ in outcomes]


def share(items: Sequence[Item], size: Callable[[Item], int], ranks: Ranks) -> list[Item]:
    """This process's part of the items: the largest go first, each to whoever has least."""
    loads = [0] * ranks.size
    mine = set()
    for i in sorted(range(len(items)), key=lambda i: (-size(items[i]), i)):
        least = loads.index(min(loads))
        loads[least] += size(items[i])
        if least == ranks.rank:
            mine.add(i)
    return [item for i, item in enumerate(items) if i in mine]
