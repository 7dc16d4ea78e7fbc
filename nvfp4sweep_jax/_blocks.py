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

#: The elements of larger blocks are walked by a loop.
MAX_UNROLLED_BLOCK_SIZE = 32
_CHUNK = 16


def block_view(x: Array, problem: Problem) -> Array:
    """[..., blocks, block_size, ...]: the block axis is never merged with another."""
    axis, size = problem.axis, problem.block_size
    return x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])


def fold(
    element: Callable[[Any], Array], problem: Problem, step: Callable[[Any, Array], Any], start: Any
) -> Any:
    """step(...step(step(start, element(0)), element(1))..., element(block_size - 1))."""
    size = problem.block_size
    looped = size - size % _CHUNK if size > MAX_UNROLLED_BLOCK_SIZE else 0

    def chunk(turn: Array, state: Any) -> Any:
        for i in range(_CHUNK):
            state = step(state, element(turn * _CHUNK + i))
        return state

    if looped:
        start = lax.fori_loop(0, looped // _CHUNK, chunk, start)
    for i in range(looped, size):
        start = step(start, element(i))
    return start


def tree(combine: Callable[[Array, Array], Array], terms: list[Array]) -> Array:
    while len(terms) > 1:
        pairs = [combine(a, b) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0]


def reader(view: Array, problem: Problem) -> Callable[[Any], Array]:
    """A function that gives element i of every block."""
    return lambda i: lax.dynamic_index_in_dim(view, i, problem.axis + 1, keepdims=False)


def gatherer(blocks: Array, x: Array, problem: Problem) -> Callable[[Any], Array]:
    """A function that gives element i of the blocks of these numbers."""
    flat = x.reshape(-1)
    inner = problem.view_shape[-1]
    if math.prod(problem.shape) >= 2**31:
        blocks = blocks.astype(jnp.int64)
    first = blocks // inner * (problem.block_size * inner) + blocks % inner
    if problem.block_size > MAX_UNROLLED_BLOCK_SIZE:
        return lambda i: flat.at[first + i * inner].get(mode="promise_in_bounds")
    # At once: XLA may convert what it gathers from, and would keep that for several gathers.
    places = first + (jnp.arange(problem.block_size, dtype=blocks.dtype) * inner)[:, None]
    found = flat.at[places].get(mode="promise_in_bounds")
    return lambda i: found[i]
