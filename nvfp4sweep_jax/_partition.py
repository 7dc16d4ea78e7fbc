"""A search on a sharded weight: every device searches its own blocks; only global amaxes cross devices.

An engine is a function of whole arrays, as if there were one device. Here it becomes a primitive, opaque
until it is lowered, and the partitioner is told how that splits. So an engine may flatten and gather.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from nvfp4sweep.problem import Problem
from nvfp4sweep_jax import _arithmetic as exact
from nvfp4sweep_jax._operands import PER_MATRIX, Found, Operands, Run, shape_of

Array = jax.Array
Axes = Sequence[tuple[str, ...]]  # of a mesh, those that split each axis of an array
Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of the operands, by name


def on_shards(search: Run, operands: Operands, problem: Problem, outputs: tuple[str, ...]) -> Found:
    """search(operands, problem, outputs), wherever the weight's shards are."""
    arrays = {name: x for name, x in operands._asdict().items() if x is not None}
    shapes = tuple((name, x.shape) for name, x in arrays.items())
    results = _partitioned(search, shapes, problem, outputs)(*arrays.values())
    # Within shard_map they vary as the operands do.
    varying = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays.values()))
    return Found(**dict(zip(outputs, lax.pcast(results, tuple(sorted(varying)), to="varying"), strict=True)))


@functools.cache
def _partitioned(
    search: Run, shapes: Shapes, problem: Problem, outputs: tuple[str, ...]
) -> Callable[..., tuple[Array, ...]]:
    given = tuple(name for name, _ in shapes)

    def whole(*arrays: Array) -> tuple[Array, ...]:
        return tuple(_search_p.bind(*arrays, search=search, given=given, problem=problem, outputs=outputs))

    def partition(mesh: Mesh, operands: Any, results: Any) -> Any:
        axes = _axes_of(operands[0].sharding, mesh, problem)
        pieces = [math.prod(mesh.shape[name] for name in names) for names in axes]
        local = dataclasses.replace(
            problem, shape=tuple(size // n for size, n in zip(problem.shape, pieces, strict=True))
        )
        across = tuple(name for names in axes[problem.batch_dims :] for name in names)

        def sharding(split: Axes) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*split))

        return (
            mesh,
            functools.partial(
                _search_shard, search=search, given=given, problem=local, outputs=outputs, across=across
            ),
            tuple(sharding(axes[: problem.batch_dims] if name in PER_MATRIX else axes) for name in outputs),
            tuple(sharding(_split(name, shape, axes, problem)) for name, shape in shapes),
        )

    partitioned = custom_partitioning(whole)
    rule, sizes = _sharding_rule(problem, outputs, shapes)
    partitioned.def_partition(partition, decode_shardings=False, sharding_rule=rule, **sizes)
    return partitioned


def _split(name: str, shape: tuple[int, ...], axes: Axes, problem: Problem) -> Axes:
    """The same of an operand, where these split the weight."""
    batch = axes[: problem.batch_dims]
    if name == "global_amax":
        return batch
    if name == "hessian":
        return [*(batch if len(shape) > 3 else ()), axes[problem.axis]]
    return [names if size > 1 else () for size, names in zip(shape, axes, strict=True)]


def _axes_of(sharding: Sharding, mesh: Mesh, problem: Problem) -> list[tuple[str, ...]]:
    """The axes of the mesh that split each axis of the weight; none anywhere if that would cut blocks."""
    n_axes = len(problem.shape)
    for names in itertools.permutations(name for name, size in mesh.shape.items() if size > 1):
        for places in itertools.product(range(-1, n_axes), repeat=len(names)):
            axes = [
                tuple(name for name, place in zip(names, places, strict=True) if place == i)
                for i in range(n_axes)
            ]
            if NamedSharding(mesh, PartitionSpec(*axes)).is_equivalent_to(sharding, n_axes):
                pieces = math.prod(mesh.shape[name] for name in axes[problem.axis])
                if problem.shape[problem.axis] // problem.block_size % pieces == 0:
                    return axes
    return [()] * n_axes


def _sharding_rule(problem: Problem, outputs: tuple[str, ...], shapes: Shapes) -> tuple[str, dict[str, int]]:
    """Which axes of operands and results correspond, and the sizes of those that only some have."""
    axes = [f"a{i}" for i in range(len(problem.shape))]
    sizes = {"element": problem.block_size}

    def along(factor: str) -> str:
        return " ".join([*axes[: problem.axis], factor, *axes[problem.axis + 1 :]])

    batch = " ".join(axes[: problem.batch_dims])
    blocks = axes[problem.axis]
    rule_of = {name: batch if name in PER_MATRIX else along(blocks) for name in outputs}
    if "packed" in outputs:
        rule_of["packed"] = along(f"({blocks} byte)")
        sizes["byte"] = problem.block_size // 2
    operands = {"weight": along(f"({blocks} element)"), "global_amax": batch}
    for name, shape in shapes:
        if name == "importance":
            full = [*axes[: problem.axis], f"({blocks} element)", *axes[problem.axis + 1 :]]
            ones = [f"one{i}" for i in range(len(shape))]
            sized = zip(full, ones, shape, strict=True)
            operands[name] = " ".join(factor if size > 1 else one for factor, one, size in sized)
        elif name == "hessian":
            operands[name] = f"{batch if len(shape) > 3 else ''} {blocks} row column"
    return f"{', '.join(operands[name] for name, _ in shapes)} -> {', '.join(rule_of.values())}", sizes


def _search_shard(
    *arrays: Array,
    search: Run,
    given: tuple[str, ...],
    problem: Problem,
    outputs: tuple[str, ...],
    across: tuple[str, ...],
) -> tuple[Array, ...]:
    """A device's part: blocks are its own, the largest magnitude is that of all parts `across` the mesh."""
    with jax.sharding.use_abstract_mesh(_NO_MESH):
        operands = Operands(**dict(zip(given, arrays, strict=True)))
        known = {}
        if across and (operands.global_amax is None or "largest" in outputs):
            own = search(
                Operands(operands.weight), dataclasses.replace(problem, objective="squared"), ("global_amax",)
            ).global_amax
            # As bits, whose order keeps NaN the largest.
            known["largest"] = exact.from_bits(lax.pmax(exact.float32_bits(own), across))
            if operands.global_amax is None:
                operands = operands._replace(global_amax=known["largest"])
        found = search(operands, problem, tuple(name for name in outputs if name not in known))
        return tuple(known[name] if name in known else getattr(found, name) for name in outputs)


# --- the primitive ----------------------------------------------------------------------------------

_NO_MESH = AbstractMesh((), ())

_search_p = Primitive("nvfp4sweep")
_search_p.multiple_results = True


@_search_p.def_abstract_eval
def _(*arrays: Any, search: Run, given: Any, problem: Problem, outputs: tuple[str, ...]) -> list[Any]:
    return [jax.core.ShapedArray(*shape_of(name, problem)) for name in outputs]


def _lower(
    context: Any,
    *values: Any,
    search: Run,
    given: tuple[str, ...],
    problem: Problem,
    outputs: tuple[str, ...],
) -> Any:
    def whole(*arrays: Array) -> list[Array]:
        found = search(Operands(**dict(zip(given, arrays, strict=True))), problem, outputs)
        return [getattr(found, name) for name in outputs]

    # What is lowered here lives on one device: types without shardings and axes of a mesh.
    with jax.sharding.use_abstract_mesh(_NO_MESH):
        plain = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in context.avals_in]
        return mlir.lower_fun(whole, multiple_results=True)(context.replace(avals_in=plain), *values)


mlir.register_lowering(_search_p, _lower)
