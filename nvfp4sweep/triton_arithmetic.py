"""CUDA: fused multiply-adds, and pairs of float64, in which what float32 cannot tell apart is compared."""

import triton
import triton.language as tl
from triton import knobs

# The interpreter rounds the product of tl.fma, where theorem 4 needs one rounding.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
VELTKAMP = tl.constexpr(2.0**27 + 1)


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


@triton.jit
def at_most(a_high, a_low, b_high, b_low):
    return (a_high < b_high) | ((a_high == b_high) & (a_low <= b_low))
