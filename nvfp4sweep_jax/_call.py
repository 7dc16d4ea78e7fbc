"""A checked call, and the choice of an engine for where its arrays live."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nvfp4sweep import problem as problems
from nvfp4sweep.problem import Problem
from nvfp4sweep_jax import _amax, _eager, _objectives, _triton, _xla
from nvfp4sweep_jax._operands import Found, Operands, Run, over_stacks

#: What each public function needs of an engine.
_OUTPUTS = {
    "calibrate": ("amax",),
    "sweep": ("amax", "code", "error", "global_amax"),
    "quantize": ("code", "packed", "global_scale"),
}


def search(
    function: str,
    weight: Any,
    global_amax: Any,
    axis: int,
    block_size: int,
    batch_dims: int,
    importance: Any,
    hessian: Any,
    min_code: int,
    check_finite: bool,
    implementation: str | None,
) -> tuple[Problem, Found]:
    """Check the arguments of the public function of this name and compute what it returns."""
    weight = as_weight(weight)
    asked = problems.make_problem(
        weight.shape, axis=axis, block_size=block_size, batch_dims=batch_dims, min_code=min_code,
        importance=importance, hessian=hessian,
    )  # fmt: skip
    if function == "quantize":
        problems.check_packable(asked)
    given = _given_amax(global_amax, asked)
    traced = any(map(is_traced, (weight, given, importance, hessian)))
    engine = _choose_engine(weight, traced, implementation)
    outputs = _OUTPUTS[function]
    if engine in ("cpu", "oracle"):
        found = _eager.on_host(
            function, weight, asked, given, check_finite, engine, importance=importance, hessian=hessian
        )
        return asked, found

    _check_shards(weight, asked)
    operands = Operands(
        weight,
        given,
        None if importance is None else _objectives.canonical_importance(importance, asked, check_finite),
        None if hessian is None else _objectives.canonical_hessian(hessian, asked, check_finite),
    )
    if traced:
        return asked, over_stacks(_RUN[engine], asked, outputs)(lax.stop_gradient(operands))
    found = _RUN[engine](operands, asked, (*outputs, "largest") if check_finite else outputs)
    if check_finite:
        check_finite_amax(found.largest, weight)
        if isinstance(given, jax.Array):
            problems.global_amax_per_matrix(np.asarray(given), asked)
    return asked, found


def _by_platform(operands: Operands, asked: Problem, outputs: tuple[str, ...]) -> Found:
    """Triton's kernels where the program is lowered for CUDA, plain jnp elsewhere."""
    found: Found = lax.platform_dependent(
        operands,
        cuda=lambda operands: _triton.run(operands, asked, outputs),
        default=lambda operands: _xla.run(operands, asked, outputs),
    )
    return found


#: The engine of a traced array is chosen when it is known which platform its program is for.
_BY_PLATFORM = "triton or xla"
_RUN: dict[str, Run] = {"triton": _triton.run, "xla": _xla.run, _BY_PLATFORM: _by_platform}


def _check_shards(weight: jax.Array, asked: Problem) -> None:
    """Explicit sharding must leave blocks whole; XLA moves what it must where sharding is its own choice."""
    sharding = jax.typeof(weight).sharding
    names = sharding.spec[asked.axis]
    pieces = math.prod(
        sharding.mesh.shape[name] for name in ([names] if isinstance(names, str) else names or ())
    )
    length = weight.shape[asked.axis]
    if length // asked.block_size % pieces:
        raise ValueError(
            f"axis {asked.axis} of a weight of shape {weight.shape} is sharded over {pieces} devices, which"
            f" cuts blocks of block_size={asked.block_size}: reshard it, a device to a whole number of blocks"
        )


def as_weight(weight: Any) -> jax.Array:
    if not isinstance(weight, jax.Array):
        raise problems.foreign_array_error("weight", weight, "a JAX array")
    problems.check_dtype("weight", weight.dtype.name)
    return weight


def is_traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)


def check_finite_amax(largest: jax.Array, weight: jax.Array) -> None:
    """Raise ValueError if the weight's largest |w| is not finite; nothing under tracing."""
    # A concrete weight meets tracers too, where jit is at work: every result is traced there.
    if not is_traced(largest) and not np.isfinite(np.asarray(largest)).all():
        raise _eager.first_nonfinite(weight)


def _given_amax(global_amax: Any, asked: Problem) -> Any:
    """float32 of the batch axes' shape; None if not given. An array's values are not looked at."""
    if global_amax is None:
        return None
    if not isinstance(global_amax, jax.Array):
        return problems.global_amax_per_matrix(global_amax, asked).reshape(asked.batch_shape)
    if global_amax.dtype != jnp.float32:
        if not jnp.issubdtype(global_amax.dtype, jnp.number) or jnp.iscomplexobj(global_amax):
            raise TypeError(f"global_amax has dtype {global_amax.dtype}: it must be real numbers")
        global_amax = _amax.as_float32(global_amax).astype(jnp.float32)
    if global_amax.shape != asked.batch_shape:
        problems.check_global_amax_shape(global_amax.shape, asked)
        global_amax = jnp.broadcast_to(global_amax, asked.batch_shape)
    return global_amax


def _choose_engine(weight: jax.Array, traced: bool, implementation: str | None) -> str:
    # Once with every engine, for the name alone: Triton is imported only where it may be used.
    name = problems.choose_engine(implementation, default="", served=problems.ENGINES, where="")
    if traced:
        platform, where = "", "a traced array (inside jit, vmap, grad and the like)"
    elif len(weight.devices()) > 1:
        platform, where = next(iter(weight.devices())).platform, "an array over several devices"
    else:
        (device,) = weight.devices()
        platform, where = device.platform, f"a JAX array on {device}"
    served = ["xla"] if traced else ["xla", "oracle"]
    if platform == "cpu" and len(weight.devices()) == 1:
        served.insert(0, "cpu")
    default = served[0]
    if name == "triton" or (not name and platform != "cpu" and _triton.capability()):
        reason = _triton.why_not(platform)
        if reason:
            where += f" ({reason})"
        else:
            served.append("triton")
            default = "triton" if platform else _BY_PLATFORM
    return problems.choose_engine(implementation, default=default, served=served, where=where)
