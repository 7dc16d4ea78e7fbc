"""CUDA: quadratic forms in float64 and in pairs of it, for codes that float32 cannot tell apart.

Such code seldom runs: much of it takes an element at a time, and so is quick to compile.
"""

import triton
import triton.language as tl

from nvfp4sweep import window as proofs
from nvfp4sweep.triton_arithmetic import add_pairs, at_most, two_product
from nvfp4sweep.triton_blocks import any_of, nearest_point, point_thresholds
from nvfp4sweep.triton_hessian_tables import FLUSHED, ROW_SUMS

MARGIN = tl.constexpr(proofs.HESSIAN_MARGIN_FLOAT64)


@triton.jit
def _dequantized(w, scale, thresholds):
    """q s with the sign of w, in float64, where it is exact."""
    point = nearest_point(tl.abs(w), thresholds).to(tl.float64) * scale.to(tl.float64)
    return tl.where(w < 0.0, 0.0 - point, point)


@triton.jit
def _load(blocks, inside, step, i):
    return tl.load(blocks + i * step, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def form_and_size(w, blocks, inside, step, scale, thresholds, hessian, T: tl.constexpr):
    """r^T H r of the scaled Hessian, with sums over j, then over i, as in the oracle; and P of theorem 10."""
    residuals = ()
    for i in tl.static_range(16):
        residuals = residuals + (w[i].to(tl.float64) - _dequantized(w[i], scale, thresholds),)
    h = hessian.to(tl.pointer_type(tl.float64), bitcast=True)
    total = tl.zeros([T], tl.float64)
    size = total
    for i in range(16):
        row = tl.zeros([T], tl.float64)
        for j in tl.static_range(16):
            row += tl.load(h + 16 * i + j) * residuals[j]
        w_i = _load(blocks, inside, step, i)
        residual = w_i.to(tl.float64) - _dequantized(w_i, scale, thresholds)
        total += row * residual
        size += tl.load(hessian + ROW_SUMS + i).to(tl.float64) * (residual * residual)
    return total, size


@triton.jit
def _have_same_points(blocks, inside, step, tables, code, other, T: tl.constexpr):
    """Whether two codes have equal q s for all elements."""
    thresholds = point_thresholds(tables, code, T)
    other_thresholds = point_thresholds(tables, other, T)
    scale = 0.0 - tl.load(tables + 2 * code)
    other_scale = 0.0 - tl.load(tables + 2 * other)
    same = inside
    for i in range(16):
        w_i = _load(blocks, inside, step, i)
        same = same & (
            _dequantized(w_i, scale, thresholds) == _dequantized(w_i, other_scale, other_thresholds)
        )
    return same


@triton.jit
def _objective(blocks, inside, step, tables, code, hessian, T: tl.constexpr):
    """sum H_ij p_i (p_j - 2 w_j), p = q s: the error less its constant part, as a pair (theorem 11)."""
    thresholds = point_thresholds(tables, code, T)
    scale = 0.0 - tl.load(tables + 2 * code)
    h = hessian.to(tl.pointer_type(tl.float64), bitcast=True)
    high = tl.zeros([T], tl.float64)
    low = high
    for i in range(16):
        p_i = _dequantized(_load(blocks, inside, step, i), scale, thresholds)
        for j in range(16):
            w_j = _load(blocks, inside, step, j)
            p_j = _dequantized(w_j, scale, thresholds)
            h_ij = tl.load(h + 16 * i + j)
            term, rest = two_product(h_ij * p_i, p_j - 2.0 * w_j.to(tl.float64))
            high, low = add_pairs(high, low, term, rest)
    return high, low


@triton.jit
def settle(w, peak, blocks, undecided, step, tables, single, lower, upper, hessian, T: tl.constexpr):
    """The lowest of the codes `single` and `lower` .. `upper` with the least exact error.

    They are gone through in float64, and a second time where that leaves several: these compare as pairs.
    """
    flushed = peak.to(tl.float64) * peak.to(tl.float64) * FLUSHED
    best = single
    least = tl.full([T], float("inf"), tl.float64)
    possible = least  # the least that the best may be more than
    others = least  # the least that any other may be
    again = tl.full([], 0, tl.int32)
    code = single
    contested = undecided & (lower <= upper)
    goes_on = contested
    while any_of(goes_on):
        thresholds = point_thresholds(tables, code, T)
        scale = 0.0 - tl.load(tables + 2 * code)
        error, size = form_and_size(w, blocks, goes_on, step, scale, thresholds, hessian, T)
        margin = size * MARGIN + flushed
        if again == 0:
            better = goes_on & (error < least)
            beaten = tl.where(better, least - (possible - least), error - margin)
            others = tl.where(goes_on & (beaten < others), beaten, others)
            least = tl.where(better, error, least)
            possible = tl.where(better, error + margin, possible)
            best = tl.where(better, code, best)
        else:
            near = goes_on & (code != best) & (error - margin <= possible)
            if any_of(near):
                same = _have_same_points(blocks, near, step, tables, best, code, T)
                wins = same & (code < best)
                near = near & ~same
                if any_of(near):
                    high, low = _objective(blocks, near, step, tables, best, hessian, T)
                    other_high, other_low = _objective(blocks, near, step, tables, code, hessian, T)
                    no_worse = at_most(other_high, other_low, high, low)
                    no_better = at_most(high, low, other_high, other_low)
                    wins = wins | (near & no_worse & (~no_better | (code < best)))
                best = tl.where(wins, code, best)
        goes_on = goes_on & (code < upper) | (goes_on & (code == single) & (single > upper))
        code = tl.where(code == single, lower, code + 1)
        if (again == 0) & ~any_of(goes_on):
            again += 1
            code = single
            goes_on = contested & (others <= possible)
    return best
