"""Launches of the CUDA kernels: device buffers in, device buffers out.

A buffer is any object that Triton takes as a pointer (data_ptr() and dtype), such as a tensor. All
launches go to the current stream of the current device, in order, and none waits. What they need to
know of a weight's layout is worked out once and kept: a call looks it up, allocates and launches.

`run` does so for Triton's own launcher. `plan` and Launch.build are for others: XLA launches the same
kernels within its programs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

from triton.runtime import driver

from nvfp4sweep import triton_sweeps, triton_tables
from nvfp4sweep.problem import Problem
from nvfp4sweep.triton_arithmetic import INTERPRETED
from nvfp4sweep.triton_build import Launch
from nvfp4sweep.triton_sweeps import BLOCKWISE, MOST_ROWS, Strides, overlaps
from nvfp4sweep.window import window

_LARGEST_TILE = 4096
_LARGEST_WARPS = 8
_TABULATE_WARPS = 4
_PARTIALS_TILE = 1024
_MOST_DIRECT = 4 * _PARTIALS_TILE  # elements of a matrix that tabulate searches itself
_MOST_PARTIALS = 1024

PER_MATRIX = ("global_amax", "global_scale")
CHECKED: int = triton_tables.CHECKED.value
_TABLE: int = triton_tables.TABLE.value


def run(
    view: Any,
    problem: Problem,
    outputs: tuple[str, ...],
    empty: Callable[[tuple[int, ...], str], Any],
    given_amax: Any = None,
    *,
    starts: Any = None,
    importance: Any = None,
    hessian: Any = None,
    checked: Any = None,
    after_check: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """The outputs of these names: amax, code, error, packed, global_amax, global_scale.

    Args:
        view: the weight, of shape Problem.view_shape [matrices, outer, length, inner] and any strides.
        empty: gives a new buffer, as empty(shape, "float32" or "uint8").
        given_amax: the global amaxes to use, float32 [matrices]; None takes the weight's own.
        starts: where matrices lie that are not equally far apart: int64 [matrices], in units of 16 bytes from
            the first element of `view`. Without importance and hessian only.
        importance: float32 of the weight's shape, with strides of 0 where it repeats.
        hessian: float32 [blocks, 16, 16] or [matrices, blocks, 16, 16], contiguous.
        checked: gets of each matrix the largest |w|, infinite or NaN if an element is, the global amax, and
            how many of its Hessians are zero and bad: float32 [matrices, CHECKED]. Without it a weight whose
            amax is given is not searched.
        after_check: called once `checked` is on its way, before what is launched after that.
    """
    launches = plan(
        problem, outputs, view.stride(), view.element_size(), _capability(),
        given=given_amax is not None, checked=checked is not None, scattered=starts is not None,
        importance_strides=None if importance is None else importance.stride(),
        hessian_matrices=0 if hessian is None else hessian.numel() // math.prod(problem.hessian_shape[-3:]),
    )  # fmt: skip
    buffers = {"weight": view, "given_amax": given_amax, "importance": importance, "hessian": hessian}
    buffers |= {"checked": checked, "starts": starts}
    for launch in launches:
        # The device is at work from the first launch on: what the host does later costs less.
        for name, shape, dtype in launch.allocates:
            buffers[name] = empty(shape, dtype)
        launch(*[None if name is None else buffers[name] for name in launch.buffers])
        if after_check is not None and "checked" in launch.writes:
            after_check()
    for name, shape, dtype in triton_sweeps.output_buffers(problem, outputs):  # of an empty weight
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
    scattered: bool = False,
    importance_strides: Strides | None = None,
    hessian_matrices: int = 0,
) -> tuple[Launch, ...]:
    """The launches of a call, in order.

    Args:
        strides: of the weight as Problem.view_shape, in elements of element_size bytes.
        capability: of the device, as 90 for 9.0; 0 under the interpreter.
        given, checked: whether there are these buffers.
        scattered: whether there is a buffer of starts.
        importance_strides: of the importance in the weight's shape, if there is one.
        hessian_matrices: how many matrices there are Hessians for: 1 if they share them.

    Raises:
        ValueError: starts together with an importance or Hessians.
    """
    if scattered and (importance_strides is not None or hessian_matrices):
        raise ValueError("starts is given with an importance or a hessian: their sweeps take strides alone")
    matrices = problem.view_shape[0]
    if not matrices:
        return ()
    search = checked or not given
    overlap = overlaps(capability)
    launches = []
    partials, n_partials = "given_amax", 0  # read by nobody
    if search:
        find_largest, n_partials = _find_largest(problem, strides, overlap, scattered)
        partials = "partials" if find_largest else "weight"
        launches += [find_largest] if find_largest else []
    sweep = None
    if any(name in BLOCKWISE for name in outputs):
        if importance_strides is not None:
            sweep = triton_sweeps.sweep_importance(
                problem, outputs, strides, importance_strides, element_size, capability
            )
        elif hessian_matrices:
            launches.append(triton_sweeps.prepare_hessians(problem, hessian_matrices, checked, capability))
            sweep = triton_sweeps.sweep_hessian(
                problem, outputs, strides, hessian_matrices, element_size, capability
            )
        else:
            sweep = triton_sweeps.sweep_squared(
                problem, outputs, strides, element_size, capability, scattered=scattered
            )
    bounds = window(problem.block_size)
    wanted = [name for name in PER_MATRIX if name in outputs]
    n_hessians = problem.hessian_shape[-3]
    launches.append(
        Launch(
            triton_tables.tabulate,
            (matrices, 1),
            (
                partials,
                "given_amax" if given else None,
                "hessian_status" if checked and hessian_matrices else None,
            ),
            (
                "tables" if sweep else None,
                *(name if name in wanted else None for name in PER_MATRIX),
                "checked" if checked else None,
            ),
            (
                *([("tables", (matrices * _TABLE,), "float32")] if sweep else []),
                *triton_sweeps.output_buffers(problem, wanted),
            ),
            (
                n_partials,
                n_hessians,
                n_hessians if hessian_matrices > 1 else 0,
                bounds.lower,
                bounds.upper,
            ),
            (_PARTIALS_TILE if search else 0, overlap),
            _TABULATE_WARPS,
            launch_pdl=overlap and len(launches) > 0,
        )
    )
    return (*launches, sweep) if sweep else tuple(launches)


def _find_largest(
    problem: Problem, strides: Strides, overlap: bool, scattered: bool
) -> tuple[Launch | None, int]:
    """The launch that finds each matrix's partial maxima, and their number.

    A small matrix without gaps needs none: its elements are as good as partial maxima.
    """
    matrices, _, length, inner = problem.view_shape
    n_elements = math.prod(problem.matrix_shape)
    dense = _is_dense(problem.view_shape, strides)
    adjoin = matrices == 1 or (strides[0] == n_elements and not scattered)
    if dense and n_elements <= _MOST_DIRECT and adjoin:
        return None, n_elements
    tiles = -(-n_elements // _LARGEST_TILE)
    n_partials = max(1, min(tiles, _MOST_PARTIALS // matrices))
    launch = Launch(
        triton_tables.largest, (n_partials, min(matrices, MOST_ROWS)),
        ("weight", "starts" if scattered else None), ("partials",),
        (("partials", (matrices * n_partials,), "float32"),),
        (*strides, length, inner, n_elements, matrices, n_partials, -(-tiles // n_partials)),
        (dense, _LARGEST_TILE, overlap), _LARGEST_WARPS,
    )  # fmt: skip
    return launch, n_partials


def _capability() -> int:
    """Of the current device, as 90 for 9.0; 0 under the interpreter."""
    return 0 if INTERPRETED.value else _capability_of(driver.active.get_current_device())


@functools.cache
def _capability_of(device: int) -> int:
    return int(driver.active.get_current_target().arch)


def _is_dense(shape: tuple[int, ...], strides: Strides) -> bool:
    """Whether each matrix fills a contiguous range of memory, in whatever order."""
    dense = 1
    for stride, size in sorted(zip(strides[1:], shape[1:], strict=True)):
        if size != 1:
            if stride != dense:
                return False
            dense *= size
    return True
