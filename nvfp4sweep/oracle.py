"""The definition of the right answer, in plain NumPy.

For a block w and the candidate scales s[1] < ... < s[126] (indexed by E4M3 code),

    err[k] = sum_i  h_i  min over q in {0, .5, 1, 1.5, 2, 3, 4, 6} of (|w_i| - q s[k])^2

with h_i = 1 unless an importance is given, and also where all of a block's are 0; or, with a Hessian H,

    err[k] = r^T H r,   r_i = w_i - q_i s[k],   q_i s[k] nearest to w_i, ties to the even code

and the answer is the lowest code >= min_code that minimises err in real arithmetic. All codes are
evaluated in float64. Those whose float64 errors are too close to tell apart are compared in exact
integer arithmetic, so nothing here rests on a tolerance. No engine shares code with this file.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from nvfp4sweep import packing
from nvfp4sweep.formats import E2M1_SIGN_BIT, E2M1_VALUES, MAX_CODE, amax_by_code, scale_by_code

Floats = npt.NDArray[np.float64]

_CHUNK = 1024  # blocks at a time: the working set stays in the second-level cache


def search(
    blocks: npt.NDArray[np.float32],
    global_amax: np.float32,
    min_code: int,
    importance: npt.NDArray[np.float32] | None = None,
    hessian: npt.NDArray[np.float32] | None = None,
    hessian_of: npt.NDArray[np.intp] | None = None,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """The best code of every block of one matrix, and its error.

    Args:
        blocks: float32 [n_blocks, block_size], finite.
        global_amax: the amax of the matrix, finite and >= 0.
        min_code: the lowest code that may be chosen, 1 .. 126.
        importance: float32 of the shape of `blocks`, finite and >= 0.
        hessian: float32 [n_hessians, block_size, block_size], finite, symmetric and not all zero.
        hessian_of: the index of each block's Hessian.

    Returns:
        (code uint8 [n_blocks], error float32 [n_blocks]). The error is summed in float64, element
        by element in order, and rounded once.
    """
    code = np.empty(len(blocks), np.uint8)
    error = np.empty(len(blocks), np.float32)
    scales = scale_by_code(global_amax).astype(np.float64)
    for start in range(0, len(blocks), _CHUNK):
        part = slice(start, start + _CHUNK)
        w = blocks[part].astype(np.float64)
        if hessian is not None and hessian_of is not None:
            code[part], least = _search_hessian(w, hessian[hessian_of[part]], scales, min_code)
        else:
            weights = np.ones_like(w) if importance is None else importance[part].astype(np.float64)
            weights[~weights.any(axis=1)] = 1
            code[part], least = _search_squares(np.abs(w), weights, scales, min_code)
        with np.errstate(over="ignore"):  # an error beyond float32 is reported as inf
            error[part] = least
    return code, error


def _lowest_best(
    errors: Floats, margins: Floats, min_code: int, exact_error: Callable[[int, int], int]
) -> npt.NDArray[np.intp]:
    """The lowest code of least error, given float64 errors [blocks, codes] and what they may be off by.

    exact_error(block, code) decides between those that the margins do not separate.
    """
    best: npt.NDArray[np.intp] = errors.argmin(axis=1) + min_code
    highest_least = (errors + margins).min(axis=1, keepdims=True)
    contenders = errors - margins <= highest_least
    for block in np.flatnonzero(contenders.sum(axis=1) > 1):
        codes = np.flatnonzero(contenders[block]) + min_code
        best[block] = min(codes, key=lambda code: (exact_error(int(block), int(code)), code))
    return best


def _leave_out_repeats(errors: Floats, magnitude: Floats, scales: Floats) -> None:
    """Where s >= 4 max|w| every element's nearest code is 0: all such scales have the same error, and only
    the lowest of them can be the answer. So it is with scales that are equal."""
    all_zero = scales >= 4 * magnitude.max(axis=1, initial=0, keepdims=True)
    equal = scales[1:] == scales[:-1]
    errors[:, 1:][(all_zero[:, 1:] & all_zero[:, :-1]) | equal] = np.inf


def _as_integer(value: float) -> int:
    """A float32 value in units of 2^-149, of which every float32 is a multiple."""
    return int(math.ldexp(value, 149))


# --- sums of squares ------------------------------------------------------------------------------


def _search_squares(
    magnitude: Floats, weights: Floats, scales: Floats, min_code: int
) -> tuple[npt.NDArray[np.intp], Floats]:
    codes = np.arange(min_code, MAX_CODE + 1)
    n_blocks, block_size = magnitude.shape
    errors = np.empty((n_blocks, len(codes)))
    for column, code in enumerate(codes):
        errors[:, column] = (weights * _squared_residuals(magnitude, scales[code])).sum(axis=1)
    # q s is exact in float64 (26 bits); the difference, the square and its product with a weight are
    # rounded once each, a sum of n terms at most n - 1 times, in whatever order: relative error
    # (n + 3) 2^-53, and nothing underflows. A float64 error of zero is an exact zero.
    margins = errors * ((block_size + 3) * 2.0**-52)
    _leave_out_repeats(errors, np.where(weights > 0, magnitude, 0), scales[codes])

    def exact_error(block: int, code: int) -> int:
        """In units of 2^-149 (2^-150)^2: residuals are doubled to make q an integer."""
        twice_grid = [int(2 * q) * _as_integer(float(scales[code])) for q in E2M1_VALUES]
        return sum(
            _as_integer(float(h)) * min((2 * _as_integer(float(w)) - g) ** 2 for g in twice_grid)
            for w, h in zip(magnitude[block], weights[block], strict=True)
        )

    best = _lowest_best(errors, margins, min_code, exact_error)
    squares = weights * _squared_residuals(magnitude, scales[best][:, None])
    return best, np.add.accumulate(squares, axis=1)[:, -1]


def _squared_residuals(magnitude: Floats, scale: Floats | np.float64) -> Floats:
    best = magnitude * magnitude  # q = 0
    for q in E2M1_VALUES[1:]:
        residual = magnitude - q * scale
        residual *= residual
        np.minimum(best, residual, out=best)
    return best


# --- quadratic forms ------------------------------------------------------------------------------


def _search_hessian(
    w: Floats, hessian: npt.NDArray[np.float32], scales: Floats, min_code: int
) -> tuple[npt.NDArray[np.intp], Floats]:
    codes = np.arange(min_code, MAX_CODE + 1)
    n_blocks, block_size = w.shape
    wide = hessian.astype(np.float64)
    errors = np.empty((n_blocks, len(codes)))
    margins = np.empty_like(errors)
    for column, code in enumerate(codes):
        residual = _residuals(w, scales[code])
        errors[:, column] = _quadratic_form(wide, residual)
        # Of sum |H_ij r_i r_j| a residual is rounded once, each product twice, and a sum of n^2 terms as
        # often as it has terms, in whatever order.
        sizes = _quadratic_form(np.abs(wide), np.abs(residual))
        margins[:, column] = sizes * ((block_size**2 + 8) * 2.0**-52)
    _leave_out_repeats(errors, np.abs(w), scales[codes])

    def exact_error(block: int, code: int) -> int:
        """In units of 2^-149 (2^-150)^2."""
        scale = _as_integer(float(scales[code]))
        points = _points(w[block], scales[code])
        r = [2 * _as_integer(float(x)) - int(2 * q) * scale for x, q in zip(w[block], points, strict=True)]
        h = [[_as_integer(float(value)) for value in row] for row in hessian[block]]
        return sum(a * sum(x * b for x, b in zip(row, r, strict=True)) for a, row in zip(r, h, strict=True))

    best = _lowest_best(errors, margins, min_code, exact_error)
    return best, _in_order(wide, _residuals(w, scales[best][:, None]))


def _residuals(w: Floats, scale: Floats | np.float64) -> Floats:
    return w - _points(w, scale) * scale


def _points(w: Floats, scale: Floats | np.float64) -> Floats:
    """The E2M1 value nearest to w / scale, with the sign of w; the even code in a tie."""
    code = packing.encode(w, np.broadcast_to(scale, w.shape))
    magnitude: Floats = E2M1_VALUES[code & ~np.uint8(E2M1_SIGN_BIT)]
    return magnitude * np.where(code & E2M1_SIGN_BIT, -1.0, 1.0)


def _quadratic_form(hessian: Floats, residual: Floats) -> Floats:
    product = np.matmul(hessian, residual[:, :, None])[:, :, 0]
    return np.asarray((product * residual).sum(axis=1))


def _in_order(hessian: Floats, residual: Floats) -> Floats:
    """The quadratic form with sums over j, then over i, of products rounded one by one."""
    rows = np.add.accumulate(hessian * residual[:, None, :], axis=2)[:, :, -1]
    return np.asarray(np.add.accumulate(rows * residual, axis=1)[:, -1])


# --- the interface that all engines of the NumPy API share ----------------------------------------


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
    """As cpu.sweep_matrix."""
    largest = absolute_maximum(matrix)
    if np.isfinite(largest):
        outer, length, inner = matrix.shape
        along = length // block_size

        def in_blocks(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
            groups = array.reshape(outer * along, block_size, inner)
            return groups.transpose(0, 2, 1).reshape(-1, block_size).astype(np.float32)

        found, least = search(
            in_blocks(matrix),
            global_amax,
            min_code,
            None if importance is None else in_blocks(importance),
            hessian,
            np.tile(np.repeat(np.arange(along), inner), outer),
        )
        if amax is not None:
            amax[:] = amax_by_code(global_amax)[found]
        if code is not None:
            code[:] = found
        if error is not None:
            error[:] = least
    return largest


def pack_matrix(
    matrix: npt.NDArray[Any],
    global_amax: np.float32,
    block_size: int,
    code: npt.NDArray[np.uint8],
    packed: npt.NDArray[np.uint8],
) -> None:
    """As cpu.pack_matrix."""
    outer, length, inner = matrix.shape
    scale = scale_by_code(global_amax)[code].reshape(outer, length // block_size, inner)
    codes = packing.encode(matrix, np.repeat(scale, block_size, axis=1))
    packed[:] = packing.pack(codes, axis=1).reshape(-1)


def absolute_maximum(matrix: npt.NDArray[Any]) -> np.float32:
    """The largest |w|; infinite or NaN if an element is; 0 if empty."""
    return np.float32(np.abs(matrix.astype(np.float32)).max(initial=0))
