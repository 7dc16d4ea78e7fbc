"""Read, compute and use: three steps of each item, which go on at the same time, in order."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")
Result = TypeVar("Result")


def ahead(
    items: Sequence[Item],
    read: Callable[[Item], Value],
    compute: Callable[[Item, Callable[[], Value]], Result],
    workers: int = 1,
) -> Iterator[Result]:
    """compute(item, get) of each item, in order, worked out ahead of the caller; get() waits for read(item).

    They begin in that order, so that one may wait for those of earlier items. One thread reads, `workers`
    threads compute. In memory are at most `workers` + 1 values, and as many results that wait for the caller.
    What a thread raises, the caller gets in place of the result.
    """
    values = threading.Semaphore(workers + 1)

    def guarded_read(item: Item) -> Value:
        values.acquire()
        return read(item)

    def guarded_compute(item: Item, coming: Future[Value]) -> Result:
        try:
            return compute(item, coming.result)
        finally:
            values.release()

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(workers) as computers:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                if len(pending) == workers + 1:
                    yield pending.popleft().result()
                pending.append(computers.submit(guarded_compute, item, reader.submit(guarded_read, item)))
            while pending:
                yield pending.popleft().result()
        finally:  # of no use where all went well
            values.release(len(pending) + 1)  # nobody waits for what nobody computes
            computers.shutdown(wait=False, cancel_futures=True)
            reader.shutdown(wait=False, cancel_futures=True)
