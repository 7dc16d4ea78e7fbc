"""What an engine takes and gives, and what vmap makes of both."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from nvfp4sweep.problem import Problem

Array = jax.Array


class Operands(NamedTuple):
    """The arrays of a call; None for what is not given.

    Attributes:
        weight: of problem.shape, float32, float16, bfloat16 or float64.
        global_amax: float32 of problem.batch_shape; None takes the weight's own.
    """

    weight: Any
    global_amax: Any = None


class Found(NamedTuple):
    """What an engine computes; what was not asked for is None. Shapes as in nvfp4sweep.api."""

    amax: Any = None
    code: Any = None
    error: Any = None
    packed: Any = None
    global_amax: Any = None
    global_scale: Any = None
    largest: Any = None  # |w| of each matrix, float32 of problem.batch_shape


#: Of the fields of Found, those with an entry a matrix.
PER_MATRIX = ("global_amax", "global_scale", "largest")


def shape_of(name: str, problem: Problem) -> tuple[tuple[int, ...], Any]:
    """The shape and dtype of this field of Found."""
    shape = problem.block_shape
    if name in PER_MATRIX:
        shape = problem.batch_shape
    elif name == "packed":
        shape = problem.packed_shape
    return shape, np.dtype(np.uint8 if name in ("code", "packed") else np.float32)


Run = Callable[[Operands, Problem, tuple[str, ...]], Found]


@functools.cache
def over_stacks(run: Run, problem: Problem, outputs: tuple[str, ...]) -> Callable[[Operands], Found]:
    """`run` for a problem; under vmap the mapped axis becomes one more axis of stacked matrices.

    So a loop that settles near-ties runs once for all, and a kernel is launched once.
    """
    search = custom_vmap(lambda operands: run(operands, problem, outputs))

    @search.def_vmap
    def rule(size: int, mapped: tuple[Operands], operands: Operands) -> tuple[Found, Found]:
        if not mapped[0].weight:  # other global amaxes for the same weight
            found = lax.map(lambda amax: search(operands._replace(global_amax=amax)), operands.global_amax)
        else:
            stacked = [
                x if x is None or is_mapped else jnp.broadcast_to(x, (size, *x.shape))
                for x, is_mapped in zip(operands, mapped[0], strict=True)
            ]
            found = over_stacks(run, _stacked(problem, size), outputs)(Operands(*stacked))
        return found, jax.tree.map(lambda _: True, found)

    return search


def _stacked(problem: Problem, size: int) -> Problem:
    return dataclasses.replace(
        problem, shape=(size, *problem.shape), axis=problem.axis + 1, batch_dims=problem.batch_dims + 1
    )
