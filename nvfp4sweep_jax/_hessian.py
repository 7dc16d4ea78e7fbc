"""Second moments of a linear layer's input activations, block by block."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nvfp4sweep import moments, problem
from nvfp4sweep.problem import Problem
from nvfp4sweep_jax import _call


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, init=False, eq=False)
class HessianAccumulator:
    """Gathers the block Hessian of a linear layer's squared output error from its input activations.

    For each block b of 16 inputs it sums x_b x_b^T over all tokens x. `hessian()` and `importance()`
    are what the arguments of these names take in calibrate, sweep and quantize.

        accumulator = HessianAccumulator(kernel.shape, axis=0)
        for x in batches:
            accumulator = accumulator.add(x)
        amax = calibrate(kernel, axis=0, hessian=accumulator.hessian())

    It is a pytree that never changes: `add` and `merge` return a new one. So it can be the carry of a
    scan, go in and out of jit, and be made for each layer by vmap. It keeps 64 bytes for each input (and
    expert), never a matrix of all inputs by all inputs. Products and sums are float32 whatever the
    default matmul precision.

    To combine those of several devices, lax.psum(accumulator, axis_name) sums both arrays. Or `merge`.

    Attributes:
        total: float32 [K / 16, 16, 16], or [E, K / 16, 16, 16] for stacked experts: the sums.
        tokens: int32 [] or [E]: how many tokens were added. It must stay below 2^31.

    Args:
        weight_shape: the shape of the layer's weight: [K, N], [N, K], or stacked experts [E, K, N].
        axis: the weight's input axis, whose length K is a multiple of 16: 0 of a kernel [in, out].
        batch_dims: leading axes that stack matrices, each with inputs of its own: 1 for experts.

    Raises:
        TypeError: an argument that should be an integer is not one.
        ValueError: an axis out of range, or one that blocks of 16 do not divide.
    """

    total: jax.Array
    tokens: jax.Array
    _problem: Problem

    def __init__(self, weight_shape: Sequence[int], *, axis: int = -1, batch_dims: int = 0) -> None:
        asked = moments.moments_problem(weight_shape, axis, batch_dims)
        total = jnp.zeros(moments.hessian_shape(asked), jnp.float32)
        self._fill(total, jnp.zeros(asked.batch_shape, jnp.int32), asked)

    def add(self, activations: jax.Array, expert: Any = None) -> "HessianAccumulator":
        """An accumulator with a batch of tokens more. Padding counts like any token: leave it out.

        Args:
            activations: float32, float16, bfloat16 or float64 (rounded to float32 first), [..., K] with
                any leading axes. For a weight with batch_dims, [E, ..., K] unless `expert` is given.
            expert: whose activations these are, for a weight with batch_dims: an integer, or a tuple of
                them for batch_dims > 1. None: each expert has its own, in the leading axes. A traced one
                cannot be checked: if it is out of range nothing is added.

        Raises:
            TypeError: `activations` is not an array of these dtypes, or `expert` is not an integer.
            ValueError: activations of another shape, or an expert out of range. NaN and infinity are not
                looked for here, which would wait for the device: `hessian` and `importance` raise.
        """
        if not isinstance(activations, jax.Array):
            raise problem.foreign_array_error("activations", activations, "a JAX array")
        problem.check_dtype("activations", activations.dtype.name)
        asked = self._problem
        index = moments.expert_index(expert, asked, _call.is_traced)
        tokens = moments.count_tokens(activations.shape, asked, one_expert=expert is not None)
        batch_dims = 0 if index else asked.batch_dims
        sums = _second_moments(activations, batch_dims, asked.block_size)
        return self._with(
            self.total.at[index].add(sums, mode="drop", wrap_negative_indices=False),
            self.tokens.at[index].add(tokens, mode="drop", wrap_negative_indices=False),
        )

    def merge(self, other: "HessianAccumulator") -> "HessianAccumulator":
        """An accumulator with what both have gathered, for the same shape, axis and batch_dims.

        Raises:
            TypeError: `other` is not a HessianAccumulator.
            ValueError: it is for another layout of the weight.
        """
        if not isinstance(other, HessianAccumulator):
            raise TypeError(f"other is a {type(other).__name__}: it must be a HessianAccumulator")
        moments.check_same_layout(other._problem, self._problem)
        return self._with(self.total + other.total, self.tokens + other.tokens)

    def hessian(self) -> jax.Array:
        """The mean of x_b x_b^T over the tokens, exactly symmetric; zeros where there were no tokens.

        Returns:
            float32 [K / 16, 16, 16] or [E, K / 16, 16, 16].

        Raises:
            ValueError: activations were NaN, infinite, or so large that their squares exceed float32. The
                message names the first block. Nothing is checked of sums that are traced.
        """
        finite = jnp.isfinite(self.total).all((-2, -1))
        if not _call.is_traced(finite) and not bool(finite.all()):
            raise moments.nonfinite_moments_error(jnp.argwhere(~finite)[0].tolist(), self._problem)
        mean = self.total / jnp.maximum(self.tokens, 1)[..., None, None, None]
        return jnp.tril(mean) + jnp.matrix_transpose(jnp.tril(mean, -1))

    def importance(self) -> jax.Array:
        """The mean of x^2 of each input over the tokens: the diagonal of `hessian()`; the same errors.

        Returns:
            float32 of a shape that broadcasts to the weight's: [K, 1] for a kernel [K, N], [K] for [N, K],
            [E, K, 1] for experts [E, K, N].
        """
        diagonal: jax.Array = jnp.diagonal(self.hessian(), axis1=-2, axis2=-1)
        return diagonal.reshape(moments.importance_shape(self._problem))

    def _fill(self, total: Any, tokens: Any, asked: Problem) -> None:
        object.__setattr__(self, "total", total)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "_problem", asked)

    def _with(self, total: jax.Array, tokens: jax.Array) -> "HessianAccumulator":
        return self.tree_unflatten(self._problem, (total, tokens))

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], Problem]:
        key = jax.tree_util.GetAttrKey
        return ((key("total"), self.total), (key("tokens"), self.tokens)), self._problem

    @classmethod
    def tree_unflatten(cls, asked: Problem, children: tuple[Any, Any]) -> "HessianAccumulator":
        accumulator = object.__new__(cls)
        total, tokens = children
        accumulator._fill(total, tokens, asked)
        return accumulator


@partial(jax.jit, static_argnames=("batch_dims", "block_size"))
def _second_moments(activations: jax.Array, batch_dims: int, block_size: int) -> jax.Array:
    """float32 [*batch, blocks, block_size, block_size]: sums over the axes between batch and inputs."""
    *leading, inputs = activations.shape
    blocks = inputs // block_size
    x = lax.stop_gradient(activations).astype(jnp.float32).reshape(*leading, blocks, block_size)
    kept = (*range(batch_dims), len(leading))
    summed = tuple(range(batch_dims, len(leading)))
    return lax.dot_general(
        x,
        x,
        ((summed, summed), (kept, kept)),
        precision=lax.Precision.HIGHEST,
        # Explicit sharding has to be told; elsewhere it is XLA's choice. The sums are small: a copy each.
        out_sharding=jax.P() if any(jax.typeof(x).sharding.spec) else None,  # type: ignore[no-untyped-call]
    )
