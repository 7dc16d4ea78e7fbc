"""Read, compute and use: three steps of each item, which go on at the same time, in order."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")
Result = TypeVar("Result")

READERS = 2  # one waits for the disk while the other copies what the system has in memory


def ahead(
    items: Sequence[Item],
    read: Callable[[Item], Value],
    compute: Callable[[Item, Callable[[], Value]], Result],
    workers: int = 1,
) -> Iterator[Result]:
    """compute(item, get) of each item, in order, worked out ahead of the caller; get() waits for read(item).

    They begin in that order, so that one may wait for those of earlier items. Two threads read, `workers`
    threads compute. In memory are at most `workers` + 1 items: values, or results that wait for the caller.
    What a thread raises, the caller gets in place of the result.
    """
    with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(workers) as computers:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                if len(pending) == workers + 1:
                    yield pending.popleft().result()
                pending.append(computers.submit(compute, item, readers.submit(read, item).result))
            while pending:
                yield pending.popleft().result()
        finally:  # of no use where all went well
            computers.shutdown(wait=False, cancel_futures=True)
            readers.shutdown(wait=False, cancel_futures=True)
