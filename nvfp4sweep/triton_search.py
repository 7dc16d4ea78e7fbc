"""CUDA: the best codes of a tile of blocks. The theorems are in window.py.

code_window      the codes that can win
find_survivors   those of them that float32 and its proven margin leave
exact_best       the lowest best of those, in pairs of float64, where they are several
"""

import triton
import triton.language as tl

from nvfp4sweep import window as proofs
from nvfp4sweep.triton_arithmetic import add_pairs, any_of, fma, two_product
from nvfp4sweep.triton_blocks import (
    load_16,
    magnitude_of,
    nearest_point,
    point_thresholds,
)
from nvfp4sweep.triton_tables import E4M3_TO_FLOAT32, GLOBAL_AMAX, LEAST_GLOBAL_AMAX, LOWER, MAX_CODE, UPPER

FIRST_UNDOUBLED_CODE = tl.constexpr(proofs.FIRST_UNDOUBLED_CODE)
# Floats from 2^22 to 2^23 are a half apart: adding one of them rounds to halves.
SHARED_SLOPE = tl.constexpr(2.0**22 * proofs.SHARED_ROUNDER_SLOPE)
SHARED_FLOOR = tl.constexpr(2.0**22 * proofs.SHARED_ROUNDER_FLOOR)


@triton.jit
def normal_code_at_least(value):
    """The lowest E4M3 code whose value is >= value; beyond 126 or below 8 where no normal one is."""
    return ((value.to(tl.int32, bitcast=True) + 0xFFFFF) >> 20) - E4M3_TO_FLOAT32


@triton.jit
def code_at_least(value):
    """The lowest E4M3 code whose value is >= value; beyond 126 where there is none."""
    uniform = tl.ceil(tl.minimum(value, 1.0) * 512.0).to(tl.int32)
    return tl.where(value < 2.0**-6, uniform, normal_code_at_least(value))


@triton.jit
def code_window(peak, tables, min_code, last_unhalved):
    """The first and last code that can win (theorems 1 to 3); all codes where premise 0 fails."""
    first = tl.minimum(code_at_least(peak * tl.load(tables + LOWER)), FIRST_UNDOUBLED_CODE)
    last = tl.maximum(code_at_least(peak * tl.load(tables + UPPER)) - 1, last_unhalved)
    first = tl.maximum(first, min_code)
    last = tl.minimum(last, MAX_CODE)
    amax = tl.load(tables + GLOBAL_AMAX)
    doubles = amax >= LEAST_GLOBAL_AMAX
    first = tl.where(doubles, first, min_code)
    last = tl.where(doubles, last, MAX_CODE)
    least_scale = 0.0 - tl.load(tables + 2 * min_code)
    trivial = peak * 4.0 <= tl.where(amax == 0.0, float("inf"), least_scale)
    return tl.where(trivial, min_code, first), tl.where(trivial, min_code, last)


@triton.jit
def load_pair(pointers):
    """The two floats at each of these pointers, in one load."""
    return tl.split(tl.load(pointers[:, None] + tl.arange(0, 2)[None, :]))


@triton.jit
def shared_rounder(magnitude, negative_inverse):
    slope = negative_inverse * (0.0 - SHARED_SLOPE)
    rounder = ()
    for i in tl.static_range(len(magnitude)):
        rounder = rounder + (tl.maximum(magnitude[i] * slope, SHARED_FLOOR),)
    return rounder


@triton.jit
def excess_over_6(magnitude, weights, negative_scale):
    """What elements lose beyond 6 scales, by the weights: no smaller scale loses less (theorems 6 and 10)."""
    excess = tl.zeros_like(negative_scale)
    six = excess + 6.0
    for i in tl.static_range(len(magnitude)):
        over = tl.maximum(fma(six, negative_scale, magnitude[i]), 0.0)
        excess = fma(over * over, weights[i], excess)
    return excess


@triton.jit
def _squares(magnitude, rounder, negative_scale, negative_inverse, CLIP: tl.constexpr):
    """The error at one scale (theorem 4), in two chains for the sake of latency."""
    even = tl.zeros_like(negative_scale)
    odd = even
    for i in tl.static_range(len(magnitude)):
        q = rounder[i] - fma(magnitude[i], negative_inverse, rounder[i])
        if CLIP:
            q = tl.minimum(q, 6.0)
        residual = fma(q, negative_scale, magnitude[i])
        if i % 2 == 0:
            even = fma(residual, residual, even)
        else:
            odd = fma(residual, residual, odd)
    return even + odd


