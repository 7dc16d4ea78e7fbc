"""The XLA engine: plain jnp, exact, for anything that can be traced.

The window (nvfp4sweep/window.py) is walked in float32 first (_screen.py). What its margin cannot separate
is compared exactly, in float64 pairs (_settle.py).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from nvfp4sweep import formats
from nvfp4sweep.problem import Problem
from nvfp4sweep_jax import _arithmetic as exact
from nvfp4sweep_jax._amax import absolute_maximum, as_float32
from nvfp4sweep_jax._blocks import MAX_UNROLLED_BLOCK_SIZE, block_view, fold, reader
from nvfp4sweep_jax._operands import PER_MATRIX, Found, Operands
from nvfp4sweep_jax._partition import on_shards
from nvfp4sweep_jax._screen import screen, whole_window
from nvfp4sweep_jax._settle import settle

Array = jax.Array


@partial(jax.jit, static_argnames=("problem", "outputs"))
def run(operands: Operands, problem: Problem, outputs: tuple[str, ...]) -> Found:
    """Search every block and compute the fields of Found named in `outputs`."""
    operands = operands._replace(weight=as_float32(operands.weight))
    return on_shards(search, operands, problem, outputs)


def search(operands: Operands, problem: Problem, outputs: tuple[str, ...]) -> Found:
    weight, global_amax = operands
    largest = None
    if global_amax is None or "largest" in outputs:
        largest = absolute_maximum(weight, problem)
        global_amax = largest if global_amax is None else global_amax
    found = {"largest": largest, "global_amax": global_amax}
    if "global_scale" in outputs:
        with jax.enable_x64(True):
            found["global_scale"] = exact.checkpoint_scale(global_amax)
    if not set(outputs) <= set(PER_MATRIX):
        found |= _search_blocks(weight, global_amax, problem, outputs)
    return Found(**{name: found[name] for name in outputs})


def _search_blocks(
    weight: Array, global_amax: Array, problem: Problem, outputs: tuple[str, ...]
) -> dict[str, Array]:
    weight = exact.hold(weight)
    view = block_view(weight, problem)
    given = global_amax.reshape(global_amax.shape + (1,) * (weight.ndim - problem.batch_dims))
    amax_bits = exact.magnitude_bits(given)
    look = screen if problem.block_size <= MAX_UNROLLED_BLOCK_SIZE else whole_window
    words = look(view, amax_bits, problem)
    found = {}
    with jax.enable_x64(True):
        code = settle(words, weight, amax_bits, problem)
        scale = exact.block_scale(code, exact.widen(amax_bits))
        if "amax" in outputs:
            found["amax"] = exact.narrow(exact.block_amax(code, exact.widen(amax_bits)))
        if "code" in outputs:
            found["code"] = code.astype(jnp.uint8)
        if "error" in outputs:
            found["error"] = exact.narrow(exact.round_to_float32(_error(view, scale, problem)))
        if "packed" in outputs:
            found["packed"] = _pack(view, scale, problem)
    return found


# --- what follows from the codes ------------------------------------------------------------------


def _error(view: Array, scale: Array, problem: Problem) -> Array:
    """float64: the squared error summed element by element in order, as in the oracle."""
    inverse = exact.reciprocal(scale)

    def add(total: Array, w: Array) -> Array:
        magnitude = exact.widen(exact.magnitude_bits(w))
        residual = magnitude - exact.nearest_e2m1(magnitude, inverse) * scale
        # The minimum (with q = 0) is residual^2; it keeps XLA from contracting square and sum.
        return total + jnp.minimum(residual * residual, magnitude * magnitude)

    total: Array = fold(reader(view, problem), problem, add, scale * 0)
    return total


def _pack(view: Array, scale: Array, problem: Problem) -> Array:
    """uint8 of problem.packed_shape: E2M1 codes as packing.encode defines them."""
    axis = problem.axis + 1
    bits = exact.float32_bits(view)
    magnitude = exact.widen(bits & exact.MAGNITUDE_MASK)
    wide = jnp.expand_dims(scale, axis)
    nibble = jnp.where(bits < 0, formats.E2M1_SIGN_BIT, 0).astype(jnp.uint8)
    for step, midpoint in enumerate(formats.E2M1_MIDPOINTS):
        edge = wide * float(midpoint)
        above = magnitude >= edge if step % 2 else magnitude > edge
        nibble += (above & (wide > 0)).astype(jnp.uint8)
    even, odd = (lax.slice_in_dim(nibble, i, None, 2, axis) for i in (0, 1))
    return (even | odd << 4).reshape(problem.packed_shape)
