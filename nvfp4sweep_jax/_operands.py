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
        importance: float32 of the weight's rank, with axes of length 1 where it repeats.
        hessian: float32 of problem.hessian_shape, or without its batch axes where all matrices share it.
    """

    weight: Any
    global_amax: Any = None
    importance: Any = None
    hessian: Any = None


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
        is_mapped = mapped[0]._asdict()
        if not is_mapped["weight"]:  # other global amaxes, or weights of its errors, for the same weight
            varied = {name: x for name, x in operands._asdict().items() if x is not None and is_mapped[name]}
            found = lax.map(lambda varied: search(operands._replace(**varied)), varied)
        else:
            stack = functools.partial(_stack, size=size, batch=problem.batch_shape)
            stacked = {name: stack(name, x, is_mapped[name]) for name, x in operands._asdict().items()}
            found = over_stacks(run, _stacked(problem, size), outputs)(Operands(**stacked))
        return found, jax.tree.map(lambda _: True, found)

    return search


def _stack(name: str, x: Any, is_mapped: bool, size: int, batch: tuple[int, ...]) -> Any:
    """An operand of one matrix more or less, as one of so many stacked ones."""
    if x is None:
        return None
    if name == "hessian" and x.ndim - is_mapped == 3 and not is_mapped:
        return x  # all share it
    if name == "hessian" and x.ndim - is_mapped == 3:
        ones = (1,) * len(batch)
        return jnp.broadcast_to(x.reshape(size, *ones, *x.shape[1:]), (size, *batch, *x.shape[1:]))
    if is_mapped:
        return x
    return x[None] if name == "importance" else jnp.broadcast_to(x, (size, *x.shape))


def _stacked(problem: Problem, size: int) -> Problem:
    return dataclasses.replace(
        problem, shape=(size, *problem.shape), axis=problem.axis + 1, batch_dims=problem.batch_dims + 1
    )
