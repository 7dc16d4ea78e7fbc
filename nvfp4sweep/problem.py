"""What a caller asks, checked once for all three packages, in the terms that engines use."""

import functools
import math
import operator
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nvfp4sweep.formats import BLOCK_SIZE, MAX_CODE, MIN_CODE
from nvfp4sweep.window import MAX_BLOCK_SIZE

ENGINES = ("oracle", "cpu", "triton", "xla")
IMPLEMENTATION_VARIABLE = "NVFP4SWEEP_IMPLEMENTATION"
WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "float64")
#: sum r^2, sum h r^2 and r^T H r, r the residuals of a block.
OBJECTIVES = ("squared", "importance", "hessian")


@dataclass(frozen=True)
class Problem:
    """A weight of `shape` as `matrices` independent matrices [outer, length, inner].

    Blocks of `block_size` run along `length`, the caller's `axis`. Each matrix has its own global
    amax. Outputs have one entry a block, shape `block_shape`. `objective` tells what is minimised:
    one of OBJECTIVES.
    """

    shape: tuple[int, ...]
    axis: int
    block_size: int
    batch_dims: int
    min_code: int
    objective: str = "squared"

    @functools.cached_property
    def batch_shape(self) -> tuple[int, ...]:
        return self.shape[: self.batch_dims]

    @functools.cached_property
    def block_shape(self) -> tuple[int, ...]:
        return self.along_axis(self.shape[self.axis] // self.block_size)

    @functools.cached_property
    def view_shape(self) -> tuple[int, int, int, int]:
        """[matrices, outer, length, inner]"""
        return (
            math.prod(self.batch_shape),
            math.prod(self.shape[self.batch_dims : self.axis]),
            self.shape[self.axis],
            math.prod(self.shape[self.axis + 1 :]),
        )

    @functools.cached_property
    def matrix_shape(self) -> tuple[int, int, int]:
        return self.view_shape[1:]

    @functools.cached_property
    def hessian_shape(self) -> tuple[int, ...]:
        """[..., blocks along `axis`, block_size, block_size]: the leading axes are the batch axes."""
        size = self.block_size
        return (*self.batch_shape, self.shape[self.axis] // size, size, size)

    @functools.cached_property
    def packed_shape(self) -> tuple[int, ...]:
        """Of the E2M1 codes, two a byte along `axis`."""
        return self.along_axis(self.shape[self.axis] // 2)

    def along_axis(self, length: int) -> tuple[int, ...]:
        """The weight's shape with `axis` replaced by `length`."""
        return (*self.shape[: self.axis], length, *self.shape[self.axis + 1 :])


def make_problem(
    shape: Sequence[int],
    *,
    axis: int = -1,
    block_size: int = BLOCK_SIZE,
    batch_dims: int = 0,
    min_code: int = MIN_CODE,
    importance: object = None,
    hessian: object = None,
) -> Problem:
    """Check everything that does not need the weight's values.

    Of `importance` and `hessian` only whether they are given matters here.

    Raises:
        TypeError: an argument that should be an integer is not one.
        ValueError: an integer out of its range, an axis that blocks do not divide, both an importance
            and a hessian, or a hessian for blocks that are not of 16.
    """
    objective = "squared"
    if importance is not None:
        objective = "importance"
    if hessian is not None:
        if importance is not None:
            raise ValueError("importance and hessian are both given: a search minimises one of them")
        objective = "hessian"
    return _checked(
        tuple(map(int, shape)),  # symbolic sizes, too
        _integer("axis", axis),
        _integer("block_size", block_size),
        _integer("batch_dims", batch_dims),
        _integer("min_code", min_code),
        objective,
    )


@functools.lru_cache(maxsize=4096)
def _checked(
    shape: tuple[int, ...], axis: int, block_size: int, batch_dims: int, min_code: int, objective: str
) -> Problem:
    if not 0 <= batch_dims < max(1, len(shape)):
        raise ValueError(
            f"batch_dims={batch_dims} is out of range for a weight of shape {shape}: "
            f"it must be at least 0 and leave an axis for the blocks"
        )
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis={axis} is out of range for a weight of shape {shape}")
    axis %= len(shape)
    if axis < batch_dims:
        raise ValueError(
            f"axis={axis} is one of the batch_dims={batch_dims} leading axes: blocks must lie within a matrix"
        )
    if not 1 <= block_size <= MAX_BLOCK_SIZE:
        raise ValueError(f"block_size={block_size} must lie in 1 .. {MAX_BLOCK_SIZE}")
    if shape[axis] % block_size:
        raise ValueError(
            f"axis {axis} of a weight of shape {shape} has length {shape[axis]}, "
            f"which block_size={block_size} does not divide"
        )
    check_min_code(min_code)
    if objective == "hessian" and block_size != BLOCK_SIZE:
        raise ValueError(f"block_size={block_size} must be {BLOCK_SIZE} with a hessian")
    return Problem(shape, axis, block_size, batch_dims, min_code, objective)


def check_min_code(min_code: int) -> None:
    if not MIN_CODE <= min_code <= MAX_CODE:
        raise ValueError(f"min_code={min_code} must lie in {MIN_CODE} .. {MAX_CODE}")


def check_packable(problem: Problem) -> None:
    if problem.block_size % 2:
        raise ValueError(
            f"block_size={problem.block_size} is odd: quantize packs two codes of one block into a byte"
        )


def choose_engine(implementation: str | None, *, default: str, served: Sequence[str], where: str) -> str:
    """The engine to use: the argument, else NVFP4SWEEP_IMPLEMENTATION, else the default.

    Raises:
        ValueError: an unknown engine, or one that cannot serve an array that lives at `where`.
    """
    source = "implementation"
    if implementation is None:
        implementation = os.environ.get(IMPLEMENTATION_VARIABLE) or None
        source = IMPLEMENTATION_VARIABLE
    if implementation is None:
        return default
    if implementation not in ENGINES:
        raise ValueError(f"{source}={implementation!r} is unknown: choose one of {', '.join(ENGINES)}")
    if implementation not in served:
        raise ValueError(
            f"{source}={implementation!r} cannot serve {where}: choose one of {', '.join(served)}"
        )
    return implementation


def check_dtype(name: str, dtype: str) -> None:
    if dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{name} has dtype {dtype}: it must be one of {', '.join(WEIGHT_DTYPES)}")


def global_amax_per_matrix(values: npt.ArrayLike, problem: Problem) -> npt.NDArray[np.float32]:
    """A caller's global_amax as float32 [matrices], checked.

    Raises:
        ValueError: negative, NaN or infinite, or a shape that does not broadcast to the batch.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "fiuV":  # V: the dtypes of ml_dtypes
        raise TypeError(f"global_amax has dtype {array.dtype}: it must be real numbers")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    check_global_amax_shape(array.shape, problem)
    bad = ~(np.isfinite(array) & (array >= 0))
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"global_amax{list(index) if index else ''} is {array[index]}: it must be finite and >= 0"
        )
    return np.broadcast_to(array, problem.batch_shape).flatten()


def check_global_amax_shape(shape: tuple[int, ...], problem: Problem) -> None:
    try:
        fits = np.broadcast_shapes(shape, problem.batch_shape) == problem.batch_shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"global_amax has shape {shape}: it must be a scalar or broadcast to the leading "
            f"batch_dims={problem.batch_dims} axes, shape {problem.batch_shape}"
        )


def check_same_batch(shapes: Sequence[tuple[int, ...]], batch_dims: int) -> None:
    """Weights that share a global amax must stack the same number of matrices."""
    if len(set(shapes)) > 1:
        raise ValueError(
            f"weights differ in their leading batch_dims={batch_dims} axes: {sorted(set(shapes))}"
        )


def nonfinite_error(name: str, index: Sequence[int], value: object) -> ValueError:
    return ValueError(
        f"{name}[{', '.join(str(int(i)) for i in index)}] is {value}: every element must be finite "
        f"(as float32); check_finite=False skips this check"
    )


def foreign_array_error(name: str, value: object, expected: str) -> TypeError:
    """The exception for an argument of the wrong kind, which names the package for that kind."""
    kinds = {
        "torch": ("Tensor", "a PyTorch tensor", "nvfp4sweep_torch"),
        "jax": ("Array", "a JAX array", "nvfp4sweep_jax"),
        "numpy": ("ndarray", "a NumPy array", "nvfp4sweep"),
    }
    for module, (class_name, kind, package) in kinds.items():
        # An array can only exist if its framework is imported already: nothing is imported here.
        cls = getattr(sys.modules.get(module), class_name, None)
        if cls is not None and isinstance(value, cls):
            return TypeError(f"{name} is {kind}, and {expected} is needed here: use {package}")
    return TypeError(f"{name} is a {type(value).__name__}: it must be {expected}")


def _integer(name: str, value: Any) -> int:
    if type(value) is int:
        return value
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={value} is a bool: it must be an integer")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: it must be an integer") from None
