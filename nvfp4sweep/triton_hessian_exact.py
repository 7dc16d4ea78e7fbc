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
    is_open,
    is_unknown,
    two_sum,
    unit_below,
)
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
def _difference(blocks, inside, step, tables, code, other, hessian, T: tl.constexpr):
    """Of the sign that the error at `code` less that at `other` has."""
    thresholds, other_thresholds = point_thresholds(tables, code, T), point_thresholds(tables, other, T)
    scale, other_scale = 0.0 - tl.load(tables + 2 * code), 0.0 - tl.load(tables + 2 * other)
    h = hessian.to(tl.pointer_type(tl.float64), bitcast=True)
    total = tl.zeros([T], tl.float64)
    size = total
    for i in range(16):
        u, _, _ = _factors(blocks, inside, step, i, scale, thresholds, other_scale, other_thresholds)
        if any_of(inside & (u != 0.0)):
            for j in range(16):
                _, v, _ = _factors(blocks, inside, step, j, scale, thresholds, other_scale, other_thresholds)
                product = tl.load(h + 16 * i + j) * u * v
                total += product
                size += tl.abs(product)
    unknown = inside & is_unknown(total, size)
    total = tl.where(unknown, 0.0, total)
    unit_before = tl.full([T], FIRST_UNIT, tl.float64)
    unit = unit_below(size)
    while any_of(unknown):
        part = tl.zeros([T], tl.float64)
        rest = part
        for i in range(16):
            u, _, _ = _factors(blocks, unknown, step, i, scale, thresholds, other_scale, other_thresholds)
            if any_of(u != 0.0):
                for j in range(16):
                    _, v, v_rest = _factors(blocks, unknown, step, j, scale, thresholds, other_scale,
                                            other_thresholds)  # fmt: skip
                    for term in range(TERMS):
                        part, rest = add_term(part, rest, term, tl.load(h + 16 * i + j), u, v, v_rest, unit,
                                              unit_before)  # fmt: skip
        total = tl.where(unknown, total + part, total)
        unknown = unknown & is_open(total, rest)
        unit_before = unit
        unit = unit_below(rest)
    return total


@triton.jit
def settle(w, peak, blocks, undecided, step, tables, single, lower, upper, hessian, T: tl.constexpr):
    """The lowest of the codes `single` and `lower` .. `upper` with the least exact error.

    They are gone through in float64, and a second time where that leaves several: these compare exactly.
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
                difference = _difference(blocks, near, step, tables, code, best, hessian, T)
                wins = near & ((difference < 0.0) | ((difference == 0.0) & (code < best)))
                best = tl.where(wins, code, best)
        goes_on = goes_on & (code < upper) | (goes_on & (code == single) & (single > upper))
        code = tl.where(code == single, lower, code + 1)
        if (again == 0) & ~any_of(goes_on):
            again += 1
            code = single
            goes_on = contested & (others <= possible)
    return best
