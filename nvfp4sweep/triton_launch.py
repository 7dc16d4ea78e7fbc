"""Launches of the CUDA kernels: device buffers in, device buffers out.

A buffer is any object that Triton takes as a pointer (data_ptr() and dtype), such as a tensor. All
launches go to the current stream of the current device, in order, and none waits. What they need to
know of a weight's layout is worked out once and kept: a call looks it up, allocates and launches.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from triton import knobs
from triton.runtime import driver

from nvfp4sweep import triton_kernels, triton_tables
from nvfp4sweep.problem import Problem
from nvfp4sweep.triton_blocks import INTERPRETED
from nvfp4sweep.window import FIRST_NORMAL_CODE, last_unhalved_code, most_candidates, window

# Block sizes whose whole block fits in a thread's registers; others are compared exactly at every code.
_SCREENED_BLOCK_SIZES = (16, 32)

_TABLE: int = triton_tables.TABLE.value


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
_DEFAULT_TUNING = _Tuning()

_MOST_ROWS = 65535  # of a grid
_LARGEST_TILE = 4096
_LARGEST_WARPS = 8
_TABULATE_WARPS = 4
_PARTIALS_TILE = 1024
_MOST_DIRECT = 4 * _PARTIALS_TILE  # elements of a matrix that tabulate searches itself
_MOST_PARTIALS = 1024

_BYTES = ("code", "packed")
_PER_MATRIX = ("global_amax", "global_scale")

Strides = tuple[int, ...]


def run(
    view: Any,
    problem: Problem,
    outputs: tuple[str, ...],
    empty: Callable[[tuple[int, ...], str], Any],
    given_amax: Any = None,
    *,
    checked: Any = None,
    before_sweep: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """The outputs of these names: amax, code, error, packed, global_amax, global_scale.

    Args:
        view: the weight, of shape Problem.view_shape [matrices, outer, length, inner] and any strides.
        empty: gives a new buffer, as empty(shape, "float32" or "uint8").
        given_amax: the global amaxes to use, float32 [matrices]; None takes the weight's own.
        checked: gets the largest |w|, infinite or NaN if an element is, and the global amax of each
            matrix: float32 [matrices, 2]. Without it a weight whose amax is given is not searched.
        before_sweep: called once `checked` is on its way.
    """
    search = checked is not None or given_amax is None
    plan = _plan(problem, outputs, view.stride(), view.element_size(), _capability(), search)
    workspace = empty((plan.workspace_size,), "float32")
    partials = view if search else workspace
    if plan.find_largest:
        partials = workspace[plan.partials :]
        plan.find_largest(view, partials)
    # The device is at work by now: whatever else the host has to do costs less.
    found = {name: empty(shape, dtype) for name, shape, dtype in plan.outputs}
    if plan.tabulate:
        tables = workspace if plan.sweep else None
        plan.tabulate(
            partials, given_amax, tables, found.get("global_amax"), found.get("global_scale"), checked
        )
    if before_sweep is not None:
        before_sweep()
    if plan.sweep:
        plan.sweep(
            view, workspace, found.get("amax"), found.get("code"), found.get("error"), found.get("packed")
        )
    return found


class _Launch:
    """A kernel and all its arguments but the buffers, which come first."""

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int],
        numbers: tuple[Any, ...],
        constants: tuple[Any, ...],
        warps: int,
        **options: Any,
    ):
        self._kernel = kernel
        self._grid = (*grid, 1)
        self._rest = (*numbers, *constants)
        self._options = {"num_warps": warps, **options}
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *buffers: Any) -> None:
        """Triton's own way to a compiled kernel takes longer than a small sweep. What it specializes a
        kernel by is all in the key, or in this object; the numbers are exempt (do_not_specialize)."""
        if INTERPRETED.value:
            self._kernel[self._grid](*buffers, *self._rest, num_warps=self._options["num_warps"])
            return
        active = driver.active
        device = active.get_current_device()
        addresses = [None if buffer is None else buffer.data_ptr() for buffer in buffers]
        key = (device, buffers[0].dtype, *[a and a % 16 for a in addresses])
        compiled = self._compiled.get(key)
        if compiled is None:
            # Fused multiply-adds are written out where they are meant: Triton's default changes in 3.10.
            self._compiled[key] = self._kernel[self._grid](
                *buffers, *self._rest, enable_fp_fusion=False, **self._options
            )
            return
        stream = active.get_current_stream(device)
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if enter.calls or leave.calls:  # a profiler's
            compiled[self._grid](*addresses, *self._rest, stream=stream)
        else:
            compiled.run(
                *self._grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
                *addresses, *self._rest,
            )  # fmt: skip


class _Plan(NamedTuple):
    """A call of `run`: its buffers and its launches, None where there is nothing to do."""

    outputs: tuple[tuple[str, tuple[int, ...], str], ...]  # name, shape, dtype
    workspace_size: int  # float32 elements: a TABLE a matrix, and the partial maxima
    partials: int  # where those begin
    find_largest: _Launch | None
    tabulate: _Launch | None
    sweep: _Launch | None


@functools.lru_cache(maxsize=4096)
def _plan(
    problem: Problem,
    outputs: tuple[str, ...],
    strides: Strides,
    element_size: int,
    capability: int,
    search: bool,
) -> _Plan:
    shapes = {
        "amax": problem.block_shape,
        "code": problem.block_shape,
        "error": problem.block_shape,
        "packed": problem.packed_shape,
        "global_amax": problem.batch_shape,
        "global_scale": problem.batch_shape,
    }
    buffers = tuple((name, shapes[name], "uint8" if name in _BYTES else "float32") for name in outputs)
    matrices = problem.view_shape[0]
    if not matrices:
        return _Plan(buffers, 0, 0, None, None, None)
    overlap = _overlaps(capability)
    find_largest, n_partials = _find_largest(problem, strides, overlap) if search else (None, 0)
    bounds = window(problem.block_size)
    blockwise = any(name not in _PER_MATRIX for name in outputs)
    return _Plan(
        buffers,
        matrices * (_TABLE + (n_partials if find_largest else 0)),
        matrices * _TABLE,
        find_largest,
        _Launch(
            triton_tables.tabulate, (matrices, 1), (n_partials, bounds.lower, bounds.upper),
            (_PARTIALS_TILE if search else 0, overlap), _TABULATE_WARPS,
            launch_pdl=overlap and bool(find_largest),
        ),
        _sweep(problem, strides, element_size, capability) if blockwise else None,
    )  # fmt: skip


def _find_largest(problem: Problem, strides: Strides, overlap: bool) -> tuple[_Launch | None, int]:
    """The launch that finds each matrix's partial maxima, and their number.

    A small matrix without gaps needs none: its elements are as good as partial maxima.
    """
    matrices, _, length, inner = problem.view_shape
    n_elements = math.prod(problem.matrix_shape)
    dense = _is_dense(problem.view_shape, strides)
    if dense and n_elements <= _MOST_DIRECT and (matrices == 1 or strides[0] == n_elements):
        return None, n_elements
    tiles = -(-n_elements // _LARGEST_TILE)
    n_partials = max(1, min(tiles, _MOST_PARTIALS // matrices))
    launch = _Launch(
        triton_tables.largest, (n_partials, min(matrices, _MOST_ROWS)),
        (*strides, length, inner, n_elements, matrices, n_partials, -(-tiles // n_partials)),
        (dense, _LARGEST_TILE, overlap), _LARGEST_WARPS,
    )  # fmt: skip
    return launch, n_partials


def _sweep(problem: Problem, strides: Strides, element_size: int, capability: int) -> _Launch | None:
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
    overlap = _overlaps(capability)
    return _Launch(
        triton_kernels.sweep,
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
            layout, vector, inner > 1, block_size, candidates // 3 * 3, candidates % 3, tile, overlap,
        ),
        tuning.warps, maxnreg=tuning.registers, launch_pdl=overlap,
    )  # fmt: skip


def _capability() -> int:
    """Of the current device, as 90 for 9.0; 0 under the interpreter."""
    return 0 if INTERPRETED.value else _capability_of(driver.active.get_current_device())


@functools.cache
def _capability_of(device: int) -> int:
    return int(driver.active.get_current_target().arch)


def _overlaps(capability: int) -> bool:
    """Whether a kernel may start before the one ahead of it has ended (programmatic dependent launch)."""
    return capability >= 90


def _is_dense(shape: tuple[int, ...], strides: Strides) -> bool:
    """Whether each matrix fills a contiguous range of memory, in whatever order."""
    dense = 1
    for stride, size in sorted(zip(strides[1:], shape[1:], strict=True)):
        if size != 1:
            if stride != dense:
                return False
            dense *= size
    return True
