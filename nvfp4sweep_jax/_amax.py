"""The largest magnitude of a weight, and float64 weights as float32: before any search."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nvfp4sweep.problem import Problem
from nvfp4sweep_jax import _arithmetic as exact

Array = jax.Array


@partial(jax.jit, static_argnames="problem")
def absolute_maximum(weight: Array, problem: Problem) -> Array:
    """float32 of problem.batch_shape: each matrix's largest |w|; NaN or infinite if an element is."""
    weight = as_float32(lax.stop_gradient(weight))
    axes = tuple(range(problem.batch_dims, weight.ndim))
    magnitude = jnp.abs(weight)
    # XLA may skip NaN in a maximum.
    finite = jnp.where(magnitude < np.inf, magnitude, np.array(np.inf, weight.dtype))
    largest = exact.magnitude_bits(jnp.max(finite, axis=axes, initial=0))

    # Subnormals may count as 0 there, and NaN as infinity. Integers tell them apart, but XLA is slow to
    # compare those: the loop runs once, and only where it matters.
    def compare_bits(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        bits = jnp.max(exact.magnitude_bits(weight), axis=axes, initial=0)
        return bits, bits < 0

    unsure = (largest < exact.SMALLEST_NORMAL_BITS) | (largest >= exact.INF_BITS)
    bits, _ = lax.while_loop(lambda carry: jnp.any(carry[1]), compare_bits, (largest, unsure))
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