@triton.jit
def find_survivors(magnitude, peak, scales, lowest_ratio, relative_margin, absolute_margin,
                   CLIPPING: tl.constexpr, CANDIDATES: tl.constexpr, BELOW: tl.constexpr):  # fmt: skip
    """The codes that may have the least error: bit j + 1 for scales[2 * j], j < CANDIDATES.

    Elements may exceed 7 scales only at the first CLIPPING codes. BELOW: bit 0 for scales[-2], which
    is in the window where peak is at most lowest_ratio times it.
    """
    errors = ()
    old_scale = tl.full(peak.shape, float("inf"), tl.float32)
    least = old_scale
    for group in tl.static_range(CANDIDATES // 3):  # three codes share a rounder for the middle one
        first = load_pair(scales + 6 * group)
        middle = load_pair(scales + 6 * group + 2)
        last = load_pair(scales + 6 * group + 4)
        if group % 3 == 0:
            rounder = shared_rounder(magnitude, middle[1])
        else:
            slope = old_scale * middle[1]
            moved = ()
            for i in tl.static_range(len(magnitude)):
                moved = moved + (rounder[i] * slope,)
            rounder = moved
        old_scale = middle[0]
        errors = errors + (
            _squares(magnitude, rounder, first[0], first[1], 3 * group < CLIPPING),
            _squares(magnitude, rounder, middle[0], middle[1], 3 * group + 1 < CLIPPING),
            _squares(magnitude, rounder, last[0], last[1], 3 * group + 2 < CLIPPING),
        )
    for j in tl.static_range(CANDIDATES):
        least = tl.minimum(least, errors[j])

    below = tl.full(peak.shape, float("inf"), tl.float32)
    if BELOW:
        negative_scale, negative_inverse = load_pair(scales - 2)
        excess = peak + 6.0 * negative_scale  # of the largest element alone
        bound = least * (1.0 + relative_margin) + absolute_margin
        possible = (peak <= (0.0 - lowest_ratio) * negative_scale) & (excess * excess <= bound)
        if any_of(possible):
            rounder = shared_rounder(magnitude, negative_inverse)
            error = _squares(magnitude, rounder, negative_scale, negative_inverse, True)
            below = tl.where(possible, error, below)
            least = tl.minimum(least, below)

    threshold = least * (1.0 + relative_margin) + absolute_margin
    bits = tl.where(below <= threshold, 1, 0)
    for j in tl.static_range(CANDIDATES):
        bits = bits | tl.where(errors[j] <= threshold, 2 << j, 0)
    return bits


@triton.jit
def lowest_bit(bits):
    """The number of the lowest set bit; bits > 0, below 2^24."""
    return ((bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _code_after(code, origin, survivors):
    """The next code to compare: of the survivors, or of all where there are none; 127 at the end."""
    later = survivors >> tl.minimum(code - origin + 1, 31)
    found = tl.where(later > 0, code + 1 + lowest_bit(tl.maximum(later, 1)), MAX_CODE + 1)
    return tl.minimum(tl.where(survivors == 0, code + 1, found), MAX_CODE + 1)


@triton.jit
def exact_best(blocks, contested, step, tables, origin, last, survivors, block_size,
                BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """The lowest of the surviving codes origin .. last with the least s^2 B - 2 s A (theorem 5)."""
    best = origin
    best_high = tl.full([T], float("inf"), tl.float64)
    best_low = best_high
    code = tl.where(contested, _code_after(origin - 1, origin, survivors), MAX_CODE + 1)
    open_ = code <= last
    while any_of(open_):
        scale = 0.0 - tl.load(tables + 2 * code)
        thresholds = point_thresholds(tables, code, T)
        a = tl.zeros([T], tl.float64)
        b = tl.zeros([T], tl.float64)
        for top in range(0, block_size, 16):
            w = load_16(blocks, open_, top, step, BLOCK_SIZE, VECTOR, T)
            squares = tl.zeros([T], tl.float32)  # exact: a few quarters
            for i in tl.static_range(16):
                magnitude = magnitude_of(w[i])
                q = nearest_point(magnitude, thresholds)
                a += magnitude.to(tl.float64) * q.to(tl.float64)
                squares += q * q
            b += squares.to(tl.float64)
        wide = scale.to(tl.float64)
        f_high, f_low = two_product(wide * wide, b)
        g_high, g_low = two_product(-2.0 * wide, a)
        high, low = add_pairs(f_high, f_low, g_high, g_low)
        better = open_ & ((high < best_high) | ((high == best_high) & (low < best_low)))
        best = tl.where(better, code, best)
        best_high = tl.where(better, high, best_high)
        best_low = tl.where(better, low, best_low)
        code = _code_after(code, origin, survivors)
        open_ = open_ & (code <= last)
    return best
