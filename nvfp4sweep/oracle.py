"""The definition of the right answer, in plain NumPy.

For a block w and the candidate scales s[1] < ... < s[126] (indexed by E4M3 code),

    err[k] = sum_i  min over q in {0, .5, 1, 1.5, 2, 3, 4, 6} of (|w_i| - q s[k])^2

and the answer is the lowest code >= min_code that minimises err in real arithmetic. All codes are
evaluated in float64. Those whose float64 errors are too close to tell apart are compared in exact
integer arithmetic, so nothing here rests on a tolerance. No engine shares code with this file.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from nvfp4sweep import packing
from nvfp4sweep.formats import E2M1_VALUES, MAX_CODE, amax_by_code, scale_by_code

_CHUNK = 1024  # blocks at a time: the working set stays in the second-level cache


def search(
    blocks: npt.NDArray[np.float32], global_amax: np.float32, min_code: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """The best code of every block of one matrix, and its error.

    Args:
        blocks: float32 [n_blocks, block_size], finite.
        global_amax: the amax of the matrix, finite and >= 0.
        min_code: the lowest code that may be chosen, 1 .. 126.

    Returns:
        (code uint8 [n_blocks], error float32 [n_blocks]). The error is summed in float64, element
        by element in order, and rounded once.
    """
    code = np.empty(len(blocks), np.uint8)
    error = np.empty(len(blocks), np.float32)
    scales = scale_by_code(global_amax).astype(np.float64)
    for start in range(0, len(blocks), _CHUNK):
        part = slice(start, start + _CHUNK)
        magnitude = np.abs(blocks[part].astype(np.float64))
        code[part] = _best_codes(magnitude, scales, min_code)
        squares = _squared_residuals(magnitude, scales[code[part]][:, None])
        with np.errstate(over="ignore"):  # an error beyond float32 is reported as inf
            error[part] = np.add.accumulate(squares, axis=1)[:, -1]
    return code, error


def _squared_residuals(
    magnitude: npt.NDArray[np.float64], scale: npt.NDArray[np.float64] | np.float64
) -> npt.NDArray[np.float64]:
    best = magnitude * magnitude  # q = 0
    for q in E2M1_VALUES[1:]:
        residual = magnitude - q * scale
        residual *= residual
        np.minimum(best, residual, out=best)
    return best


def _best_codes(
    magnitude: npt.NDArray[np.float64], scales: npt.NDArray[np.float64], min_code: int
) -> npt.NDArray[np.intp]:
    n_blocks, block_size = magnitude.shape
    codes = np.arange(min_code, MAX_CODE + 1)
    errors = np.empty((n_blocks, len(codes)))
    for column, code in enumerate(codes):
        errors[:, column] = _squared_residuals(magnitude, scales[code]).sum(axis=1)
    best: npt.NDArray[np.intp] = codes[errors.argmin(axis=1)]

    # q s is exact in float64 (26 bits), the difference and the square are rounded once each, and a
    # sum of n terms at most n - 1 times, in whatever order: relative error (n + 2) 2^-53, and
    # nothing underflows. Two errors further apart than four times that compare rightly. A float64
    # error of zero is an exact zero.
    least = errors.min(axis=1, keepdims=True)
    contenders = errors <= least * (1 + 4 * (block_size + 2) * 2.0**-53)
    contested = (contenders.sum(axis=1) > 1) & (least[:, 0] > 0)
    for block in np.flatnonzero(contested):
        best[block] = _exact_best(magnitude[block], scales, codes[contenders[block]])
    return best


def _exact_best(
    magnitude: npt.NDArray[np.float64], scales: npt.NDArray[np.float64], codes: npt.NDArray[np.intp]
) -> int:
    # Where s >= 4 max|w| every element's nearest code is 0 and the error is sum w^2, the same for
    # all such scales: only the lowest of them can be the answer.
    all_zero = scales[codes] >= 4 * magnitude.max()
    distinct = [int(c) for c in codes[~all_zero]] + [int(c) for c in codes[all_zero][:1]]
    weights = [_as_integer(float(w)) for w in magnitude]
    return min(distinct, key=lambda c: (_exact_error(weights, _as_integer(float(scales[c]))), c))


def _as_integer(value: float) -> int:
    """A nonnegative float32 value in units of 2^-149, of which every float32 is a multiple."""
    return int(math.ldexp(value, 149))


def _exact_error(weights: list[int], scale: int) -> int:
    """The squared error in units of (2^-150)^2: residuals are doubled to make q an integer."""
    twice_grid = [int(2 * q) * scale for q in E2M1_VALUES]
    return sum(min((2 * w - g) ** 2 for g in twice_grid) for w in weights)


# --- the interface that all engines of the NumPy API share ----------------------------------------


def sweep_matrix(
    matrix: npt.NDArray[Any],
    global_amax: np.float32,
    block_size: int,
    min_code: int,
    amax: npt.NDArray[np.float32] | None = None,
    code: npt.NDArray[np.uint8] | None = None,
    error: npt.NDArray[np.float32] | None = None,
) -> np.float32:
    """As cpu.sweep_matrix."""
    largest = absolute_maximum(matrix)
    if np.isfinite(largest):
        outer, length, inner = matrix.shape
        groups = matrix.reshape(outer * (length // block_size), block_size, inner)
        blocks = groups.transpose(0, 2, 1).reshape(-1, block_size).astype(np.float32)
        found, least = search(blocks, global_amax, min_code)
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
