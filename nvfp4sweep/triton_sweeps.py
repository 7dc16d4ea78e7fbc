"""The launches of the sweeps, one for each objective: how blocks lie, and how a kernel is built for them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from nvfp4sweep import triton_hessian, triton_hessian_tables, triton_importance, triton_kernels
from nvfp4sweep.problem import Problem
from nvfp4sweep.triton_build import Buffer, Launch
from nvfp4sweep.window import (
    FIRST_NORMAL_CODE,
    importance_margins,
    last_unhalved_code,
    most_candidates,
    window,
)

# Block sizes whose whole block fits in a thread's registers; others are compared exactly at every code.
_SCREENED_BLOCK_SIZES = (16, 32)


class _Tuning(NamedTuple):
    """How triton_kernels.sweep is built for an architecture, a size of element and of block."""

    warps: int = 1  # a program; a block a thread
    registers: int | None = None  # a thread's most, None for the compiler's choice


# By compute capability, bytes an element and block size; measured by benchmarks.cuda on an H200.
_TUNING = {
    (90, 2, 16): _Tuning(registers=72),
    (90, 4, 16): _Tuning(registers=72),
    (90, 2, 32): _Tuning(registers=112),
    (90, 4, 32): _Tuning(registers=112),
}
_IMPORTANCE_TUNING = {
    (90, 2, 16): _Tuning(registers=96),
    (90, 4, 16): _Tuning(registers=96),
}
# Tiles that share importances go to one program, as many as leave enough programs.
_LARGEST_GROUP = 4
_FEWEST_GROUPS = 8192
_HESSIAN_TUNING = {(90, 2): _Tuning(registers=128), (90, 4): _Tuning(registers=128)}
_DEFAULT_TUNING = _Tuning()


MOST_ROWS = 65535  # of a grid

#: What a sweep can compute of each block.
BLOCKWISE = ("amax", "code", "error", "packed")

Strides = tuple[int, ...]


def overlaps(capability: int) -> bool:
    """Whether a kernel may start before the one ahead of it has ended (programmatic dependent launch)."""
    return capability >= 90


def output_buffers(problem: Problem, outputs: Sequence[str]) -> tuple[Buffer, ...]:
    shapes = {
        "amax": (problem.block_shape, "float32"),
        "code": (problem.block_shape, "uint8"),
        "error": (problem.block_shape, "float32"),
        "packed": (problem.packed_shape, "uint8"),
        "global_amax": (problem.batch_shape, "float32"),
        "global_scale": (problem.batch_shape, "float32"),
    }
    return tuple((name, *shapes[name]) for name in outputs)


def sweep_squared(
    problem: Problem,
    outputs: tuple[str, ...],
    strides: Strides,
    element_size: int,
    capability: int,
    *,
    scattered: bool,
) -> Launch | None:
    block_size = problem.block_size
    tuning = _TUNING.get((capability, element_size, block_size), _DEFAULT_TUNING)
    tile = 32 * tuning.warps
    matrices, outer, length, inner = problem.view_shape
    matrix_stride, outer_stride, step, inner_stride = strides
    if matrices == 1:
        matrix_stride = 0  # it leads nowhere, whatever it is
    length_blocks = length // block_size
    n_blocks = outer * length_blocks * inner
    if not n_blocks:
        return None
    tiles = -(-n_blocks // tile)
    along = step * block_size  # from a block to the next along `axis`

    # The blocks as equally spaced rows of equally spaced blocks, where strides allow it.
    rows, columns, block_stride = (
        (outer, length_blocks, along) if inner == 1 else (outer * length_blocks, inner, inner_stride)
    )
    row_stride = outer_stride if inner == 1 or length_blocks == 1 else along
    if inner > 1 and outer > 1 and length_blocks > 1 and outer_stride != length_blocks * along:
        layout = 0
    elif rows == 1 or (inner == 1 and (columns == 1 or row_stride == columns * block_stride)):
        layout = 1
        block_stride = row_stride if columns == 1 else block_stride
    else:
        layout = 2 if columns % tile == 0 else 0
    if layout == 0:
        row_stride = along
    elif layout == 1:
        row_stride = 0

    vector = 1
    # The kernel multiplies strides that count vectors as int32, where they fit.
    if inner == 1 and step == 1 and block_size % 16 == 0 and max(row_stride, block_stride) < 2**31:
        vector = math.gcd(16 // element_size, row_stride, block_stride, matrix_stride)

    candidates = most_candidates(block_size) if block_size in _SCREENED_BLOCK_SIZES else 0
    bounds = window(block_size)
    overlap = overlaps(capability)
    return Launch(
        triton_kernels.sweep,
        (tiles, min(matrices, MOST_ROWS)),
        ("weight", "starts" if scattered else None, "tables"),
        tuple(name if name in outputs else None for name in BLOCKWISE),
        output_buffers(problem, [name for name in outputs if name in BLOCKWISE]),
        (
            matrix_stride // vector, outer_stride, row_stride // vector,
            block_stride // vector, step, inner_stride,
            length_blocks, inner, n_blocks, matrices, columns // tile if layout == 2 else tiles, block_size,
            problem.min_code, last_unhalved_code(problem.min_code),
            max(FIRST_NORMAL_CODE, problem.min_code) + 1,  # a code below is screened too
            1 / bounds.lower, bounds.relative_margin, bounds.absolute_margin,
        ),
        (
            layout, vector, inner > 1, block_size, candidates // 3 * 3, candidates % 3, tile, overlap,
        ),
        tuning.warps, maxnreg=tuning.registers, launch_pdl=overlap,
    )  # fmt: skip


def sweep_importance(
    problem: Problem,
    outputs: tuple[str, ...],
    strides: Strides,
    importance_strides: Strides,
    element_size: int,
    capability: int,
) -> Launch | None:
    block_size = problem.block_size
    tuning = _IMPORTANCE_TUNING.get((capability, element_size, block_size), _DEFAULT_TUNING)
    tile = 32 * tuning.warps
    matrices, outer, length, inner = problem.view_shape
    length_blocks = length // block_size
    n_blocks = outer * length_blocks * inner
    if not n_blocks:
        return None
    # Tiles that follow each other along an axis may share importances, and a program loads them once.
    lanes, group, groups_per_row, limit = 0, 1, 1, 1
    tiles = -(-n_blocks // tile)
    group_size = min(max(tiles // _FEWEST_GROUPS, 1), _LARGEST_GROUP)
    if inner == 1 and length_blocks % tile == 0:
        lanes, group, groups_per_row, limit = 1, group_size, length_blocks // tile, outer
        programs = groups_per_row * -(-outer // group)
    elif inner > 1 and inner % tile == 0:
        limit = inner // tile
        lanes, group, groups_per_row = 2, group_size, -(-limit // group_size)
        programs = groups_per_row * outer * length_blocks
    else:
        programs = tiles
    shared = importance_strides[1 if lanes == 1 else 3] == 0
    vector = _vector(strides, problem, 16 // element_size)
    importance_vector = _vector(importance_strides, problem, 4)
    overlap = overlaps(capability)
    return Launch(
        triton_importance.sweep_importance,
        (programs, min(matrices, MOST_ROWS)),
        ("weight", "importance", "tables"),
        tuple(name if name in outputs else None for name in BLOCKWISE),
        output_buffers(problem, [name for name in outputs if name in BLOCKWISE]),
        (
            *_in_vectors(strides, block_size, vector),
            *_in_vectors(importance_strides, block_size, importance_vector),
            length_blocks, inner, n_blocks, matrices, groups_per_row, group, limit, block_size,
            problem.min_code, last_unhalved_code(problem.min_code), max(FIRST_NORMAL_CODE, problem.min_code),
            *importance_margins(block_size),
        ),
        (
            lanes, shared, vector, importance_vector, inner > 1, block_size,
            block_size in _SCREENED_BLOCK_SIZES, tile, overlap,
        ),
        tuning.warps, maxnreg=tuning.registers, launch_pdl=overlap,
    )  # fmt: skip


def prepare_hessians(problem: Problem, matrices: int, checked: bool, capability: int) -> Launch:
    """What sweep_hessian reads of the Hessians of so many matrices."""
    number = matrices * problem.hessian_shape[-3]
    status = (("hessian_status", (number,), "float32"),) if checked else ()
    return Launch(
        triton_hessian_tables.prepare,
        (number, 1),
        ("hessian",),
        ("hessian_tables", "hessian_status" if checked else None),
        (("hessian_tables", (number * triton_hessian_tables.HESSIAN_TABLE.value,), "float32"), *status),
        (),
        (overlaps(capability),),
        1,
    )


def sweep_hessian(
    problem: Problem,
    outputs: tuple[str, ...],
    strides: Strides,
    hessian_matrices: int,
    element_size: int,
    capability: int,
) -> Launch | None:
    tuning = _HESSIAN_TUNING.get((capability, element_size), _DEFAULT_TUNING)
    tile = 32 * tuning.warps
    matrices, outer, length, inner = problem.view_shape
    length_blocks = length // problem.block_size
    n_rows = outer * inner
    if not n_rows * length_blocks:
        return None
    vector = _vector(strides, problem, 16 // element_size)
    overlap = overlaps(capability)
    return Launch(
        triton_hessian.sweep_hessian,
        (-(-n_rows // tile) * length_blocks, min(matrices, MOST_ROWS)),
        ("weight", "hessian_tables", "tables"),
        tuple(name if name in outputs else None for name in BLOCKWISE),
        output_buffers(problem, [name for name in outputs if name in BLOCKWISE]),
        (
            *_in_vectors(strides, problem.block_size, vector),
            length_blocks if hessian_matrices > 1 else 0, length_blocks, inner, n_rows, matrices,
            problem.min_code,
        ),
        (vector, inner > 1, tile, overlap),
        tuning.warps, maxnreg=tuning.registers, launch_pdl=overlap,
    )  # fmt: skip


def _vector(strides: Strides, problem: Problem, most: int) -> int:
    """How many elements of a block one load can take: they are consecutive, and blocks lie at multiples."""
    matrix_stride, outer_stride, step, inner_stride = strides
    if step != 1 or problem.block_size % 16:
        return 1
    matrices, outer, _, inner = problem.view_shape
    apart = [
        stride
        for stride, size in ((matrix_stride, matrices), (outer_stride, outer), (inner_stride, inner))
        if size > 1
    ]
    return math.gcd(most, problem.block_size, *apart)


def _in_vectors(strides: Strides, block_size: int, vector: int) -> tuple[int, ...]:
    """The strides of matrices, outer, blocks, elements and inner; all but the last two count vectors."""
    matrix_stride, outer_stride, step, inner_stride = strides
    along = step * block_size
    return matrix_stride // vector, outer_stride // vector, along // vector, step, inner_stride
