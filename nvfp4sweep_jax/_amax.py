"""The largest magnitude of a weight, and float64 weights as float32: before any search."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax

from nvfp4sweep.problem import Problem
from nvfp4sweep_jax import _arithmetic as exact

Array = jax.Array


_SLICES = 8


@partial(jax.jit, static_argnames="problem")
def absolute_maximum(weight: Array, problem: Problem) -> Array:
    """float32 of problem.batch_shape: each matrix's largest |w|; NaN or infinite if an element is."""
    axis = problem.axis
    axes = tuple(range(problem.batch_dims, weight.ndim))
    weight = as_float32(weight)
    # As integers, whose order keeps NaN the largest and subnormals apart from 0. XLA on a CPU is slow to
    # reduce those, so most of it is done elementwise.
    length = weight.shape[axis]
    slices = _SLICES if length % _SLICES == 0 else 1
    view = weight.reshape(*weight.shape[:axis], length // slices, slices, *weight.shape[axis + 1 :])
    parts = [exact.magnitude_bits(lax.index_in_dim(view, i, axis + 1, keepdims=False)) for i in range(slices)]
    bits = jnp.max(reduce(jnp.maximum, parts), axis=axes, initial=0)
    return exact.from_bits(bits)


@jax.jit
def largest(amaxes: list[Array]) -> Array:
    """The elementwise maximum of float32 arrays >= 0, subnormals and NaN included."""
    return exact.from_bits(jnp.max(jnp.stack([exact.float32_bits(amax) for amax in amaxes]), axis=0))


def as_float32(weight: Array) -> Array:
    """A float64 weight rounded to float32; others as they are."""
    if weight.dtype != jnp.float64:
        return weight
    with jax.enable_x64(True):
        return exact.as_float32(weight)
