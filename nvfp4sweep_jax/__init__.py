"""nvfp4sweep for JAX: the functions of `nvfp4sweep` for arrays, eager and traced.

Which engine serves a call, unless `implementation` or NVFP4SWEEP_IMPLEMENTATION names one:

- an array on one CPU device: "cpu", the core's Numba kernels on the array's own memory;
- an array on one or several CUDA devices: "triton", the core's Triton kernels as part of an XLA program,
  where Triton can be imported, else "xla";
- a traced array (inside jit, vmap, grad, shard_map): "triton" where its program is lowered for CUDA and
  Triton can be imported, else "xla";
- any other: "xla", which is plain jnp.

"xla" serves all of these; "oracle", the definition, all that are not traced. Both "triton" and "xla" keep
the weight's sharding and need no 64-bit mode. An engine that cannot serve an array raises ValueError.
Every engine gives the same bits.

While a call is traced no value can be checked: an element that is NaN makes the weight's own
global amax, and so every block amax, NaN. Nothing here is differentiable: results are constants to
grad and jvp.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import nvfp4sweep
from nvfp4sweep import Sweep, ZeroHessianWarning, formats, problem
from nvfp4sweep_jax import _amax, _call, _tree
from nvfp4sweep_jax._hessian import HessianAccumulator
from nvfp4sweep_jax._tensor import QuantizedTensor

__all__ = [
    "HessianAccumulator",
    "QuantizedTensor",
    "Sweep",
    "ZeroHessianWarning",
    "calibrate",
    "calibrate_tree",
    "global_amax",
    "quantize",
    "scale_candidates",
    "sweep",
]


def calibrate(
    weight: jax.Array,
    *,
    global_amax: Any = None,
    axis: int = -1,
    block_size: int = formats.BLOCK_SIZE,
    batch_dims: int = 0,
    importance: Any = None,
    hessian: Any = None,
    min_code: int = formats.MIN_CODE,
    check_finite: bool = True,
    implementation: str | None = None,
) -> jax.Array:
    """nvfp4sweep.calibrate for a JAX array: the amax of every block of least squared error, exactly.

    Args:
        weight: float32, float16 or bfloat16 array, concrete or traced; float64 is rounded to float32
            first.
        global_amax: a number or an array that broadcasts over the leading `batch_dims` axes. It may be
            traced: then its shape is checked, and its values, which must be finite and >= 0, are not.
        axis: the axis along which blocks run: 0 for kernels [in, out], -1 for [out, in].
        importance, hessian: arrays, concrete or traced, or what NumPy makes an array of. An importance of
            each input is [K] for a weight [N, K], and [K, 1] for a kernel [K, N].
        check_finite: raise ValueError if an element is NaN or infinite, or an importance or a hessian is
            not what it must be. Nothing is checked of an array that is traced.
        implementation: "cpu", "triton", "xla" or "oracle"; None chooses as the package says.

    The other arguments, the errors and the source are those of nvfp4sweep.calibrate.

    Returns:
        float32, the weight's shape with `axis` divided by `block_size`, on the weight's devices. It
        has no gradient: it is a constant to grad and jvp.

    Raises:
        TypeError: `weight` is not a JAX array, or has another dtype.
        ValueError: as nvfp4sweep.calibrate; an implementation that cannot serve the array, as "cpu" and
            "oracle" under jit.

    Warns:
        ZeroHessianWarning: as nvfp4sweep.calibrate, of a concrete hessian.
    """
    _, found = _call.search(
        "calibrate", weight, global_amax, axis, block_size, batch_dims, importance, hessian, min_code,
        check_finite, implementation,
    )  # fmt: skip
    amax: jax.Array = found.amax
    return amax


def calibrate_tree(
    params: Any,
    *,
    where: _tree.Rule | None = None,
    axis: int | _tree.Rule | None = None,
    batch_dims: int | _tree.Rule = 0,
    group: _tree.Rule | None = None,
    importance: _tree.Rule | None = None,
    hessian: _tree.Rule | None = None,
    block_size: int = formats.BLOCK_SIZE,
    min_code: int = formats.MIN_CODE,
    check_finite: bool = True,
    implementation: str | None = None,
) -> Any:
    """`calibrate` for the weights of a parameter tree, eager or traced.

    A rule is called as rule(name, leaf) with a leaf's path as its name, such as "layers/0/mlp/kernel".

    Args:
        params: a pytree with JAX arrays among its leaves.
        where: tells whether a leaf is a weight to calibrate. None takes each floating-point leaf of two
            axes or more whose name ends in "kernel" or "weight".
        axis: the axis along which a weight's blocks run, or a rule that gives it. None takes the input
            axis of a matrix: 0 of a "kernel" [in, out], as in flax, and 1 of a "weight" [out, in], both
            after `batch_dims`; any other weight needs an axis.
        batch_dims: as for `calibrate`, or a rule: 1 for a kernel [layers, in, out] that stacks layers.
        group: a rule that gives a weight's group, None for its own. Weights of a group share a global
            amax, as those must that a runtime fuses. Without a rule each weight has its own.
        importance, hessian: rules that give what `calibrate` takes for a weight; None for plain squared
            error.

    The other arguments are those of `calibrate`.

    Returns:
        params with the block amaxes of each weight in its place and None in that of any other leaf.

    Raises:
        TypeError, ValueError: as `calibrate`, with the leaf's name; a weight whose axis no rule tells; a
            group of different leading axes. The weights' shapes are checked before anything is computed.
    """
    leaves, structure = _tree.weights(params, where, axis, batch_dims, group, block_size)
    amaxes: dict[Any, list[jax.Array]] = {}
    for weight in filter(None, leaves):
        if weight.shares:
            with _tree.named(weight.name):
                own = _own_amax(weight.array, weight.batch_dims, check_finite)
            amaxes.setdefault(weight.group, []).append(own)
    shared = {group: _amax.largest(members) for group, members in amaxes.items()}

    def found(weight: _tree.Weight | None) -> jax.Array | None:
        if weight is None:
            return None
        with _tree.named(weight.name):
            return calibrate(
                weight.array,
                global_amax=shared.get(weight.group),
                axis=weight.axis,
                block_size=block_size,
                batch_dims=weight.batch_dims,
                importance=importance and importance(weight.name, weight.array),
                hessian=hessian and hessian(weight.name, weight.array),
                min_code=min_code,
                check_finite=check_finite,
                implementation=implementation,
            )

    return jax.tree_util.tree_unflatten(structure, map(found, leaves))


def sweep(
    weight: jax.Array,
    *,
    global_amax: Any = None,
    axis: int = -1,
    block_size: int = formats.BLOCK_SIZE,
    batch_dims: int = 0,
    importance: Any = None,
    hessian: Any = None,
    min_code: int = formats.MIN_CODE,
    check_finite: bool = True,
    implementation: str | None = None,
) -> Sweep:
    """As `calibrate`, and also each block's E4M3 code, its error and the global amax.

    Returns:
        Sweep(amax float32, code uint8, error float32, global_amax float32) of arrays.
    """
    _, found = _call.search(
        "sweep", weight, global_amax, axis, block_size, batch_dims, importance, hessian, min_code,
        check_finite, implementation,
    )  # fmt: skip
    return Sweep(found.amax, found.code, found.error, found.global_amax)


def quantize(
    weight: jax.Array,
    *,
    global_amax: Any = None,
    axis: int = -1,
    block_size: int = formats.BLOCK_SIZE,
    batch_dims: int = 0,
    importance: Any = None,
    hessian: Any = None,
    min_code: int = formats.MIN_CODE,
    check_finite: bool = True,
    implementation: str | None = None,
) -> QuantizedTensor:
    """The weight in NVFP4 under the scales that `calibrate` finds; the same arguments and errors.

    Returns:
        QuantizedTensor(packed uint8, scale float8_e4m3fn, global_scale float32), a pytree, with
        .dequantize(dtype). `block_size` must be even.
    """
    asked, found = _call.search(
        "quantize", weight, global_amax, axis, block_size, batch_dims, importance, hessian, min_code,
        check_finite, implementation,
    )  # fmt: skip
    scale = lax.bitcast_convert_type(found.code, jnp.float8_e4m3fn)
    return QuantizedTensor(found.packed, scale, found.global_scale, asked.axis, asked.block_size)


def global_amax(*weights: jax.Array, batch_dims: int = 0) -> jax.Array:
    """nvfp4sweep.global_amax for JAX arrays: the largest |w| over all of them.

    Args:
        weights: arrays as `calibrate` takes them, with the same leading `batch_dims` axes, on the
            same devices.
        batch_dims: leading axes that stack matrices, each with an amax of its own.

    Returns:
        float32 of the batch axes' shape: [] for batch_dims=0. NaN where a traced weight has NaN.

    Raises:
        TypeError, ValueError: as nvfp4sweep.global_amax.
    """
    if not weights:
        raise ValueError("weights is empty: global_amax needs at least one array")
    amaxes = [_own_amax(weight, batch_dims, check_finite=True) for weight in weights]
    problem.check_same_batch([amax.shape for amax in amaxes], batch_dims)
    largest: jax.Array = _amax.largest(amaxes)
    return largest


def _own_amax(weight: Any, batch_dims: int, check_finite: bool) -> jax.Array:
    weight = _call.as_weight(weight)
    amax: jax.Array = _amax.absolute_maximum(
        weight, problem.make_problem(weight.shape, block_size=1, batch_dims=batch_dims)
    )
    if check_finite:
        _call.check_finite_amax(amax, weight)
    return amax


def scale_candidates() -> jax.Array:
    """nvfp4sweep.scale_candidates as an array: float32 [126], the E4M3 values / 448."""
    return jnp.asarray(nvfp4sweep.scale_candidates())
