"""Which leaves of a parameter tree are weights, along which axis their blocks run, and what they share."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nvfp4sweep import problem as problems

Rule = Callable[[str, Any], Any]  # of a leaf's name, such as "layers/0/mlp/kernel", and the leaf

_SEPARATOR = "/"
_HOLDER = "value"  # of a flax nnx variable


class Weight(NamedTuple):
    """A leaf to search, and how."""

    name: str
    array: jax.Array
    axis: int
    batch_dims: int
    group: Any
    shares: bool  # its group has other members


def is_linear_weight(name: str, leaf: Any) -> bool:
    """Whether a leaf is a floating-point "kernel" or "weight" of two axes or more."""
    if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
        return False
    return _last(name) in ("kernel", "weight") and leaf.ndim >= 2


def weights(
    params: Any,
    where: Rule | None,
    axis: int | Rule | None,
    batch_dims: int | Rule,
    group: Rule | None,
    block_size: int,
) -> tuple[list[Weight | None], Any]:
    """The leaves in order, None for those that are no weights, and the tree's structure; all checked."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    found: list[Weight | None] = []
    first_of: dict[Any, tuple[str, tuple[int, ...]]] = {}
    size_of: Counter[Any] = Counter()
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=_SEPARATOR)
        if not (where or is_linear_weight)(name, leaf):
            found.append(None)
            continue
        with named(name):
            if not isinstance(leaf, jax.Array):
                raise problems.foreign_array_error("the leaf", leaf, "a JAX array")
            dims = batch_dims(name, leaf) if callable(batch_dims) else batch_dims
            along = axis(name, leaf) if callable(axis) else axis
            along = _usual_axis(name, leaf, dims) if along is None else along
            asked = problems.make_problem(leaf.shape, axis=along, block_size=block_size, batch_dims=dims)
            key = group(name, leaf) if group else None
            key = (name,) if key is None else key
            first, batch_shape = first_of.setdefault(key, (name, asked.batch_shape))
            if batch_shape != asked.batch_shape:
                raise ValueError(
                    f"group {key!r} has {first} of leading axes {batch_shape}: they must be equal to"
                    f" {asked.batch_shape}, as each stacked matrix has its own global amax"
                )
        size_of[key] += 1
        found.append(Weight(name, leaf, asked.axis, asked.batch_dims, key, False))
    return [weight and weight._replace(shares=size_of[weight.group] > 1) for weight in found], structure


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Put a leaf's name in front of what is wrong with it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"params[{name!r}]: {error}") from error


def _usual_axis(name: str, leaf: jax.Array, batch_dims: int) -> int:
    """flax's "kernel" is [in, out], a "weight" is [out, in]; blocks run along `in`."""
    if leaf.ndim - batch_dims == 2 and _last(name) in ("kernel", "weight"):
        return -2 if _last(name) == "kernel" else -1
    raise ValueError(
        f"no rule tells its input axis from its name and shape {leaf.shape}: give axis, "
        f"or batch_dims if it stacks matrices"
    )


def _last(name: str) -> str:
    parts = name.split(_SEPARATOR)
    return parts[-2] if len(parts) > 1 and parts[-1] == _HOLDER else parts[-1]
