"""The XLA engine: plain jnp, exact, for anything that can be traced.

Codes are looked at in float32 for the plain squared error (_screen.py) and in float64 for the other
objectives (_walk.py). What their margins cannot separate is compared exactly (_settle.py).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nvfp4sweep import formats
from nvfp4sweep.problem import Problem
from nvfp4sweep_jax import _arithmetic as exact
from nvfp4sweep_jax._amax import absolute_maximum, as_float32
from nvfp4sweep_jax._blocks import MAX_UNROLLED_BLOCK_SIZE, Reader, block_view, gatherer, reader
from nvfp4sweep_jax._operands import PER_MATRIX, Found, Operands, shape_of
from nvfp4sweep_jax._partition import on_shards
from nvfp4sweep_jax._quadratic import QuadraticForm, prepared
from nvfp4sweep_jax._screen import screen, whole_window
from nvfp4sweep_jax._settle import settle, within
from nvfp4sweep_jax._squares import Squares, WeightedSquares
from nvfp4sweep_jax._walk import Quadratic, Weighted, walk

Array = jax.Array

#: They seldom leave a block contested, of those that the screen leaves so.
_BLIND_ROUNDS = 2


@partial(jax.jit, static_argnames=("problem", "outputs"))
def run(operands: Operands, problem: Problem, outputs: tuple[str, ...]) -> Found:
    """Search every block and compute the fields of Found named in `outputs`."""
    operands = operands._replace(weight=as_float32(operands.weight))
    return on_shards(search, operands, problem, outputs)


def search(operands: Operands, problem: Problem, outputs: tuple[str, ...]) -> Found:
    """The same on one device."""
    weight, global_amax = operands.weight, operands.global_amax
    largest = None
    if global_amax is None or "largest" in outputs:
        largest = absolute_maximum(weight, problem)
        global_amax = largest if global_amax is None else global_amax
    found = {"largest": largest, "global_amax": global_amax}
    if "global_scale" in outputs:
        with jax.enable_x64(True):
            found["global_scale"] = exact.checkpoint_scale(global_amax)
    if not set(outputs) <= set(PER_MATRIX):
        found |= _search_blocks(operands, global_amax, problem, outputs)
    return Found(**{name: found[name] for name in outputs})


def _search_blocks(
    operands: Operands, global_amax: Array, problem: Problem, outputs: tuple[str, ...]
) -> dict[str, Array]:
    if not math.prod(problem.block_shape):
        return {name: jnp.zeros(*shape_of(name, problem)) for name in outputs if name not in PER_MATRIX}
    weight = exact.hold(operands.weight)
    amax_bits = exact.magnitude_bits(global_amax)
    amax_bits = amax_bits.reshape(amax_bits.shape + (1,) * (weight.ndim - problem.batch_dims))
    form_of = _forms(operands._replace(weight=weight), amax_bits, problem)
    if problem.objective == "squared":
        look = screen if problem.block_size <= MAX_UNROLLED_BLOCK_SIZE else whole_window
        words = look(weight, amax_bits, problem)
    found = {}
    with jax.enable_x64(True):
        if problem.objective == "importance":
            words = walk(Weighted(form_of), amax_bits, problem)
        elif problem.objective == "hessian":
            words = walk(Quadratic(form_of), amax_bits, problem)
        code = settle(
            words,
            form_of,
            amax_bits,
            blind_rounds=_BLIND_ROUNDS if problem.objective == "squared" else 0,
            passes=problem.objective != "hessian",
        )
        scale = exact.block_scale(code, exact.widen(amax_bits))
        if "amax" in outputs:
            found["amax"] = exact.narrow(exact.block_amax(code, exact.widen(amax_bits)))
        if "code" in outputs:
            found["code"] = code.astype(jnp.uint8)
        if "error" in outputs:
            error = form_of(None, None).error(scale)
            found["error"] = exact.narrow_signed(exact.round_signed_to_float32(error))
        if "packed" in outputs:
            found["packed"] = _pack(block_view(weight, problem), scale, problem)
    return found


def _forms(operands: Operands, amax_bits: Array, problem: Problem) -> Callable[..., Any]:
    """A function that gives the error of the blocks of these numbers, or of all, within a turn of a loop."""
    weight, _, importance, hessian = operands
    with jax.enable_x64(True):
        # A NaN, which no amax is: 1, which XLA does not know.
        one = jnp.where(amax_bits.reshape(-1)[0] == exact.MAGNITUDE_MASK, 2.0, 1.0)
        hessian = None if hessian is None else prepared(hessian)

    def form_of(blocks: Array | None, turn: Array | None) -> Any:
        def read(x: Array) -> Reader:
            x = x if turn is None else within(x, turn)
            return reader(x, problem) if blocks is None else gatherer(blocks, x, problem)

        if hessian is not None:
            return QuadraticForm(read(weight), hessian, problem, one, blocks)
        if importance is not None:
            return WeightedSquares(read(weight), read(importance), problem, one)
        return Squares(read(weight), problem)

    return form_of


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
