"""The sign of a sum of products of float64, exactly: as a pair that knows what it lost, or as an integer.

With p and p' the points q s at two scales, the errors differ by e(s) - e(s') = sum H_ij u_i v_j, where
u = p' - p and v = 2 w - p - p' (of importances H is the diagonal). Where residuals are the same, or the
opposite of each other, u or v is 0: so ties are exact zeros, whatever else a block holds.

u is a float64: p and p' are multiples of 1/2 ulp of the lesser scale, and below 2^46 of these. v is one and
perhaps a rest. Products are taken of halves, so that each is exact, and so are their sums with anything.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nvfp4sweep_jax import _arithmetic as exact

Array = jax.Array


class Sum(NamedTuple):
    """high + low, off by `lost` at most (but for the rounding of `lost`)."""

    high: Array
    low: Array
    lost: Array


class Factors(NamedTuple):
    """u and v + rest of elements."""

    u: Array
    v: Array
    rest: Array


def factors(w: Array, point: Array, other: Array) -> Factors:
    return Factors(other - point, *exact.two_sum(2 * w, -(point + other)))


def nothing(like: Array) -> Sum:
    return Sum(like * 0, like * 0, like * 0)


def plus(total: Sum, x: Array) -> Sum:
    high, rest = exact.two_sum(total.high, x)
    low, lost = exact.two_sum(total.low, rest)
    return Sum(high, low, total.lost + jnp.abs(lost))


def plus_multiple(row: Sum, h: Array, f: Factors) -> Sum:
    """row + h (v + rest), for a float32 h."""
    for half in exact.split(f.v):
        row = plus(row, h * half)
    return row._replace(lost=row.lost + jnp.abs(h * f.rest))


def plus_product(total: Sum, u: Array, row: Sum) -> Sum:
    """total + u row."""
    for part in exact.two_sum(row.high, row.low):
        for a in exact.split(part):
            for b in exact.split(u):
                total = plus(total, a * b)
    return total._replace(lost=total.lost + jnp.abs(u) * row.lost)


def sign(total: Sum) -> tuple[Array, Array]:
    """float64 of its sign, and whether that is known."""
    high, _ = exact.two_sum(total.high, total.low)
    return jnp.sign(high), (total.lost == 0) | (jnp.abs(high) > 2 * total.lost)


# --- as integers: 30 digits of 32 bits, of int64 that take 2^30 of them ------------------------------

# Products h u v are multiples of 2^-149 (2^-150)^2, and sums of 2^20 of them are below 2^407. 53 bits of a
# float64 may reach below the least multiple, and the last digit takes the sign.
_DIGITS = 30
_LEAST_EXPONENT = -16 * 32
_DIGIT = 0xFFFFFFFF


def no_digits(like: Array) -> Array:
    """[digits, ...]: the integer 0."""
    zero: Array = (like * 0).astype(jnp.int64)
    return jnp.broadcast_to(zero, (_DIGITS, *like.shape)) + zero


def plus_digits(digits: Array, h: Array, f: Factors) -> Array:
    """digits + h u (v + rest), for a float32 h."""
    terms = [
        h * half
        for part in (f.v, f.rest)
        for a in exact.split(part)
        for b in exact.split(f.u)
        for half in exact.split(a * b)
    ]
    stacked = jnp.stack(jnp.broadcast_arrays(*terms))

    def add(i: Array, digits: Array) -> Array:
        return _plus_one(digits, lax.dynamic_index_in_dim(stacked, i, 0, keepdims=False))

    summed: Array = lax.fori_loop(0, len(terms), add, digits)
    return summed


def _plus_one(digits: Array, x: Array) -> Array:
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int64)
    integer = jnp.where(bits == 0, 0, (bits & (1 << 52) - 1) | 1 << 52)
    position = jnp.where(bits == 0, 0, (bits >> 52) - 1075 - _LEAST_EXPONENT)
    first, shift = position >> 5, position & 31
    low, high = (integer & _DIGIT) << shift, (integer >> 32) << shift
    sign = jnp.where(x < 0, -1, 1)
    place = lax.broadcasted_iota(jnp.int64, digits.shape, 0) - first
    parts = (low & _DIGIT, (low >> 32) + (high & _DIGIT), high >> 32)
    for i, part in enumerate(parts):
        digits += jnp.where(place == i, sign * part, 0)
    return digits


def sign_of_digits(digits: Array) -> Array:
    """float64 of the integer's sign."""

    def ripple(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        carry, some = state
        total = lax.dynamic_index_in_dim(digits, i, 0, keepdims=False) + carry
        return total >> 32, some | total & _DIGIT

    zero = digits[0] * 0
    carry, some = lax.fori_loop(0, _DIGITS, ripple, (zero, zero))
    return jnp.where(carry < 0, -1.0, jnp.where(some != 0, 1.0, 0.0))
