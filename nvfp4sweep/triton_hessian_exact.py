"""CUDA: quadratic forms in float64, and exactly, for codes that float32 cannot tell apart.

Such code seldom runs: much of it takes an element at a time, and so is quick to compile.
"""

import triton
import triton.language as tl

from nvfp4sweep import window as proofs
from nvfp4sweep.triton_arithmetic import (
    FIRST_UNIT,
    TERMS,
    add_term,
    any_of,
    is_open,
    is_unknown,
    two_sum,
    unit_below,
)
from nvfp4sweep.triton_blocks import nearest_point, next_thread, pick, point_thresholds
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
def _factors(blocks, inside, step, i, scale, thresholds, other_scale, other_thresholds):
    """u, and v with its rest, of element i (theorem 9)."""
    w_i = _load(blocks, inside, step, i)
    point = _dequantized(w_i, scale, thresholds)
    other_point = _dequantized(w_i, other_scale, other_thresholds)
    v, v_rest = two_sum(2.0 * w_i.to(tl.float64), 0.0 - (point + other_point))
    return other_point - point, v, v_rest


@triton.jit
def have_same_points(blocks, inside, step, tables, code, other, T: tl.constexpr):
    """Whether two codes have equal q s for all elements, and so equal errors."""
    thresholds, other_thresholds = point_thresholds(tables, code, T), point_thresholds(tables, other, T)
    scale, other_scale = 0.0 - tl.load(tables + 2 * code), 0.0 - tl.load(tables + 2 * other)
    same = inside
    for i in range(16):
        u, _, _ = _factors(blocks, inside, step, i, scale, thresholds, other_scale, other_thresholds)
        same = same & (u == 0.0)
    return same


@triton.jit
def _difference(block, step, tables, code, other, hessian, lane, T: tl.constexpr):
    """Of the sign that a block's error at `code` less that at `other` has. A row of H in each thread."""
    inside = lane < 16
    blocks = block + lane * 0
    codes, others = lane * 0 + code, lane * 0 + other
    thresholds, other_thresholds = point_thresholds(tables, codes, T), point_thresholds(tables, others, T)
    scale, other_scale = 0.0 - tl.load(tables + 2 * code), 0.0 - tl.load(tables + 2 * other)
    row = hessian.to(tl.pointer_type(tl.float64), bitcast=True) + lane * 16
    u, _, _ = _factors(blocks, inside, step, lane, scale, thresholds, other_scale, other_thresholds)
    sums = tl.zeros([T], tl.float64)
    sizes = sums
    for j in range(16):
        _, v, _ = _factors(blocks, inside, step, j, scale, thresholds, other_scale, other_thresholds)
        product = tl.load(row + j, mask=inside, other=0.0) * u * v
        sums += product
        sizes += tl.abs(product)
    # In all threads alike, or the loop below would count as divergent.
    none = tl.zeros([T], tl.float64)
    total, size = none + tl.sum(sums, axis=0), none + tl.sum(sizes, axis=0)
    unknown = is_unknown(total, size)
    total = tl.where(unknown, 0.0, total)
    unit_before = none + FIRST_UNIT
    unit = unit_below(size)
    while any_of(unknown):
        part, rest = none, none
        for j in range(16):
            h = tl.load(row + j, mask=inside, other=0.0)
            _, v, v_rest = _factors(blocks, inside, step, j, scale, thresholds, other_scale,
                                    other_thresholds)  # fmt: skip
            for term in range(TERMS):
                part, rest = add_term(part, rest, term, h, u, v, v_rest, unit, unit_before)
        total += tl.sum(part, axis=0)
        left = none + tl.max(rest, axis=0)
        unknown = is_open(total, left)
        unit_before = unit
        unit = unit_below(left)
    return total


@triton.jit
def _exact_best(block, step, flushed, tables, single, lower, upper, hessian, lane, T: tl.constexpr):
    """The lowest of the codes `single` and `lower` .. `upper` with a block's least exact error.

    A code in each thread.
    """
    inside = lane >= 0
    blocks = block + lane * 0
    w = ()
    for i in tl.static_range(16):
        w = w + (_load(blocks, inside, step, i),)
    best = single
    least = tl.full([], float("inf"), tl.float64)  # that the best may have
    possible = least  # more than this the least error is not
    first = lower - 1  # whose place `single` has
    while first <= upper:
        code = first + lane
        tried = (code <= upper) | (code == lower - 1)
        code = tl.where(code == lower - 1, single, tl.where(tried, code, single))
        thresholds = point_thresholds(tables, code, T)
        scale = 0.0 - tl.load(tables + 2 * code)
        error, size = form_and_size(w, blocks, inside, step, scale, thresholds, hessian, T)
        margin = size * MARGIN + flushed
        tried = tried & (error < float("inf"))  # not where an element is not finite
        low = tl.where(tried, error - margin, float("inf"))
        possible = tl.minimum(possible, tl.min(tl.where(tried, error + margin, float("inf")), axis=0))
        near = tried & (low <= possible)
        best = tl.where(least <= possible, best, tl.max(tl.where(near, code, 0), axis=0))
        contenders = near & (code != best)
        while any_of(contenders):
            other = tl.max(tl.where(contenders, code, 0), axis=0)
            contenders = contenders & (code != other)
            difference = _difference(block, step, tables, other, best, hessian, lane, T)
            best = tl.where(any_of((difference < 0.0) | ((difference == 0.0) & (other < best))), other, best)
        here = tl.min(tl.where(code == best, low, float("inf")), axis=0)
        least = tl.where(here < float("inf"), here, least)
        first += T
    return best


@triton.jit
def settle(peak, blocks, undecided, step, tables, single, lower, upper, hessian, T: tl.constexpr):
    """The lowest of the codes `single` and `lower` .. `upper` with the least exact error.

    One block after another. They are few, and the kernel may wait for one: so its codes go to all threads.
    """
    best = single
    flushed = peak.to(tl.float64) * peak.to(tl.float64) * FLUSHED
    while any_of(undecided):
        thread, lanes = next_thread(undecided, T)
        found = _exact_best(pick(blocks, thread), step, pick(flushed, thread), tables, pick(single, thread),
                            pick(lower, thread), pick(upper, thread), hessian, lanes, T)  # fmt: skip
        best = tl.where(thread, found, best)
        undecided = undecided & ~thread
    return best
