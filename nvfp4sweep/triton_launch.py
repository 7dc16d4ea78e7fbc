"""Launches of the CUDA kernels: device buffers in, device buffers out, nothing allocated here.

A buffer is any object that Triton takes as a pointer (data_ptr() and dtype), such as a tensor. The
weight comes as a `view` of shape Problem.view_shape [matrices, outer, length, inner], with any
strides. All launches go to the current stream of the current device, in order, and none waits.

    workspace = <float32 buffer of workspace_size(problem) elements>
    tabulate(view, problem, workspace)              # or with a given global amax
    sweep(view, problem, workspace, amax, code)     # then residual and pack, as wanted

`scalars(tables, name)` says where the workspace holds each matrix's global amax and largest |w|.
"""

import math
from typing import Any

from nvfp4sweep import triton_kernels as kernels
from nvfp4sweep.problem import Problem
from nvfp4sweep.window import last_unhalved_code, most_candidates, window

TABLE_SIZE: int = kernels.TABLE.value
GLOBAL_AMAX_COLUMN: int = kernels.GLOBAL_AMAX.value
LARGEST_COLUMN: int = kernels.LARGEST.value

# Block sizes whose whole block fits in a thread's registers; others are settled exactly, block by block.
SCREENED_BLOCK_SIZES = (16, 32)

_SCREEN_TILE = 128  # blocks a program; one a thread
_SETTLE_TILE = 256
_ELEMENT_TILE = 128
_LARGEST_TILE = 4096
_MOST_PARTIALS = 1024

# Fused multiply-adds are written out where they are meant: Triton's own default changes in 3.10.
_OPTIONS = {"enable_fp_fusion": False}


def workspace_size(problem: Problem) -> int:
    """Elements of the float32 workspace that the other functions need."""
    matrices = problem.view_shape[0]
    return matrices * (TABLE_SIZE + _n_partials(problem))


def tabulate(
    view: Any, problem: Problem, workspace: Any, global_amax: Any = None, *, find_largest: bool = True
) -> None:
    """Fill the workspace's tables, workspace[: matrices * TABLE_SIZE].

    Args:
        global_amax: float32 [matrices]; None takes the weight's own.
        find_largest: read the weight for its largest |w|, which is infinite or NaN if an element is.
    """
    matrices, _, length, inner = problem.view_shape
    if matrices == 0:
        return
    n_partials = _n_partials(problem)
    partials = workspace[matrices * TABLE_SIZE :]
    find_largest = find_largest or global_amax is None
    n_elements = math.prod(problem.matrix_shape)
    if find_largest:
        tiles = -(-n_elements // _LARGEST_TILE)
        kernels.largest[(matrices * n_partials,)](
            view, *view.stride(), length, inner, n_elements, partials, n_partials, -(-tiles // n_partials),
            FLAT=_is_dense(view), SIZE=_LARGEST_TILE, num_warps=8, **_OPTIONS,
        )  # fmt: skip
    bounds = window(problem.block_size)
    kernels.tabulate[(matrices,)](
        partials, n_partials, workspace if global_amax is None else global_amax, workspace,
        bounds.lower, bounds.upper, HAS_PARTIALS=find_largest, HAS_AMAX=global_amax is not None,
        PARTIALS=_power_of_two(n_partials), **_OPTIONS,
    )  # fmt: skip


def sweep(view: Any, problem: Problem, workspace: Any, amax: Any, code: Any = None) -> None:
    """Write each block's amax (float32) and, if given, its E4M3 code (uint8): problem.block_shape."""
    n_blocks = _n_blocks(problem)
    if problem.view_shape[0] * n_blocks == 0:
        return
    min_code = problem.min_code
    screened = problem.block_size in SCREENED_BLOCK_SIZES
    if screened:
        bounds = window(problem.block_size)
        rows, flat = _row_layout(view)
        tiles = -(-n_blocks // _SCREEN_TILE)
        kernels.screen[(problem.view_shape[0] * tiles,)](
            view, *_block_strides(view, problem), n_blocks, tiles, workspace, amax, min_code,
            last_unhalved_code(min_code), bounds.relative_margin, bounds.absolute_margin,
            ROWS=rows, FLAT=flat, VECTOR=16 // view.element_size(), BLOCK_SIZE=problem.block_size,
            CANDIDATES=most_candidates(problem.block_size), T=_SCREEN_TILE, num_warps=4, **_OPTIONS,
        )  # fmt: skip
    tiles = -(-n_blocks // _SETTLE_TILE)
    kernels.settle[(problem.view_shape[0] * tiles,)](
        view, *_block_strides(view, problem), n_blocks, tiles, problem.block_size, workspace, amax,
        amax if code is None else code, min_code, last_unhalved_code(min_code),
        SCREENED=screened, HAS_CODE=code is not None, T=_SETTLE_TILE, num_warps=1, **_OPTIONS,
    )  # fmt: skip


def residual(view: Any, problem: Problem, workspace: Any, code: Any, error: Any) -> None:
    """Write each block's squared error (float32) at its code."""
    _launch_by_block(kernels.residual, view, problem, workspace, code, error)


def pack(view: Any, problem: Problem, workspace: Any, code: Any, packed: Any) -> None:
    """Write the E2M1 codes (uint8, problem.packed_shape) at each block's code."""
    _launch_by_block(kernels.pack, view, problem, workspace, code, packed)


def _launch_by_block(
    kernel: Any, view: Any, problem: Problem, workspace: Any, code: Any, output: Any
) -> None:
    n_blocks = _n_blocks(problem)
    tiles = -(-n_blocks // _ELEMENT_TILE)
    if problem.view_shape[0] * n_blocks:
        kernel[(problem.view_shape[0] * tiles,)](
            view, *_block_strides(view, problem), n_blocks, tiles, problem.block_size, workspace,
            code, output, T=_ELEMENT_TILE, num_warps=4, **_OPTIONS,
        )  # fmt: skip


def _n_blocks(problem: Problem) -> int:
    return math.prod(problem.matrix_shape) // problem.block_size


def _n_partials(problem: Problem) -> int:
    tiles = -(-math.prod(problem.matrix_shape) // _LARGEST_TILE)
    return max(1, min(tiles, _MOST_PARTIALS // max(1, problem.view_shape[0])))


def _block_strides(view: Any, problem: Problem) -> tuple[int, ...]:
    """(matrix, outer, block, length, inner) strides, then blocks along length, then inner."""
    matrix, outer, length, inner = view.stride()
    blocks = problem.view_shape[2] // problem.block_size
    return matrix, outer, length * problem.block_size, length, inner, blocks, problem.view_shape[3]


def _row_layout(view: Any) -> tuple[bool, bool]:
    """Whether a block is contiguous, and whether each matrix is a contiguous run of blocks."""
    _, outer, length, inner = view.shape
    _, stride_outer, stride_length, _ = view.stride()
    rows = inner == 1 and stride_length == 1
    return rows, rows and (outer == 1 or stride_outer == length)


def _is_dense(view: Any) -> bool:
    """Whether each matrix fills a contiguous range of memory, in whatever order."""
    dense = 1
    for stride, size in sorted(zip(view.stride()[1:], view.shape[1:], strict=True)):
        if size != 1:
            if stride != dense:
                return False
            dense *= size
    return True


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
