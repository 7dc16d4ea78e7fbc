"""What the HessianAccumulators of the adapters share: the checks of their arguments, and shapes."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from nvfp4sweep.problem import Problem, make_problem


def moments_problem(weight_shape: Sequence[int], axis: int, batch_dims: int) -> Problem:
    """The checked layout of the weight whose input activations are gathered, in blocks of 16."""
    return make_problem(weight_shape, axis=axis, batch_dims=batch_dims)


def hessian_shape(asked: Problem) -> tuple[int, ...]:
    """[..., blocks, 16, 16]: the leading axes are the weight's batch axes."""
    size = asked.block_size
    return (*asked.batch_shape, asked.shape[asked.axis] // size, size, size)


def importance_shape(asked: Problem) -> tuple[int, ...]:
    """One value for each input, in a shape that broadcasts to the weight's: [K], [K, 1], [E, 1, K]."""
    before = (1,) * (asked.axis - asked.batch_dims) if asked.batch_dims else ()
    after = (1,) * (len(asked.shape) - 1 - asked.axis)
    return (*asked.batch_shape, *before, asked.shape[asked.axis], *after)


def expert_index(
    expert: Any, asked: Problem, is_unknown: Callable[[Any], bool] = lambda index: False
) -> tuple[Any, ...]:
    """Which of the stacked matrices a caller means: () for all of them.

    Args:
        expert: an integer, a tuple of them for batch_dims > 1, or None.
        asked: the layout of the weight.
        is_unknown: whether an index has no value yet, under tracing: it is passed on unchecked.

    Raises:
        TypeError: something else than an integer, or a tuple of integers.
        ValueError: an index for a weight without batch axes, too few or too many, or one out of range.
    """
    if expert is None:
        return ()
    given = expert if isinstance(expert, tuple) else (expert,)
    try:
        index = tuple(i if is_unknown(i) else operator.index(i) for i in given)
    except TypeError:
        raise TypeError(f"expert={expert!r} is a {type(expert).__name__}: it must be an integer") from None
    stacked = asked.batch_shape
    if not stacked:
        raise ValueError(f"expert={expert} is given for a weight of shape {asked.shape} with batch_dims=0")
    if len(index) != len(stacked) or not all(
        is_unknown(i) or 0 <= i < n for i, n in zip(index, stacked, strict=True)
    ):
        raise ValueError(
            f"expert={expert} is out of range: the weight's leading batch_dims={len(stacked)} axes "
            f"have length {', '.join(map(str, stacked))}"
        )
    return index


def count_tokens(shape: Sequence[int], asked: Problem, *, one_expert: bool) -> int:
    """How many tokens activations of this shape hold, for each stacked matrix that they are for.

    Raises:
        ValueError: the last axis is not the weight's input axis, or the leading ones are not its stack.
    """
    shape = tuple(shape)
    stacked = () if one_expert else asked.batch_shape
    inputs = asked.shape[asked.axis]
    if len(shape) <= len(stacked) or shape[-1] != inputs or shape[: len(stacked)] != stacked:
        expected = f"[{', '.join([*map(str, stacked), '...', str(inputs)])}]"
        hint = ", or expert must say whose they are" if stacked else ""
        raise ValueError(
            f"activations has shape {shape}: it must be {expected} for a weight of shape {asked.shape} "
            f"with axis={asked.axis}{hint}"
        )
    return math.prod(shape[len(stacked) : -1])


def check_same_layout(other: Problem, asked: Problem) -> None:
    if other != asked:
        raise ValueError(
            f"other is for a weight of shape {other.shape} with axis={other.axis}, "
            f"batch_dims={other.batch_dims}: it must be for one of shape {asked.shape} with "
            f"axis={asked.axis}, batch_dims={asked.batch_dims}"
        )


def nonfinite_moments_error(index: Sequence[int], asked: Problem) -> ValueError:
    """The exception for a Hessian that is not finite; `index` leads to its first such block."""
    *expert, block = index
    first = block * asked.block_size
    whose = f" of expert {', '.join(map(str, expert))}" if expert else ""
    return ValueError(
        f"the second moments of inputs {first} .. {first + asked.block_size - 1}{whose} are not finite: "
        f"activations were added with NaN, with infinity, or so large that their squares exceed float32"
    )
