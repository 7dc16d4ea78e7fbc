"""CUDA: quadratic forms in float64 and in pairs of it, for codes that float32 cannot tell apart."""

import triton
import triton.language as tl

from nvfp4sweep import window as proofs
from nvfp4sweep.triton_arithmetic import add_pairs, at_most, two_product
from nvfp4sweep.triton_blocks import any_of, nearest_point, point_thresholds
from nvfp4sweep.triton_hessian_tables import FLUSHED, PAIRS, ROW_SUMS

MARGIN = tl.constexpr(proofs.HESSIAN_MARGIN_FLOAT64)


@triton.jit
def _dequantized(w, scale, thresholds):
    """q s with the sign of w, in float64, where it is exact."""
    point = nearest_point(tl.abs(w), thresholds).to(tl.float64) * scale.to(tl.float64)
    return tl.where(w < 0.0, 0.0 - point, point)


@triton.jit
def form_in_order(w, scale, thresholds, hessian):
    """r^T H r with sums over j, then over i, as the oracle does."""
    residuals = ()
    for i in tl.static_range(16):
        residuals = residuals + (w[i].to(tl.float64) - _dequantized(w[i], scale, thresholds),)
    total = tl.zeros_like(residuals[0])
    for i in tl.static_range(16):
        row = tl.zeros_like(total)
        for j in tl.static_range(16):
            row += tl.load(hessian + 16 * i + j).to(tl.float64) * residuals[j]
        total += row * residuals[i]
    return total.to(tl.float32)


@triton.jit
def _objective(blocks, inside, step, tables, code, hessian, T: tl.constexpr):
    """sum H_ij p_i (p_j - 2 w_j), p = q s: the error less its constant part, as a pair (theorem 11).

    One element at a time, as all that follows: such code seldom runs, and is quick to compile.
    """
    thresholds = point_thresholds(tables, code, T)
    scale = 0.0 - tl.load(tables + 2 * code)
    high = tl.zeros([T], tl.float64)
    low = high
    for i in range(16):
        w_i = tl.load(blocks + i * step, mask=inside, other=0.0).to(tl.float32)
        p_i = _dequantized(w_i, scale, thresholds)
        for j in range(16):
            w_j = tl.load(blocks + j * step, mask=inside, other=0.0).to(tl.float32)
            p_j = _dequantized(w_j, scale, thresholds)
            h = tl.load(hessian + 16 * i + j).to(tl.float64)
            term, rest = two_product(h * p_i, p_j - 2.0 * w_j.to(tl.float64))
            high, low = add_pairs(high, low, term, rest)
    return high, low


@triton.jit
def _better_as_pairs(blocks, inside, step, tables, lower, higher, hessian, T: tl.constexpr):
    """Whether the lower of two codes is the better, or as good."""
    high, low = _objective(blocks, inside, step, tables, lower, hessian, T)
    other_high, other_low = _objective(blocks, inside, step, tables, higher, hessian, T)
    return at_most(high, low, other_high, other_low)


@triton.jit
def settle_two(w, peak, blocks, near, step, tables, first, second, hessian, T: tl.constexpr):
    """The better of two codes; the lower one in a tie."""
    lower = tl.minimum(first, second)
    higher = tl.maximum(first, second)
    low_thresholds = point_thresholds(tables, lower, T)
    high_thresholds = point_thresholds(tables, higher, T)
    low_scale = 0.0 - tl.load(tables + 2 * lower)
    high_scale = 0.0 - tl.load(tables + 2 * higher)
    residuals = ()
    others = ()
    same = near
    for i in tl.static_range(16):
        p = _dequantized(w[i], low_scale, low_thresholds)
        other = _dequantized(w[i], high_scale, high_thresholds)
        same = same & (p == other)
        residuals = residuals + (w[i].to(tl.float64) - p,)
        others = others + (w[i].to(tl.float64) - other,)
    difference = tl.zeros([T], tl.float64)
    size = peak.to(tl.float64) * peak.to(tl.float64) * (FLUSHED / MARGIN)
    for i in tl.static_range(16):
        start = hessian + PAIRS + i * 16 - i * (i - 1) // 2
        row = tl.zeros([T], tl.float64)
        other_row = row
        for j in tl.static_range(i, 16):
            h = tl.load(start + j - i).to(tl.float64)
            row += h * residuals[j]
            other_row += h * others[j]
        difference += row * residuals[i]
        difference -= other_row * others[i]
        row_sum = tl.load(hessian + ROW_SUMS + i).to(tl.float64)
        size += row_sum * (residuals[i] * residuals[i] + others[i] * others[i])
    lower_wins = same | (difference < 0.0)
    unclear = near & ~same & (tl.abs(difference) <= size * (2.0 * MARGIN))
    if any_of(unclear):
        as_pairs = _better_as_pairs(blocks, unclear, step, tables, lower, higher, hessian, T)
        lower_wins = tl.where(unclear, as_pairs, lower_wins)
    return tl.where(lower_wins, lower, higher)


@triton.jit
def _form_and_size(blocks, inside, step, tables, code, hessian, T: tl.constexpr):
    """r^T H r and P of theorem 10 in float64, for the scaled Hessian."""
    thresholds = point_thresholds(tables, code, T)
    scale = 0.0 - tl.load(tables + 2 * code)
    total = tl.zeros([T], tl.float64)
    size = total
    for i in range(16):
        w_i = tl.load(blocks + i * step, mask=inside, other=0.0).to(tl.float32)
        r_i = w_i.to(tl.float64) - _dequantized(w_i, scale, thresholds)
        start = hessian + PAIRS + i * 16 - i * (i - 1) // 2
        row = tl.load(start).to(tl.float64) * r_i
        for j in range(i + 1, 16):
            w_j = tl.load(blocks + j * step, mask=inside, other=0.0).to(tl.float32)
            r_j = w_j.to(tl.float64) - _dequantized(w_j, scale, thresholds)
            row += tl.load(start + j - i).to(tl.float64) * r_j
        total += row * r_i
        size += tl.load(hessian + ROW_SUMS + i).to(tl.float64) * (r_i * r_i)
    return total, size


@triton.jit
def settle_all(peak, blocks, undecided, step, tables, first, last, hessian, T: tl.constexpr):
    """The lowest code of first .. last with the least exact error."""
    flushed = peak.to(tl.float64) * peak.to(tl.float64) * FLUSHED
    best = tl.zeros([T], tl.int32) + first
    least = tl.full([T], float("inf"), tl.float64)
    least_margin = tl.zeros([T], tl.float64)
    code = best
    goes_on = undecided
    while any_of(goes_on):
        error, size = _form_and_size(blocks, goes_on, step, tables, code, hessian, T)
        margin = size * MARGIN + flushed
        wins = error + margin < least - least_margin
        near = goes_on & ~wins & (error - margin <= least + least_margin)
        if any_of(near):
            wins = wins | (near & ~_better_as_pairs(blocks, near, step, tables, best, code, hessian, T))
        wins = wins & goes_on
        best = tl.where(wins, code, best)
        least = tl.where(wins, error, least)
        least_margin = tl.where(wins, margin, least_margin)
        goes_on = goes_on & (code < last)
        code = tl.where(goes_on, code + 1, code)
    return best
