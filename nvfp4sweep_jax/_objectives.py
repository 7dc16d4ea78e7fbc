"""A caller's importance or Hessian, checked, as engines take it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nvfp4sweep import objectives
from nvfp4sweep.problem import Problem
from nvfp4sweep_jax._amax import as_float32

Array = jax.Array


def canonical_importance(importance: Any, problem: Problem, check_values: bool) -> Array:
    """float32 of the weight's rank, with axes of length 1 where it repeats.

    Raises:
        TypeError, ValueError: as nvfp4sweep.objectives.importance_view; of a traced one the values are not
            looked at.
    """
    array = _as_float32("importance", importance)
    objectives.check_importance_shape(array.shape, problem)
    if check_values and _has_values(importance):
        objectives.importance_view(np.asarray(importance), problem, check=True)
    return lax.expand_dims(array, range(len(problem.shape) - array.ndim))


def canonical_hessian(hessian: Any, problem: Problem, check_values: bool) -> Array:
    """float32 of problem.hessian_shape, or without its batch axes.

    Raises, Warns:
        As nvfp4sweep.objectives.hessian_per_matrix; of a traced one the values are not looked at.
    """
    array = _as_float32("hessian", hessian)
    objectives.check_hessian_shape(array.shape, problem)
    if check_values and _has_values(hessian):
        objectives.hessian_per_matrix(np.asarray(hessian), problem, check=True)
    return array


def _has_values(x: Any) -> bool:
    """Whether a host can look at all of it."""
    return not isinstance(x, jax.core.Tracer) and (not isinstance(x, jax.Array) or x.is_fully_addressable)


def _as_float32(name: str, x: Any) -> Array:
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
        if x.dtype.kind not in "fiuV":  # V: the dtypes of ml_dtypes
            raise TypeError(f"{name} has dtype {x.dtype}: it must be real numbers")
        with np.errstate(over="ignore"):
            return jnp.asarray(x.astype(np.float32))
    if not jnp.issubdtype(x.dtype, jnp.number) or jnp.iscomplexobj(x):
        raise TypeError(f"{name} has dtype {x.dtype}: it must be real numbers")
    return as_float32(x).astype(jnp.float32)
