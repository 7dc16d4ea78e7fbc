"""The CPU engine: threads take ranges of blocks of a matrix to the Numba kernels, which release the GIL."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from nvfp4sweep import cpu_kernels, cpu_searches, formats


def sweep_matrix(
    matrix: npt.NDArray[Any],
    global_amax: np.float32,
    block_size: int,
    min_code: int,
    amax: npt.NDArray[np.float32] | None = None,
    code: npt.NDArray[np.uint8] | None = None,
    error: npt.NDArray[np.float32] | None = None,
    importance: npt.NDArray[np.float32] | None = None,
    hessian: npt.NDArray[np.float32] | None = None,
) -> np.float32:
    """Find the best code of every block of one matrix and write the outputs that are given.

    Args:
        matrix: float32, float16 or bfloat16 [outer, length, inner], blocks along `length`. Parts
            that are not C-contiguous are copied a slab at a time.
        importance: float32 of the matrix's shape, of any strides.
        hessian: float32 [length / 16, 16, 16], C-contiguous, symmetric, never all zeros.
        amax, code, error: flat C-contiguous outputs, one entry a block, in the order
            [outer, length / block_size, inner].

    Returns:
        The largest |w|; infinite or NaN if an element was, and then the outputs mean nothing.
    """
    outputs = (
        np.empty(0, np.float32) if amax is None else amax,
        np.empty(0, np.uint8) if code is None else code,
        np.empty(0, np.float32) if error is None else error,
    )
    if hessian is not None:
        search = cpu_searches.with_hessian(matrix, global_amax, min_code, outputs, hessian)
    elif importance is not None:
        search = cpu_searches.with_importance(matrix, global_amax, block_size, min_code, outputs, importance)
    else:
        search = cpu_searches.squared(matrix, global_amax, block_size, min_code, outputs)
    return _from_bits(_largest(*search, matrix.size))


def pack_matrix(
    matrix: npt.NDArray[Any],
    global_amax: np.float32,
    block_size: int,
    code: npt.NDArray[np.uint8],
    packed: npt.NDArray[np.uint8],
) -> None:
    """Write the E2M1 codes of a matrix under the flat E4M3 codes of its blocks (packing.encode)."""
    scales = formats.scale_by_code(global_amax)

    def run(task: tuple[cpu_searches.Slab, int, int]) -> int:
        slab, start, stop = task
        before = slab.blocks_before
        cpu_kernels.pack_range(
            slab.bits, cpu_searches.is_float16(matrix), block_size, matrix.shape[2], start, stop, scales,
            code[before:], packed[before * block_size // 2 :],
        )  # fmt: skip
        return 0

    _largest(run, cpu_searches.block_ranges(matrix, block_size), matrix.size)


def absolute_maximum(matrix: npt.NDArray[Any]) -> np.float32:
    """The largest |w| of [outer, length, inner]; infinite or NaN if an element is; 0 if empty."""
    mask = np.uint32(0x7FFF if matrix.itemsize == 2 else 0x7FFFFFFF)

    def tasks() -> Iterator[npt.NDArray[Any]]:
        for slab in cpu_searches.slabs(matrix, 1):
            for start in range(0, slab.flat.size, cpu_searches.ELEMENTS_A_SLAB):
                yield slab.bits[start : start + cpu_searches.ELEMENTS_A_SLAB]

    largest = _largest(lambda bits: int(cpu_kernels.largest_bits(bits, mask)), tasks(), matrix.size)
    if matrix.itemsize == 2:
        return np.float32(np.array(largest, np.uint16).view(matrix.dtype)[()])
    return _from_bits(largest)


def _largest(run: Callable[[Any], int], tasks: Iterator[Any], n_elements: int) -> int:
    workers = min(n_cores(), n_elements // cpu_searches.ELEMENTS_A_SLAB)
    if workers <= 1:
        return max(map(run, tasks), default=0)
    largest = 0
    # Not pool.map: it would take all tasks, with the slabs that they hold, before the first is done.
    pending: deque[Future[int]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for task in tasks:
            if len(pending) > workers:
                largest = max(largest, pending.popleft().result())
            pending.append(pool.submit(run, task))
        return max([largest, *(future.result() for future in pending)])


def n_cores() -> int:
    """The cores that this process may use, where the platform can tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _from_bits(bits: int) -> np.float32:
    return np.float32(np.array(bits, np.uint32).view(np.float32)[()])
