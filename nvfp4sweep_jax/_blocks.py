"""Where the blocks of a weight lie, and walks over their elements.

A weight is viewed as [..., blocks, block_size, ...] and its elements are read as block_size slices, so
that all arithmetic is elementwise over blocks: XLA vectorises it and fuses it into one loop.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nvfp4sweep.problem import Problem

Array = jax.Array
#: Gives element i of every block, or of some.
Reader = Callable[[Any], Array]

#: The elements of larger blocks are walked by a loop.
MAX_UNROLLED_BLOCK_SIZE = 32
_CHUNK = 16


def block_view(x: Array, problem: Problem) -> Array:
    """[..., blocks, block_size, ...]: the block axis is never merged with another."""
    axis, size = problem.axis, problem.block_size
    return x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])


def reader(x: Array, problem: Problem) -> Reader:
    """Elements of all blocks, of an array of the weight's shape or with ones in it where it repeats."""
    axis = problem.axis
    if x.shape[axis] != problem.shape[axis]:
        return lambda i: x
    view = block_view(x, problem)
    return lambda i: lax.dynamic_index_in_dim(view, i, axis + 1, keepdims=False)


def gatherer(blocks: Array, x: Array, problem: Problem) -> Reader:
    """The same of the blocks of these numbers."""
    flat = x.reshape(-1)
    if math.prod(problem.shape) >= 2**31:
        blocks = blocks.astype(jnp.int64)
    first = jnp.zeros_like(blocks)
    step, stride = 0, 1
    for axis, place in reversed(list(enumerate(places(blocks, problem)))):
        if axis == problem.axis and x.shape[axis] == problem.shape[axis]:
            step = stride
            first += place * (problem.block_size * stride)
        elif x.shape[axis] != 1:
            first += place * stride
        stride *= x.shape[axis]
    if problem.block_size > MAX_UNROLLED_BLOCK_SIZE:
        return lambda i: flat.at[first + i * step].get(mode="promise_in_bounds")
    # At once: XLA may convert what it gathers from, and would keep that for several gathers.
    elements = (jnp.arange(problem.block_size, dtype=blocks.dtype) * step)[:, None]
    found = flat.at[first + elements].get(mode="promise_in_bounds")
    return lambda i: lax.dynamic_index_in_dim(found, i, 0, keepdims=False)


def places(blocks: Array, problem: Problem) -> list[Array]:
    """The index along each axis of problem.block_shape of the blocks of these numbers."""
    found: list[Array] = []
    for size in reversed(problem.block_shape):
        found.insert(0, blocks % size)
        blocks = blocks // size
    return found


def fold(step: Callable[[Any, Any], Any], start: Any, problem: Problem, *, rolled: bool = False) -> Any:
    """step(...step(step(start, 0), 1)..., block_size - 1).

    rolled: as a loop, also over few elements: for long steps, which take long to compile.
    """
    size = problem.block_size
    if rolled:
        return lax.fori_loop(0, size, lambda i, state: step(state, i), start)
    looped = size - size % _CHUNK if size > MAX_UNROLLED_BLOCK_SIZE else 0

    def chunk(turn: Array, state: Any) -> Any:
        for i in range(_CHUNK):
            state = step(state, turn * _CHUNK + i)
        return state

    if looped:
        start = lax.fori_loop(0, looped // _CHUNK, chunk, start)
    for i in range(looped, size):
        start = step(start, i)
    return start


def tree(combine: Callable[[Array, Array], Array], terms: list[Array]) -> Array:
    while len(terms) > 1:
        pairs = [combine(a, b) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0]
