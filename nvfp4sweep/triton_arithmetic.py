"""CUDA: votes, fused multiply-adds, pairs of float64, and sums of products whose sign is exact."""

import triton
import triton.language as tl
from triton import knobs

# The interpreter rounds the product of tl.fma, where theorem 4 needs one rounding.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
VELTKAMP = tl.constexpr(2.0**27 + 1)


@triton.jit
def any_of(condition):
    return tl.max(condition.to(tl.int32), axis=0) > 0


@triton.jit
def fma(a, b, c):
    if INTERPRETED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def two_sum(a, b):
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


@triton.jit
def two_product(a, b):
    product = a * b
    t = VELTKAMP * a
    a_high = t - (t - a)
    a_low = a - a_high
    t = VELTKAMP * b
    b_high = t - (t - b)
    b_low = b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


@triton.jit
def add_pairs(a_high, a_low, b_high, b_low):
    high, carry = two_sum(a_high, b_high)
    return two_sum(high, (a_low + b_low) + carry)


# --- the sign of a sum of products h u (v + v_rest) (theorem 9) ---------------------------------------------
#
# Mostly a float64 sum knows it. Else the terms are taken in turns, their leading bits first: what lies
# between two powers of two, a multiple of the lower one, `unit`. Float64 sums such multiples exactly. `rest`
# is the largest that any term has left; the next unit lies so far below it.

# Of a product. They are taken one at a time: more take more registers.
TERMS = tl.constexpr(8)
# More than any sum here has terms: so many an element of a block of 2^18.
MOST_TERMS = tl.constexpr(2.0**21)
# More than all roundings of a float64 sum of 2^18 products come to, relative to their sizes.
ROUNDED = tl.constexpr(2.0**-34)
# Above twice every term.
FIRST_UNIT = tl.constexpr(2.0**500)
BITS_A_TURN = tl.constexpr(27)


@triton.jit
def is_unknown(total, size):
    """Of the sign of a float64 sum of products of these sizes. No products are an exact 0."""
    return (size > 0.0) & ~(tl.abs(total) > size * ROUNDED)


@triton.jit
def _to_multiple(x, unit):
    """x rounded to a multiple of a power of two."""
    size = tl.abs(x)
    even = size + unit * 2.0**52
    rounded = tl.where(size < unit * 2.0**52, even - unit * 2.0**52, size)
    return tl.where(x < 0.0, 0.0 - rounded, rounded)


@triton.jit
def add_term(part, rest, term, h, u, v, v_rest, unit, unit_before):
    """A turn's `part` and `rest`, with this one of the TERMS of h u (v + v_rest)."""
    scaled, scaled_rest = two_product(h, u)
    a, b = tl.where(term & 4 == 0, scaled, scaled_rest), tl.where(term & 2 == 0, v, v_rest)
    if any_of((a != 0.0) & (b != 0.0)):  # seldom but of the first two
        high, low = two_product(a, b)
        value = tl.where(term & 1 == 0, high, low)
        rounded = _to_multiple(value, unit)
        part += rounded - _to_multiple(value, unit_before)
        rest = tl.maximum(rest, tl.abs(value - rounded))
    return part, rest


@triton.jit
def is_open(total, rest):
    """Whether what is left of the terms may change the sign of what is not."""
    return (rest > 0.0) & ~(tl.abs(total) > MOST_TERMS * rest)


@triton.jit
def unit_below(rest):
    power = ((rest.to(tl.int64, bitcast=True) >> 52) << 52).to(tl.float64, bitcast=True)
    return power * 2.0**-BITS_A_TURN
