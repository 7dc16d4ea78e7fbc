"""What the kernels of each objective are called with: ranges of blocks of a matrix, and tables.

A search is a function that runs one task, and the tasks. Each kernel returns the largest bit pattern of any
|w| that it met. The kernels for importances and Hessians are compiled when one is first needed.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nvfp4sweep import cpu_kernels, formats
from nvfp4sweep.objectives import hessian_bounds, normalised_hessian
from nvfp4sweep.window import (
    LEAST_FLOAT32_SCALE,
    LEAST_GLOBAL_AMAX,
    importance_margins,
    last_unhalved_code,
    window,
)

BLOCKS_A_TASK = 1 << 15
ELEMENTS_A_SLAB = 1 << 20

Search = tuple[Callable[[Any], int], Iterator[Any]]
#: amax, code and error: flat, one entry a block, or empty where not asked for.
Outputs = tuple[npt.NDArray[Any], ...]


class Slab(NamedTuple):
    """A C-contiguous piece of a matrix [outer, length, inner]: whole rows, or a part of one."""

    flat: npt.NDArray[Any]
    rows: slice
    part: slice
    blocks_before: int

    @property
    def bits(self) -> npt.NDArray[Any]:
        return as_bits(self.flat)


def slabs(matrix: npt.NDArray[Any], block_size: int) -> Iterator[Slab]:
    """Pieces of whole blocks, in order; copies only where it must."""
    outer, length, inner = matrix.shape
    if matrix.flags.c_contiguous and matrix.flags.aligned:
        yield Slab(matrix.reshape(-1), slice(0, outer), slice(0, length), 0)
        return
    rows = max(1, ELEMENTS_A_SLAB // max(1, length * inner))
    depth = max(1, ELEMENTS_A_SLAB // max(1, block_size * inner)) * block_size
    before = 0
    for row in range(0, outer, rows):
        for top in range(0, length, depth):
            chosen = slice(row, min(outer, row + rows)), slice(top, min(length, top + depth))
            flat = matrix[chosen].copy().reshape(-1)
            yield Slab(flat, *chosen, before)
            before += flat.size // block_size


def block_ranges(matrix: npt.NDArray[Any], block_size: int) -> Iterator[tuple[Slab, int, int]]:
    """(slab, first block, last block) for tasks of bounded size."""
    for slab in slabs(matrix, block_size):
        n_blocks = slab.flat.size // block_size
        for start in range(0, n_blocks, BLOCKS_A_TASK):
            yield slab, start, min(n_blocks, start + BLOCKS_A_TASK)


# --- the three objectives -------------------------------------------------------------------------


def squared(
    matrix: npt.NDArray[Any], global_amax: np.float32, block_size: int, min_code: int, outputs: Outputs
) -> Search:
    tables = _tables(global_amax)
    bounds, unit = window(block_size), _unit(global_amax)
    # M times the first two are the E4M3 values between which the window lies.
    factors = _float32(
        bounds.lower / unit, bounds.upper / unit, bounds.relative_margin, bounds.absolute_margin
    )

    def run(task: tuple[Slab, int, int]) -> int:
        slab, start, stop = task
        return int(
            cpu_kernels.sweep_range(
                slab.bits,
                is_float16(matrix),
                block_size,
                matrix.shape[2],
                start,
                stop,
                tables,
                factors,
                np.int32(min_code),
                np.int32(last_unhalved_code(min_code)),
                not global_amax >= LEAST_GLOBAL_AMAX,
                *(output[slab.blocks_before :] for output in outputs),
            )
        )

    return run, block_ranges(matrix, block_size)


def with_importance(
    matrix: npt.NDArray[Any],
    global_amax: np.float32,
    block_size: int,
    min_code: int,
    outputs: Outputs,
    importance: npt.NDArray[np.float32],
) -> Search:
    from nvfp4sweep import cpu_importance

    tables = _tables(global_amax)
    relative_margin, absolute_margin = importance_margins(block_size)
    factors = _float32(
        window(block_size).upper / _unit(global_amax),
        relative_margin,
        # Twice: an importance that underflows is off by 2^-126 itself.
        2 * absolute_margin * cpu_importance.LARGEST_WEIGHT,
    )

    def run(task: tuple[Slab, slice, slice]) -> int:
        slab, rows, blocks = task
        return int(
            cpu_importance.sweep_range(
                *_by_width(slab.bits),
                is_float16(matrix),
                importance[slab.rows, slab.part],
                block_size,
                rows.start,
                rows.stop,
                blocks.start,
                blocks.stop,
                tables,
                factors,
                np.int32(min_code),
                np.int32(last_unhalved_code(min_code)),
                np.int32(_floor(tables, min_code)),
                not global_amax >= LEAST_GLOBAL_AMAX,
                *(output[slab.blocks_before :] for output in outputs),
            )
        )

    def tasks() -> Iterator[tuple[Slab, slice, slice]]:
        for slab in slabs(matrix, block_size):
            n_rows = slab.rows.stop - slab.rows.start
            n_blocks = (slab.part.stop - slab.part.start) // block_size * matrix.shape[2]
            for blocks in _parts(n_blocks, BLOCKS_A_TASK):
                for rows in _parts(n_rows, max(1, BLOCKS_A_TASK // n_blocks)):
                    yield slab, rows, blocks

    return run, tasks()


class _HessianTables(NamedTuple):
    """Of the blocks along an axis: what the kernel needs beside the Hessians themselves.

    Up to `exact_sums` they are of normalised Hessians.
    """

    coefficients: npt.NDArray[np.float32]  # [blocks, 136]: H[i, i], and 2 H[i, j] for j < i
    sums: npt.NDArray[np.float32]  # [blocks, 16]: c of theorem 10
    mu: npt.NDArray[np.float32]  # [blocks]
    reach: npt.NDArray[np.float32]  # [blocks]: 1 / (6 sqrt(sum c')), of theorem 12
    exact_sums: npt.NDArray[np.float64]  # [blocks, 16]: c of the Hessians as they are


def _hessian_tables(hessian: npt.NDArray[np.float32]) -> _HessianTables:
    exact_sums = np.abs(hessian).sum(axis=-1, dtype=np.float64) * (1 + 2.0**-48)
    scaled = normalised_hessian(hessian)
    sums, mu = hessian_bounds(scaled)
    i, j = np.tril_indices(formats.BLOCK_SIZE)
    coefficients = scaled[:, i, j] * np.where(i == j, 1, 2).astype(np.float32)
    total = sums.sum(axis=1, dtype=np.float64) * (1 + np.maximum(-mu, 0))
    reach = ((1 - 2.0**-20) / (6 * np.sqrt(total))).astype(np.float32)
    return _HessianTables(np.ascontiguousarray(coefficients), sums, mu, reach, exact_sums)


def with_hessian(
    matrix: npt.NDArray[Any],
    global_amax: np.float32,
    min_code: int,
    outputs: Outputs,
    hessian: npt.NDArray[np.float32],
) -> Search:
    from nvfp4sweep import cpu_hessian
    from nvfp4sweep.cpu_hessian_codes import LANES

    tables, unit = _tables(global_amax), _unit(global_amax)
    hessian_tables = _hessian_tables(hessian)
    # M times the first is absmax's E4M3 value, times the second that from which all elements are 0.
    factors = _float32(1 / (6 * unit), (1 + 2.0**-20) * 4 / unit, 1 / unit)
    _, length, inner = matrix.shape
    size = formats.BLOCK_SIZE

    def run(task: tuple[npt.NDArray[Any], int, int, slice, slice]) -> int:
        bits, row, position, lanes, positions = task
        there = slice(position + positions.start, position + positions.stop)
        return int(
            cpu_hessian.sweep_range(
                *_by_width(bits[:, size * positions.start : size * positions.stop]),
                is_float16(matrix),
                lanes.start,
                lanes.stop,
                hessian[there],
                *(table[there] for table in hessian_tables),
                tables,
                factors,
                np.int32(min_code),
                np.int32(_floor(tables, min_code)),
                not global_amax >= LEAST_GLOBAL_AMAX,
                (row * (length // size) + there.start) * inner,
                length // size * inner,
                *outputs,
            )
        )

    def pieces() -> Iterator[tuple[npt.NDArray[Any], int, int]]:
        """[rows, part, inner] with the first row and the first position along `length`."""
        if matrix.flags.aligned:
            yield as_bits(matrix), 0, 0
            return
        for slab in slabs(matrix, size):
            shape = slab.rows.stop - slab.rows.start, slab.part.stop - slab.part.start, inner
            yield slab.bits.reshape(shape), slab.rows.start, slab.part.start // size

    def tasks() -> Iterator[tuple[npt.NDArray[Any], int, int, slice, slice]]:
        positions_a_task = BLOCKS_A_TASK // LANES
        for bits, row, position in pieces():
            for positions in _parts(bits.shape[1] // size, positions_a_task):
                tiles = max(1, positions_a_task // (positions.stop - positions.start))
                for lanes in _parts(bits.shape[0] * inner, tiles * LANES):
                    yield bits, row, position, lanes, positions

    return run, tasks()


# --- what they share ------------------------------------------------------------------------------


def _parts(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(length, start + step)) for start in range(0, length, step))


def _tables(global_amax: np.float32) -> npt.NDArray[np.float32]:
    """[scale, -scale, amax] by code: float32 [3, 253]. A window may reach 126 codes beyond the last."""
    amax = np.pad(formats.amax_by_code(global_amax), (0, formats.MAX_CODE), mode="edge")
    scale = amax / np.float32(formats.E2M1_MAX)
    return np.stack([scale, -scale, amax])


def _unit(global_amax: np.float32) -> float:
    """The scale of E4M3's 1."""
    return float(global_amax) / formats.NVFP4_MAX if global_amax >= LEAST_GLOBAL_AMAX else 1.0


def _floor(tables: npt.NDArray[np.float32], min_code: int) -> int:
    """The lowest code that float32 errors may be computed for; 127 where there is none."""
    scales = tables[0, : formats.MAX_CODE + 1]
    return max(min_code, int(np.searchsorted(scales, np.float32(LEAST_FLOAT32_SCALE))))


def _float32(*values: float) -> tuple[np.float32, ...]:
    return tuple(map(np.float32, values))


def is_float16(array: npt.NDArray[Any]) -> bool:
    return array.dtype == np.float16


def as_bits(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.view(np.uint16 if array.itemsize == 2 else np.uint32)


def _by_width(bits: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint16]]:
    """The bits of a weight as 32 and as 16 bits wide, one of them empty: so one kernel takes both."""
    empty = (0,) * bits.ndim
    if bits.itemsize == 2:
        return np.empty(empty, np.uint32), bits
    return bits, np.empty(empty, np.uint16)
