"""Launches of the CUDA kernels: device buffers in, device buffers out.

A buffer is any object that Triton takes as a pointer (data_ptr() and dtype), such as a tensor. The
weight comes as a `view` of shape Problem.view_shape [matrices, outer, length, inner], with any
strides. All launches go to the current stream of the current device, in order, and none waits.
`run` does all of it; `tabulate` and `sweep` are its steps, for buffers that are there already.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from triton.runtime import driver

from nvfp4sweep import triton_kernels, triton_tables
from nvfp4sweep.problem import Problem
from nvfp4sweep.triton_blocks import INTERPRETED
from nvfp4sweep.window import FIRST_NORMAL_CODE, last_unhalved_code, most_candidates, window

# Block sizes whose whole block fits in a thread's registers; others are compared exactly at every code.
_SCREENED_BLOCK_SIZES = (16, 32)

TABLE: int = triton_tables.TABLE.value


class _Tuning(NamedTuple):
    """How triton_kernels.sweep is built for an architecture and a size of element."""

    warps: int = 1  # a program; a block a thread
    registers: int | None = None  # a thread's most, None for the compiler's choice
    ahead: int = 0  # a tile so many further on is fetched to the second-level cache; 0 for none


# By compute capability and bytes an element; measured by benchmarks.cuda on an H200.
_TUNING = {
    (90, 2): _Tuning(registers=72, ahead=4096),
    (90, 4): _Tuning(registers=72, ahead=4096),
}
_DEFAULT_TUNING = _Tuning()

_MOST_ROWS = 65535  # of a grid
_LARGEST_TILE = 4096
_LARGEST_WARPS = 8
_TABULATE_WARPS = 4
_MOST_PARTIALS = 1024

Strides = tuple[int, ...]


_BYTES = ("code", "packed")
_PER_MATRIX = ("global_amax", "global_scale")


def run(
    view: Any,
    problem: Problem,
    outputs: Sequence[str],
    empty: Callable[[tuple[int, ...], str], Any],
    given_amax: Any = None,
    *,
    checked: Any = None,
    before_sweep: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """The outputs of these names: amax, code, error, packed, global_amax, global_scale.

    Args:
        empty: gives a new buffer, as empty(shape, "float32" or "uint8").
        given_amax, checked: as for tabulate. The weight is read for `checked` only where it is given.
        before_sweep: called once `checked` is on its way.
    """
    shapes = {
        "amax": problem.block_shape,
        "code": problem.block_shape,
        "error": problem.block_shape,
        "packed": problem.packed_shape,
        "global_amax": problem.batch_shape,
        "global_scale": problem.batch_shape,
    }
    found = {name: empty(shapes[name], "uint8" if name in _BYTES else "float32") for name in outputs}
    shared = {name: buffer for name, buffer in found.items() if name in _PER_MATRIX}
    blockwise = {name: buffer for name, buffer in found.items() if name not in _PER_MATRIX}
    workspace = empty((workspace_size(problem),), "float32")
    find_largest = checked is not None
    tabulate(view, problem, workspace, given_amax, find_largest=find_largest, checked=checked, **shared)
    if before_sweep is not None:
        before_sweep()
    if blockwise:
        sweep(view, problem, workspace, **blockwise)
    return found


def workspace_size(problem: Problem) -> int:
    """Elements of the float32 workspace that the other functions need."""
    matrices = problem.view_shape[0]
    return matrices * (TABLE + _n_partials(problem))


def tabulate(
    view: Any,
    problem: Problem,
    workspace: Any,
    given_amax: Any = None,
    *,
    find_largest: bool = True,
    global_amax: Any = None,
    global_scale: Any = None,
    checked: Any = None,
) -> None:
    """Fill the workspace's tables, and what is given of these float32 buffers.

    Args:
        given_amax: the global amaxes to use, float32 [matrices]; None takes the weight's own.
        find_largest: read the weight for its largest |w|, which is infinite or NaN if an element is.
        global_amax: gets the global amaxes used, [matrices].
        global_scale: gets them divided by 2688, [matrices].
        checked: gets the largest |w| (0 unless searched) and the global amax, [matrices, 2].
    """
    plan = _tabulate_plan(problem, view.stride())
    if not plan.matrices:
        return
    partials = workspace[plan.matrices * TABLE :]
    search = find_largest or given_amax is None
    if search:
        _launch(
            triton_tables.largest, (plan.n_partials, min(plan.matrices, _MOST_ROWS)), (view, partials),
            plan.numbers, plan.constants, _LARGEST_WARPS,
        )  # fmt: skip
    _launch(
        triton_tables.tabulate, (plan.matrices, 1),
        (partials, given_amax, workspace, global_amax, global_scale, checked),
        (plan.n_partials, *plan.bounds), (plan.lanes if search else 0, _overlaps(_capability())),
        _TABULATE_WARPS,
    )  # fmt: skip


def sweep(
    view: Any,
    problem: Problem,
    workspace: Any,
    *,
    amax: Any = None,
    code: Any = None,
    error: Any = None,
    packed: Any = None,
) -> None:
    """Write, of every block, what is given of: its amax (float32), its E4M3 code (uint8) and its squared
    error (float32), each of problem.block_shape; its E2M1 codes (uint8, problem.packed_shape)."""
    capability = _capability()
    element_size = view.element_size()
    tuning = _TUNING.get((capability, element_size), _DEFAULT_TUNING)
    plan = _plan(problem, view.stride(), element_size, tuning)
    if all(plan.grid):
        overlap = _overlaps(capability)
        _launch(
            triton_kernels.sweep, plan.grid, (view, workspace, amax, code, error, packed), plan.numbers,
            (*plan.constants, overlap), tuning.warps, maxnreg=tuning.registers, launch_pdl=overlap,
        )  # fmt: skip


class _TabulatePlan(NamedTuple):
    """Launches of triton_tables: the arguments of `largest` after the buffers, and what tabulate needs."""

    matrices: int
    n_partials: int
    lanes: int
    bounds: tuple[float, float]
    numbers: tuple[int, ...]
    constants: tuple[Any, ...]


@functools.lru_cache(maxsize=4096)
def _tabulate_plan(problem: Problem, strides: Strides) -> _TabulatePlan:
    matrices, _, length, inner = problem.view_shape
    n_elements = math.prod(problem.matrix_shape)
    n_partials = _n_partials(problem)
    tiles = -(-n_elements // _LARGEST_TILE)
    bounds = window(problem.block_size)
    return _TabulatePlan(
        matrices,
        n_partials,
        1 << (n_partials - 1).bit_length(),
        (bounds.lower, bounds.upper),
        (*strides, length, inner, n_elements, matrices, n_partials, -(-tiles // n_partials)),
        (_is_dense(problem.view_shape, strides), _LARGEST_TILE),
    )


class _Plan(NamedTuple):
    """A launch of triton_kernels.sweep: its arguments after the buffers."""

    grid: tuple[int, int]
    numbers: tuple[Any, ...]
    constants: tuple[Any, ...]


@functools.lru_cache(maxsize=4096)
def _plan(problem: Problem, strides: Strides, element_size: int, tuning: _Tuning) -> _Plan:
    tile = 32 * tuning.warps
    block_size = problem.block_size
    matrices, outer, length, inner = problem.view_shape
    matrix_stride, outer_stride, step, inner_stride = strides
    if matrices == 1:
        matrix_stride = 0  # it leads nowhere, whatever it is
    length_blocks = length // block_size
    n_blocks = outer * length_blocks * inner
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
    if inner == 1 and step == 1 and block_size % 16 == 0:
        vector = math.gcd(16 // element_size, row_stride, block_stride, matrix_stride)

    candidates = most_candidates(block_size) if block_size in _SCREENED_BLOCK_SIZES else 0
    bounds = window(block_size)
    return _Plan(
        (tiles, min(matrices, _MOST_ROWS)),
        (
            matrix_stride // vector, outer_stride, row_stride // vector,
            block_stride // vector, step, inner_stride,
            length_blocks, inner, n_blocks, matrices, columns // tile if layout == 2 else tiles, block_size,
            problem.min_code, last_unhalved_code(problem.min_code),
            max(FIRST_NORMAL_CODE, problem.min_code) + 1,  # a code below is screened too
            1 / bounds.lower, bounds.relative_margin, bounds.absolute_margin,
        ),
        (
            layout, vector, inner > 1, block_size, candidates // 3 * 3, candidates % 3, tile,
            tuning.ahead if layout == 1 and vector > 1 else 0,
        ),
    )  # fmt: skip


def _capability() -> int:
    """Of the current device, as 90 for 9.0; 0 under the interpreter."""
    return 0 if INTERPRETED.value else _capability_of(driver.active.get_current_device())


@functools.cache
def _capability_of(device: int) -> int:
    return int(driver.active.get_current_target().arch)


def _overlaps(capability: int) -> bool:
    """Whether the sweep may start before tabulate has ended (programmatic dependent launch)."""
    return capability >= 90


_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(
    kernel: Any,
    grid: tuple[int, int],
    buffers: tuple[Any, ...],
    numbers: tuple[Any, ...],
    constants: tuple[Any, ...],
    warps: int,
    **options: Any,
) -> None:
    """Launch a kernel whose parameters are these, in this order.

    Triton's own way to a compiled kernel takes longer than a small sweep; what it specializes a kernel
    by is only the key here, since the numbers are exempt (do_not_specialize).
    """
    if INTERPRETED.value:
        kernel[grid](*buffers, *numbers, *constants, num_warps=warps)
        return
    device = driver.active.get_current_device()
    addresses = [None if buffer is None else buffer.data_ptr() for buffer in buffers]
    alignments = tuple([None if address is None else address % 16 for address in addresses])
    key = (kernel, device, constants, buffers[0].dtype, alignments)
    compiled = _compiled.get(key)
    if compiled is None:
        # Fused multiply-adds are written out where they are meant: Triton's own default changes in 3.10.
        _compiled[key] = kernel[grid](
            *buffers, *numbers, *constants, num_warps=warps, enable_fp_fusion=False, **options
        )
    else:
        stream = driver.active.get_current_stream(device)
        compiled[(*grid, 1)](*addresses, *numbers, *constants, stream=stream)


def _n_partials(problem: Problem) -> int:
    tiles = -(-math.prod(problem.matrix_shape) // _LARGEST_TILE)
    return max(1, min(tiles, _MOST_PARTIALS // max(1, problem.view_shape[0])))


def _is_dense(shape: tuple[int, ...], strides: Strides) -> bool:
    """Whether each matrix fills a contiguous range of memory, in whatever order."""
    dense = 1
    for stride, size in sorted(zip(strides[1:], shape[1:], strict=True)):
        if size != 1:
            if stride != dense:
                return False
            dense *= size
    return True
