"""Quadratic forms r^T H r of blocks of 16 in float64: the Hessian prepared, bounds, comparison, the error."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nvfp4sweep.problem import Problem
from nvfp4sweep_jax import _arithmetic as exact
from nvfp4sweep_jax import _exact_sums as sums
from nvfp4sweep_jax._blocks import Reader, places, tree

Array = jax.Array

#: Halvings of the interval in which the greatest mu lies that theorem 10 may use.
_HALVINGS = 12


def prepared(hessian: Array) -> Array:
    """float64 [16, 16, ...] of float32 [..., 16, 16], symmetric, the identity where it is zero.

    These are the values of nvfp4sweep.objectives.hessian_per_matrix.
    """
    wide = exact.widen_signed(jnp.moveaxis(hessian, (-2, -1), (0, 1)))
    mean = exact.round_signed_to_float32((wide + wide.swapaxes(0, 1)) * 0.5)
    is_zero = jnp.all(mean == 0, axis=(0, 1))
    identity = jnp.eye(len(mean), dtype=jnp.float64).reshape(*mean.shape[:2], *[1] * is_zero.ndim)
    return jnp.where(is_zero, identity, mean)


def row_sums(hessian: Array) -> Array:
    """c of theorem 10, [16, ...]; 0 for the elements that do not matter."""
    return jnp.sum(jnp.abs(hessian), axis=1)


def least_eigenvalue(hessian: Array, c: Array) -> Array:
    """A mu, not the greatest, of which H - mu diag(c) is positive semidefinite; -inf where none is > 0.

    It is so if elimination leaves positive pivots: what it computes is an elimination of a matrix that
    differs by less than 2^-44 sqrt(c_i c_j) from this one. Elements with c = 0 are free.
    """
    n = len(c)
    diagonal = jnp.eye(n, dtype=jnp.float64).reshape(n, n, *[1] * (c.ndim - 1))

    def is_positive(mu: Array) -> Array:
        def eliminate(k: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            rest, positive = state
            row = lax.dynamic_index_in_dim(rest, k, 0, keepdims=False)
            pivot = lax.dynamic_index_in_dim(row, k, 0, keepdims=False)
            positive &= pivot > 0
            return rest - (row / jnp.where(positive, pivot, 1))[:, None] * row[None], positive

        shifted = hessian + diagonal * jnp.where(c == 0, 1, -mu * c)
        positive: Array = lax.fori_loop(0, n, eliminate, (shifted, mu == mu))[1]
        return positive

    def halve(_: Array, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval
        middle = (low + high) * 0.5
        positive = is_positive(middle)
        return jnp.where(positive, middle, low), jnp.where(positive, high, middle)

    zero = c[0] * 0
    low, _ = lax.fori_loop(0, _HALVINGS, halve, (zero, zero + 1))
    return jnp.where(low > 0, low - 2.0**-40, -jnp.inf)


class QuadraticForm:
    """r^T H r of the blocks whose elements are given. For a search over codes see _walk.py.

    `one` is 1, which XLA does not know: what is multiplied by it has been rounded before.
    """

    # Of `ratio`: theorem 11, and the quotient.
    tolerance = 64 * 2.0**-53

    def __init__(
        self, weight: Reader, hessian: Array, problem: Problem, one: Array, blocks: Array | None = None
    ) -> None:
        """`hessian` is of `prepared`; the weight's elements are those of `blocks`, of all if None."""
        self.weight = weight
        self.problem = problem
        self.one = one
        self.size = problem.block_size
        batch = hessian.shape[2:-1]
        if blocks is None:
            ones = (1,) * (len(problem.shape) - problem.axis - 1)
            batch = batch or (1,) * problem.batch_dims
            between = (1,) * (problem.axis - problem.batch_dims)
            self.hessian = hessian.reshape(*hessian.shape[:2], *batch, *between, hessian.shape[-1], *ones)
            self.chosen = None
        else:
            self.hessian = hessian.reshape(*hessian.shape[:2], -1)
            place = places(blocks, problem)
            index = jnp.zeros_like(blocks)
            for size, at in zip(batch, place, strict=False):
                index = index * size + at
            self.chosen = index * hessian.shape[-1] + place[problem.axis]

    def rows(self, i: int | Array) -> Array:
        """[16, ...]: row i of each block's Hessian."""
        row: Array = lax.dynamic_index_in_dim(self.hessian, i, 0, keepdims=False)
        if self.chosen is not None:
            row = row.at[:, self.chosen].get(mode="promise_in_bounds")
        return row

    def magnitudes(self) -> list[Array]:
        return [exact.widen(exact.magnitude_bits(self.weight(i))) for i in range(self.size)]

    def signed(self) -> list[Array]:
        return [_signed(self.weight(i)) for i in range(self.size)]

    def residuals(self, scale: Array) -> list[Array]:
        return [w - _point(w, scale) for w in self.signed()]

    # --- for the walk over codes ---

    def bounds(self) -> tuple[Array, Array]:
        """What theorem 10 needs: c [16, ...] and mu."""
        c = row_sums(self.hessian)
        return c, least_eigenvalue(self.hessian, c)

    def peak(self, c: Array) -> Array:
        """The largest |w| that counts."""
        terms = [jnp.where(c[i] > 0, w, 0.0) for i, w in enumerate(self.magnitudes())]
        return tree(jnp.maximum, terms)

    def total(self, c: Array) -> Array:
        """No error exceeds it: sum c w^2."""
        return tree(jnp.add, [c[i] * (w * w) for i, w in enumerate(self.magnitudes())])

    def ratio(self, scale: Array, total: Array) -> Array:
        """The error as a part of the total."""
        r = self.residuals(scale)
        return exact.quotient(self._form(r), total)

    def _form(self, r: list[Array]) -> Array:
        error = r[0] * 0
        for i in range(self.size):
            row = self.rows(i)
            # The matrix is symmetric.
            terms = [row[j] * r[j] for j in range(i)]
            twice = 2 * tree(jnp.add, terms) if terms else 0.0
            error += r[i] * (row[i] * r[i] + twice)
        return error

    def least_ratio_below(self, scale: Array, total: Array, c: Array, mu: Array) -> Array:
        """No smaller scale has a smaller ratio (theorem 10)."""
        clipped = [jnp.maximum(w - 6 * scale, 0.0) for w in self.magnitudes()]
        least = tree(jnp.add, [c[i] * (x * x) for i, x in enumerate(clipped)])
        return mu * exact.quotient(least, total)

    def least_ratio_above(self, scale: Array, total: Array, c: Array, mu: Array) -> Array:
        """No larger scale has a smaller ratio (theorem 10)."""
        small = [jnp.where(4 * w <= scale, w, 0.0) for w in self.magnitudes()]
        least = tree(jnp.add, [c[i] * (x * x) for i, x in enumerate(small)])
        return mu * exact.quotient(least, total)

    # --- comparison and the error ---

    def sign_of_difference(self, scale: Array, other: Array) -> tuple[Array, Array]:
        """Of the errors at two scales, and whether it is known (theorem 11)."""
        f = self._factors(scale, other)

        def add_column(j: Array, rows: sums.Sum) -> sums.Sum:
            return sums.plus_multiple(rows, self.rows(j), _at(f, j))

        rows = lax.fori_loop(0, self.size, add_column, sums.nothing(f.u))

        def add_row(i: Array, total: sums.Sum) -> sums.Sum:
            return sums.plus_product(total, _at(f.u, i), _at(rows, i))

        return sums.sign(lax.fori_loop(0, self.size, add_row, sums.nothing(scale)))

    def sign_by_digits(self, scale: Array, other: Array) -> Array:
        """The same, always known."""
        f = self._factors(scale, other)

        def add(k: Array, digits: Array) -> Array:
            i, j = k // self.size, k % self.size
            h = lax.dynamic_index_in_dim(self.rows(i), j, 0, keepdims=False)
            return sums.plus_digits(digits, h, _at(f, j)._replace(u=_at(f.u, i)))

        return sums.sign_of_digits(lax.fori_loop(0, self.size**2, add, sums.no_digits(scale)))

    def _factors(self, scale: Array, other: Array) -> sums.Factors:
        """Arrays [16, ...], for few blocks: quick to compile, and held in memory."""
        w = _signed(jnp.stack([self.weight(i) for i in range(self.size)]))
        return sums.factors(w, _point(w, scale), _point(w, other))

    def error(self, scale: Array) -> Array:
        """Summed over j, then over i, in order, of products that are rounded one by one, as in the oracle."""
        r = self.residuals(scale)
        total = scale * 0
        for i in range(self.size):
            h = self.rows(i)
            row = h[0] * r[0] * self.one
            for j in range(1, self.size):
                row += h[j] * r[j] * self.one
            total += row * r[i] * self.one
        return total


def _signed(x: Array) -> Array:
    return exact.widen_signed(exact.from_bits(exact.float32_bits(x)))


def _point(w: Array, scale: Array) -> Array:
    """q s, the nearest to w, in a tie that of the even code."""
    point = scale * exact.nearest_even_e2m1(jnp.abs(w), exact.reciprocal(scale))
    return jnp.where(w < 0, -point, point)


def _at(x: Any, i: Array) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 0, keepdims=False), x)
