"""The weights of errors, from the shapes and dtypes that callers have to those that host engines use.

An importance becomes float32 [matrices, outer, length, inner] without a copy where strides allow it. A
Hessian becomes float32 [matrices, blocks, 16, 16], symmetric; one that is all zeros becomes the identity,
so that its blocks minimise the plain squared error. Device engines do the same on the device.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nvfp4sweep.problem import Problem
from nvfp4sweep.window import HESSIAN_TOLERANCE

_REAL = "fiuV"  # V: the dtypes of ml_dtypes


class ZeroHessianWarning(UserWarning):
    """Some blocks of a hessian are all zeros: no token reached their inputs, as in an expert never routed.

    Blocks of the weight with such a Hessian are searched by plain squared error.
    """


def importance_view(importance: npt.ArrayLike, problem: Problem, *, check: bool) -> npt.NDArray[np.float32]:
    """A caller's importance as float32 of Problem.view_shape; read-only, with strides of 0 where it repeats.

    Raises:
        TypeError: it is not of real numbers.
        ValueError: it does not broadcast to the weight; with `check`, it is negative, NaN or infinite.
    """
    array = as_float32("importance", importance)
    check_importance_shape(array.shape, problem)
    if check:
        bad = ~(np.isfinite(array) & (array >= 0))
        if bad.any():
            raise importance_error(np.argwhere(bad)[0], array[bad][0])
    return np.broadcast_to(array, problem.shape).reshape(problem.view_shape)


def check_importance_shape(shape: tuple[int, ...], problem: Problem) -> None:
    try:
        fits = np.broadcast_shapes(shape, problem.shape) == problem.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"importance has shape {shape}: it must broadcast to the weight's shape {problem.shape}"
        )


def importance_error(index: Sequence[int], value: object) -> ValueError:
    place = f"[{', '.join(str(int(i)) for i in index)}]" if len(index) else ""
    return ValueError(f"importance{place} is {value}: it must be finite and >= 0")


def hessian_per_matrix(hessian: npt.ArrayLike, problem: Problem, *, check: bool) -> npt.NDArray[np.float32]:
    """A caller's Hessian as float32 [matrices, blocks, 16, 16], symmetric, the identity where it is zero.

    Raises:
        TypeError: it is not of real numbers.
        ValueError: its shape does not fit the weight; with `check`, a block is not finite, not symmetric, or
            not positive semidefinite, beyond rounding.

    Warns:
        ZeroHessianWarning: with `check`, blocks are all zeros.
    """
    array = as_float32("hessian", hessian)
    check_hessian_shape(array.shape, problem)
    wide = array.astype(np.float64)
    if check:
        _check_hessian(array, wide)
    symmetric = ((wide + wide.swapaxes(-1, -2)) / 2).astype(np.float32)
    zero = ~symmetric.any(axis=(-2, -1))
    if check and zero.any():
        warn_of_zero_hessians(int(np.broadcast_to(zero, problem.hessian_shape[:-2]).sum()), problem)
    symmetric[zero] = np.eye(problem.block_size, dtype=np.float32)
    full = np.broadcast_to(symmetric, problem.hessian_shape)
    return full.reshape(problem.view_shape[0], *problem.hessian_shape[-3:])


def normalised_hessian(hessian: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Each of [blocks, 16, 16], none of them all zero, times a power of two: a largest element in [1, 2).

    Which code is best stays as it is. What underflows is off by 2^-150. A block that is not finite, which
    nobody checked, becomes the identity.
    """
    wide = hessian.astype(np.float64)
    wide[~np.isfinite(wide).all(axis=(1, 2))] = np.eye(wide.shape[-1])
    _, exponent = np.frexp(np.abs(wide).max(axis=(1, 2), keepdims=True, initial=0))
    normalised: npt.NDArray[np.float32] = np.ldexp(wide, 1 - exponent).astype(np.float32)
    return normalised


def hessian_bounds(
    hessian: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """What theorem 10 needs of normalised float32 [blocks, 16, 16]: c [blocks, 16] and mu [blocks].

    Both are rounded to the safe side: c up, mu down.
    """
    wide = hessian.astype(np.float64)
    sums = np.nextafter(np.abs(wide).sum(axis=-1).astype(np.float32), np.float32(np.inf))
    sums[~wide.any(axis=-1)] = 0
    root = np.sqrt(np.where(sums > 0, sums, 1).astype(np.float64))
    scaled = wide / (root[:, :, None] * root[:, None, :])
    scaled[:, np.arange(scaled.shape[1]), np.arange(scaled.shape[1])] += sums == 0  # these elements are free
    least = np.linalg.eigvalsh(scaled)[:, 0] - 2.0**-40 if len(scaled) else np.empty(0)
    return sums, np.nextafter(least.astype(np.float32), np.float32(-np.inf))


def check_hessian_shape(shape: tuple[int, ...], problem: Problem) -> None:
    full = problem.hessian_shape
    if shape not in (full, full[-3:]):
        stacked = f", or {list(full)} for one a matrix" if problem.batch_dims else ""
        raise ValueError(
            f"hessian has shape {shape}: it must be {list(full[-3:])}, [blocks along axis {problem.axis}, "
            f"{problem.block_size}, {problem.block_size}]{stacked}"
        )


def _check_hessian(array: npt.NDArray[np.float32], wide: npt.NDArray[np.float64]) -> None:
    if not np.isfinite(array).all():
        index = np.argwhere(~np.isfinite(array))[0]
        raise hessian_error(index, f"is {array[tuple(index)]}: every element must be finite")
    scale = np.abs(wide).max(axis=(-2, -1), initial=0)
    bad = np.abs(wide - wide.swapaxes(-1, -2)) > HESSIAN_TOLERANCE * scale[..., None, None]
    if bad.any():
        *block, i, j = np.argwhere(bad)[0]
        there, here = array[(*block, i, j)], array[(*block, j, i)]
        raise hessian_error(
            [*block, i, j], f"is {there} and its mirror image is {here}: it must be symmetric"
        )
    least = np.linalg.eigvalsh((wide + wide.swapaxes(-1, -2)) / 2)[..., 0]
    bad = least < -HESSIAN_TOLERANCE * scale
    if bad.any():
        index = np.argwhere(bad)[0]
        raise hessian_error(
            index, f"has the eigenvalue {least[tuple(index)]:.4g}: it must be positive semidefinite"
        )


def hessian_error(index: Sequence[int], what: str) -> ValueError:
    return ValueError(f"hessian[{', '.join(str(int(i)) for i in index)}] {what}")


def warn_of_zero_hessians(count: int, problem: Problem) -> None:
    total = int(np.prod(problem.hessian_shape[:-2], dtype=np.int64))
    warnings.warn(
        f"hessian: {count} of {total} blocks of {problem.block_size} inputs are all zeros, as for an expert "
        f"that was never routed: they are searched by plain squared error",
        ZeroHessianWarning,
        stacklevel=2,
    )


def as_float32(name: str, values: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The values of an importance or a hessian, rounded; TypeError if they are not real numbers."""
    array = np.asarray(values)
    if array.dtype.kind not in _REAL:
        raise TypeError(f"{name} has dtype {array.dtype}: it must be real numbers")
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)
