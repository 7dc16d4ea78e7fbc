"""The CPU engine: threads take ranges of blocks of a matrix to the Numba kernels, which release the GIL."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from nvfp4sweep import cpu_kernels as kernels
from nvfp4sweep import formats
from nvfp4sweep.window import LEAST_GLOBAL_AMAX, last_unhalved_code, window

_BLOCKS_A_TASK = 1 << 15
_ELEMENTS_A_SLAB = 1 << 20

_NOTHING_FLOAT32 = np.empty(0, np.float32)
_NOTHING_UINT8 = np.empty(0, np.uint8)


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
        amax, code, error: flat C-contiguous outputs, one entry a block, in the order
            [outer, length / block_size, inner].

    Returns:
        The largest |w|; infinite or NaN if an element was, and then the outputs mean nothing.
    """
    if importance is not None or hessian is not None:
        raise NotImplementedError
    tables = _tables(global_amax)
    factors = _factors(global_amax, block_size)
    outputs = (
        _NOTHING_FLOAT32 if amax is None else amax,
        _NOTHING_UINT8 if code is None else code,
        _NOTHING_FLOAT32 if error is None else error,
    )

    def run(task: tuple[npt.NDArray[Any], int, int, int]) -> int:
        bits, offset, start, stop = task
        return int(
            kernels.sweep_range(
                bits,
                _is_float16(matrix),
                block_size,
                matrix.shape[2],
                start,
                stop,
                tables,
                factors,
                np.int32(min_code),
                np.int32(last_unhalved_code(min_code)),
                not global_amax >= LEAST_GLOBAL_AMAX,
                *(output[offset:] for output in outputs),
            )
        )

    return _from_bits(_largest(run, _block_ranges(matrix, block_size), matrix.size))


def pack_matrix(
    matrix: npt.NDArray[Any],
    global_amax: np.float32,
    block_size: int,
    code: npt.NDArray[np.uint8],
    packed: npt.NDArray[np.uint8],
) -> None:
    """Write the E2M1 codes of a matrix under the flat E4M3 codes of its blocks (packing.encode)."""
    scales = formats.scale_by_code(global_amax)

    def run(task: tuple[npt.NDArray[Any], int, int, int]) -> int:
        bits, offset, start, stop = task
        kernels.pack_range(
            bits, _is_float16(matrix), block_size, matrix.shape[2], start, stop, scales,
            code[offset:], packed[offset * block_size // 2 :],
        )  # fmt: skip
        return 0

    _largest(run, _block_ranges(matrix, block_size), matrix.size)


def absolute_maximum(matrix: npt.NDArray[Any]) -> np.float32:
    """The largest |w| of [outer, length, inner]; infinite or NaN if an element is; 0 if empty."""
    mask = np.uint32(0x7FFF if matrix.itemsize == 2 else 0x7FFFFFFF)

    def tasks() -> Iterator[npt.NDArray[Any]]:
        for slab in _contiguous_slabs(matrix, 1):
            for start in range(0, slab.size, _ELEMENTS_A_SLAB):
                yield _bits(slab)[start : start + _ELEMENTS_A_SLAB]

    largest = _largest(lambda bits: int(kernels.largest_bits(bits, mask)), tasks(), matrix.size)
    if matrix.itemsize == 2:
        return np.float32(np.array(largest, np.uint16).view(matrix.dtype)[()])
    return _from_bits(largest)


def _tables(global_amax: np.float32) -> npt.NDArray[np.float32]:
    """[scale, -scale, amax] by code: float32 [3, 253]. A window may reach 126 codes beyond the last."""
    amax = np.pad(formats.amax_by_code(global_amax), (0, formats.MAX_CODE), mode="edge")
    scale = amax / np.float32(formats.E2M1_MAX)
    return np.stack([scale, -scale, amax])


def _factors(global_amax: np.float32, block_size: int) -> tuple[np.float32, ...]:
    bounds = window(block_size)
    # M times these are the E4M3 values between which the window lies.
    unit = float(global_amax) / formats.NVFP4_MAX if global_amax >= LEAST_GLOBAL_AMAX else 1.0
    return (
        np.float32(bounds.lower / unit),
        np.float32(bounds.upper / unit),
        np.float32(bounds.relative_margin),
        np.float32(bounds.absolute_margin),
    )


def _largest(run: Callable[[Any], int], tasks: Iterator[Any], n_elements: int) -> int:
    workers = min(_n_cores(), n_elements // _ELEMENTS_A_SLAB)
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


def _block_ranges(
    matrix: npt.NDArray[Any], block_size: int
) -> Iterator[tuple[npt.NDArray[Any], int, int, int]]:
    """(bits of a slab, blocks before it, first block, last block) for tasks of bounded size."""
    offset = 0
    for slab in _contiguous_slabs(matrix, block_size):
        n_blocks = slab.size // block_size
        for start in range(0, n_blocks, _BLOCKS_A_TASK):
            yield _bits(slab), offset, start, min(n_blocks, start + _BLOCKS_A_TASK)
        offset += n_blocks


def _n_cores() -> int:
    """The cores that this process may use, where the platform can tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _contiguous_slabs(matrix: npt.NDArray[Any], block_size: int) -> Iterator[npt.NDArray[Any]]:
    """Flat C-contiguous pieces of [outer, length, inner], whole blocks in order; copies only if it must."""
    if matrix.flags.c_contiguous and matrix.flags.aligned:
        yield matrix.reshape(-1)
        return
    outer, length, inner = matrix.shape
    rows = max(1, _ELEMENTS_A_SLAB // max(1, length * inner))
    depth = max(1, _ELEMENTS_A_SLAB // max(1, block_size * inner)) * block_size
    for start in range(0, outer, rows):
        for top in range(0, length, depth):
            yield matrix[start : start + rows, top : top + depth].copy().reshape(-1)


def _is_float16(array: npt.NDArray[Any]) -> bool:
    return array.dtype == np.float16


def _bits(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.view(np.uint16 if array.itemsize == 2 else np.uint32)


def _from_bits(bits: int) -> np.float32:
    return np.float32(np.array(bits, np.uint32).view(np.float32)[()])
