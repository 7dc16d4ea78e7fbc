"""Launches of the CUDA kernels: device buffers in, device buffers out.

A buffer is any object that Triton takes as a pointer (data_ptr() and dtype), such as a tensor. All
launches go to the current stream of the current device, in order, and none waits. What they need to
know of a weight's layout is worked out once and kept: a call looks it up, allocates and launches.

`run` does so for Triton's own launcher. `plan` and Launch.build are for others: XLA launches the same
kernels within its programs.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from triton.runtime import driver

from nvfp4sweep import triton_kernels, triton_tables
from nvfp4sweep.problem import Problem
from nvfp4sweep.triton_blocks import INTERPRETED
from nvfp4sweep.triton_build import Buffer, Launch
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

#: What `run` can compute, in the order in which it is asked for.
BLOCKWISE = ("amax", "code", "error", "packed")
PER_MATRIX = ("global_amax", "global_scale")

Strides = tuple[int, ...]


def run(
    view: Any,
    problem: Problem,
    outputs: tuple[str, ...],
    empty: Callable[[tuple[int, ...], str], Any],
    given_amax: Any = None,
    *,
    checked: Any = None,
    after_check: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """The outputs of these names: amax, code, error, packed, global_amax, global_scale.

    Args:
        view: the weight, of shape Problem.view_shape [matrices, outer, length, inner] and any strides.
        empty: gives a new buffer, as empty(shape, "float32" or "uint8").
        given_amax: the global amaxes to use, float32 [matrices]; None takes the weight's own.
        checked: gets the largest |w|, infinite or NaN if an element is, and the global amax of each
            matrix: float32 [matrices, 2]. Without it a weight whose amax is given is not searched.
        after_check: called once `checked` is on its way, before what is launched after that.
    """
    launches = plan(
        problem, outputs, view.stride(), view.element_size(), _capability(),
        given=given_amax is not None, checked=checked is not None,
    )  # fmt: skip
    buffers = {"weight": view, "given_amax": given_amax, "checked": checked}
    for launch in launches:
        # The device is at work from the first launch on: what the host does later costs less.
        for name, shape, dtype in launch.allocates:
            buffers[name] = empty(shape, dtype)
        launch(*[None if name is None else buffers[name] for name in launch.buffers])
        if after_check is not None and "checked" in launch.writes:
            after_check()
    for name, shape, dtype in output_buffers(problem, outputs):  # of an empty weight
        if name not in buffers:
            buffers[name] = empty(shape, dtype)
    return {name: buffers[name] for name in outputs}


@functools.lru_cache(maxsize=4096)
def plan(
    problem: Problem,
    outputs: tuple[str, ...],
    strides: Strides,
    element_size: int,
    capability: int,
    *,
    given: bool,
    checked: bool,
) -> tuple[Launch, ...]:
    """The launches of a call, in order.

    Args:
        strides: of the weight as Problem.view_shape, in elements of element_size bytes.
        capability: of the device, as 90 for 9.0; 0 under the interpreter.
        given, checked: whether there are these buffers.
    """
    matrices = problem.view_shape[0]
    if not matrices:
        return ()
    search = checked or not given
    overlap = _overlaps(capability)
    launches = []
    partials, n_partials = "given_amax", 0  # read by nobody
    if search:
        find_largest, n_partials = _find_largest(problem, strides, overlap)
        partials = "partials" if find_largest else "weight"
        launches += [find_largest] if find_largest else []
    sweep = None
    if any(name in BLOCKWISE for name in outputs):
        sweep = _sweep(problem, outputs, strides, element_size, capability)
    bounds = window(problem.block_size)
    wanted = [name for name in PER_MATRIX if name in outputs]
    launches.append(
        Launch(
            triton_tables.tabulate,
            (matrices, 1),
            (partials, "given_amax") if given else (partials,),
            (
                *(() if given else (None,)),
                "tables" if sweep else None,
                *(name if name in wanted else None for name in PER_MATRIX),
                "checked" if checked else None,
            ),
            (
                *([("tables", (matrices * _TABLE,), "float32")] if sweep else []),
                *output_buffers(problem, wanted),
            ),
            (n_partials, bounds.lower, bounds.upper),
            (_PARTIALS_TILE if search else 0, overlap),
            _TABULATE_WARPS,
            launch_pdl=overlap and len(launches) > 0,
        )
    )
    return (*launches, sweep) if sweep else tuple(launches)


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


def _find_largest(problem: Problem, strides: Strides, overlap: bool) -> tuple[Launch | None, int]:
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
    launch = Launch(
        triton_tables.largest, (n_partials, min(matrices, _MOST_ROWS)), ("weight",), ("partials",),
        (("partials", (matrices * n_partials,), "float32"),),
        (*strides, length, inner, n_elements, matrices, n_partials, -(-tiles // n_partials)),
        (dense, _LARGEST_TILE, overlap), _LARGEST_WARPS,
    )  # fmt: skip
    return launch, n_partials


def _sweep(
    problem: Problem, outputs: tuple[str, ...], strides: Strides, element_size: int, capability: int
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
    overlap = _overlaps(capability)
    return Launch(
        triton_kernels.sweep,
        (tiles, min(matrices, _MOST_ROWS)),
        ("weight", "tables"),
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
