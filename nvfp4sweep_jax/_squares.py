"""Sums of squared residuals in float64, plain or weighted by importances: bounds, comparison, the error."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nvfp4sweep.problem import Problem
from nvfp4sweep.window import LEAST_GLOBAL_AMAX, UPPER_RATIO, last_unhalved_code
from nvfp4sweep_jax import _arithmetic as exact
from nvfp4sweep_jax import _exact_sums as sums
from nvfp4sweep_jax._arithmetic import Pair
from nvfp4sweep_jax._blocks import Reader, fold

Array = jax.Array


class Squares:
    """sum r^2 of the blocks whose elements are given."""

    def __init__(self, weight: Reader, problem: Problem) -> None:
        self.weight = weight
        self.problem = problem

    def magnitude(self, i: Any) -> Array:
        return exact.widen(exact.magnitude_bits(self.weight(i)))

    def weighter(self) -> Callable[[Array, Any], Array]:
        """A function of a square and the number of its element."""
        return lambda square, i: square

    def sign_of_difference(self, scale: Array, other: Array) -> tuple[Array, Array]:
        """Of the errors at two scales, and whether it is known: always."""
        ours, theirs = self.pairs([scale, other])
        sign = jnp.where(exact.less(theirs, ours), 1, jnp.where(exact.less(ours, theirs), -1, 0))
        return sign, sign == sign

    sign_by_digits: Callable[[Array, Array], Array] | None = None

    def pairs(self, scales: list[Array]) -> list[Pair]:
        """s^2 B - 2 s A at each scale (theorem 5): the error less its constant part."""
        inverses = [exact.reciprocal(scale) for scale in scales]

        def add(sums: list[Pair], i: Any) -> list[Pair]:
            w = self.magnitude(i)
            points = [exact.nearest_e2m1(w, inverse) for inverse in inverses]
            return [(a + w * q, b + q * q) for (a, b), q in zip(sums, points, strict=True)]

        zeros = [(scale * 0, scale * 0) for scale in scales]
        objectives = []
        for scale, (a, b) in zip(scales, fold(add, zeros, self.problem), strict=True):
            # Every product is exact: scale has 24 bits, b 26 at most, a split half 27.
            square_high, square_low = exact.split(scale * scale)
            f_high, f_low = exact.two_sum(square_high * b, square_low * b)
            twice = -2 * scale
            top, bottom = exact.split(a)
            g_high, g_low = exact.two_sum(twice * top, twice * bottom)
            high, carry = exact.two_sum(f_high, g_high)
            objectives.append(exact.two_sum(high, (f_low + g_low) + carry))
        return objectives

    def error(self, scale: Array) -> Array:
        """Summed element by element in order, as in the oracle."""
        inverse = exact.reciprocal(scale)
        weighted = self.weighter()

        def add(total: Array, i: Any) -> Array:
            w = self.magnitude(i)
            r = w - exact.nearest_e2m1(w, inverse) * scale
            # The minimum (with q = 0) is that of r; it keeps XLA from contracting product and sum.
            return total + jnp.minimum(weighted(r * r, i), weighted(w * w, i))

        total: Array = fold(add, scale * 0, self.problem)
        return total


class WeightedSquares(Squares):
    """sum h r^2; h = 1 where all of a block's importances are 0. For a search over codes see _walk.py.

    `one` is 1, which XLA does not know: what is multiplied by it has been rounded before.
    """

    def __init__(self, weight: Reader, importance: Reader, problem: Problem, one: Array) -> None:
        super().__init__(weight, problem)
        self.importance = importance
        self.one = one
        # Of `ratio`: a term is rounded 3 times, added n - 1 times, and the quotient is rounded once.
        self.tolerance = (problem.block_size + 8) * 2.0**-53

    def weights(self) -> Reader:
        def either(bits: Array, i: Any) -> Array:
            return bits | exact.magnitude_bits(self.importance(i))

        bits = fold(either, exact.magnitude_bits(self.importance(0)), self.problem)
        return lambda i: jnp.where(bits == 0, 1.0, exact.widen(exact.magnitude_bits(self.importance(i))))

    def weighter(self) -> Callable[[Array, Any], Array]:
        h = self.weights()
        return lambda square, i: h(i) * square

    def peak(self) -> Array:
        """The largest |w| that counts."""
        h = self.weights()

        def larger(peak: Array, i: Any) -> Array:
            return jnp.maximum(peak, jnp.where(h(i) > 0, self.magnitude(i), 0.0))

        peak: Array = fold(larger, self._zero(), self.problem)
        return peak

    def total(self) -> Array:
        """No error exceeds it."""
        return self._sum(lambda w: w)

    def ratio(self, scale: Array, total: Array) -> Array:
        """The error as a part of the total."""
        inverse = exact.reciprocal(scale)
        return exact.quotient(self._sum(lambda w: w - exact.nearest_e2m1(w, inverse) * scale), total)

    def least_ratio_below(self, scale: Array, total: Array) -> Array:
        """No smaller scale has a smaller ratio (theorem 6)."""
        return exact.quotient(self._sum(lambda w: jnp.maximum(w - 6 * scale, 0.0)), total)

    def is_beaten_above(self, scale: Array, code: Array, amax: Array, peak: Array) -> Array:
        """Whether the code is out, and all above it with it (theorem 1)."""
        has_half = code > last_unhalved_code(self.problem.min_code)
        return has_half & (peak <= UPPER_RATIO * scale) & (amax >= LEAST_GLOBAL_AMAX)

    def _zero(self) -> Array:
        both = exact.magnitude_bits(self.weight(0)) | exact.magnitude_bits(self.importance(0))
        return (both * 0).astype(jnp.float64)

    def _sum(self, residual: Callable[[Array], Array]) -> Array:
        h = self.weights()

        def add(total: Array, i: Any) -> Array:
            r = residual(self.magnitude(i))
            return total + h(i) * (r * r)

        total: Array = fold(add, self._zero(), self.problem)
        return total

    def sign_of_difference(self, scale: Array, other: Array) -> tuple[Array, Array]:
        """Of the errors at two scales, and whether it is known (theorem 9)."""

        def add(total: sums.Sum, i: Any, f: sums.Factors, h: Array) -> sums.Sum:
            row = sums.plus_multiple(sums.nothing(h), h, f)
            return sums.plus_product(total, f.u, row)

        return sums.sign(self._over_factors(add, sums.nothing(scale), scale, other))

    def sign_by_digits(self, scale: Array, other: Array) -> Array:
        """The same, always known."""

        def add(digits: Array, i: Any, f: sums.Factors, h: Array) -> Array:
            return sums.plus_digits(digits, h, f)

        return sums.sign_of_digits(self._over_factors(add, sums.no_digits(scale), scale, other))

    def _over_factors(self, add: Callable[..., Any], start: Any, scale: Array, other: Array) -> Any:
        scales = [(s, exact.reciprocal(s)) for s in (scale, other)]
        h = self.weights()

        def step(total: Any, i: Any) -> Any:
            w = self.magnitude(i)
            points = [exact.nearest_e2m1(w, inverse) * s for s, inverse in scales]
            return add(total, i, sums.factors(w, *points), h(i))

        return fold(step, start, self.problem, rolled=True)
