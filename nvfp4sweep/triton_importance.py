"""CUDA: the sweep with importances (theorems 6 to 9 in window.py). A block in each thread.

find_best       the best code by a walk down in float32 that ends with a certificate
settle          ... among codes that float32 cannot tell apart, or all of them
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from nvfp4sweep import window as proofs
from nvfp4sweep.triton_arithmetic import add_pairs, at_most, fma, two_product
from nvfp4sweep.triton_blocks import (
    any_of,
    largest_of,
    load_16,
    magnitude_of,
    nearest_point,
    place,
    point_thresholds,
    store_packed,
)
from nvfp4sweep.triton_search import code_window, load_pair, normal_code_at_least, shared_rounder
from nvfp4sweep.triton_tables import AMAX, MAX_CODE, SCREEN_UPPER, TABLE

CLIPPING_RATIO = tl.constexpr(proofs.CLIPPING_RATIO)
# Codes screened before the first certificate is asked for: an octave and one more.
FIRST_CODES = tl.constexpr(9)
# More than float64 may be off by in a sum of so many squares.
SETTLED = tl.constexpr(2.0**-32)


@triton.jit
def _weighted(magnitude, importance, rounder, scale, CLIP: tl.constexpr):
    """The error at one (-scale, -1 / scale), in two chains for the sake of latency (theorem 8)."""
    even = tl.zeros_like(scale[0])
    odd = even
    for i in tl.static_range(len(magnitude)):
        q = rounder[i] - fma(magnitude[i], scale[1], rounder[i])
        if CLIP:
            q = tl.minimum(q, 6.0)
        residual = fma(q, scale[0], magnitude[i])
        if i % 2 == 0:
            even = fma(residual * residual, importance[i], even)
        else:
            odd = fma(residual * residual, importance[i], odd)
    return even + odd


@triton.jit
def _excess(magnitude, importance, negative_scale):
    """What no scale down from here can save: that elements exceed 6 of it (theorem 6)."""
    excess = tl.zeros_like(negative_scale)
    six = excess + 6.0
    for i in tl.static_range(len(magnitude)):
        over = tl.maximum(fma(six, negative_scale, magnitude[i]), 0.0)
        excess = fma(over * over, importance[i], excess)
    return excess


@triton.jit
def _three_codes(magnitude, importance, rounder, scales, first_code, best, least, second,
                 CLIP: tl.constexpr):  # fmt: skip
    for j in tl.static_range(3):
        error = _weighted(magnitude, importance, rounder, load_pair(scales + 2 * j), CLIP)
        second = tl.minimum(second, tl.maximum(error, least))
        best = tl.where(error < least, first_code + j, best)
        least = tl.minimum(error, least)
    return best, least, second


@triton.jit
def find_best(magnitude, importance, peak, inside, tables, last, lowest, relative_margin,
              absolute_margin):  # fmt: skip
    """(best code, whether that is certain) for the codes `last` and below, but none below `lowest`."""
    best = tl.full(last.shape, MAX_CODE, tl.int32)
    least = tl.full(last.shape, float("inf"), tl.float32)
    second = least  # the least error but one
    base = last - (FIRST_CODES - 1)
    scales = tables + 2 * tl.maximum(base, 1)
    middle = load_pair(scales + 2)
    # Elements exceed 7 scales only at the three lowest codes, unless `last` is 126.
    fits = (base >= lowest) & (peak <= 0.0 - CLIPPING_RATIO * tl.load(scales + 6))
    rounder = shared_rounder(magnitude, middle[1])
    for group in tl.static_range(FIRST_CODES // 3):
        if group > 0:
            old_scale = middle[0]
            middle = load_pair(scales + 6 * group + 2)
            moved = ()
            for i in tl.static_range(len(magnitude)):
                moved = moved + (rounder[i] * (old_scale * middle[1]),)
            rounder = moved
        best, least, second = _three_codes(magnitude, importance, rounder, scales + 6 * group,
                                           base + 3 * group, best, least, second, group == 0)  # fmt: skip
    # The others start at `last`, with every element cut at 6.
    best = tl.where(fits, best, MAX_CODE)
    least = tl.where(fits, least, float("inf"))
    second = tl.where(fits, second, float("inf"))
    base = tl.where(fits, base, last + 1)

    # Down from here, three codes at a time, until a certificate.
    limit = least * (1.0 + 2.0 * relative_margin) + absolute_margin
    excess = _excess(magnitude, importance, tl.load(tables + 2 * tl.maximum(base - 1, 1)))
    goes_on = inside & (base >= lowest + 3) & ~(excess > limit)
    while any_of(goes_on):
        base = tl.where(goes_on, base - 3, base)
        scales = tables + 2 * tl.maximum(base, 1)
        rounder = shared_rounder(magnitude, tl.load(scales + 3))
        found, lower, other = _three_codes(magnitude, importance, rounder, scales, base, best, least, second,
                                           True)  # fmt: skip
        best = tl.where(goes_on, found, best)
        least = tl.where(goes_on, lower, least)
        second = tl.where(goes_on, other, second)
        limit = least * (1.0 + 2.0 * relative_margin) + absolute_margin
        excess = _excess(magnitude, importance, tl.load(tables + 2 * tl.maximum(base - 1, 1)))
        goes_on = goes_on & (base >= lowest + 3) & ~(excess > limit)
    return best, (excess > limit) & (second > least * (1.0 + relative_margin) + absolute_margin)


@triton.jit
def _error(blocks, importance, inside, ones, step, importance_step, scale, thresholds,
           BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr, IVECTOR: tl.constexpr,
           T: tl.constexpr):  # fmt: skip
    """Summed in float64 element by element, as the oracle does."""
    wide = scale.to(tl.float64)
    error = tl.zeros([T], tl.float64)
    for top in range(0, BLOCK_SIZE, 16):
        w = load_16(blocks, inside, top, step, BLOCK_SIZE, VECTOR, T)
        h = load_16(importance, inside, top, importance_step, BLOCK_SIZE, IVECTOR, T)
        for i in tl.static_range(16):
            magnitude = magnitude_of(w[i])
            q = nearest_point(magnitude, thresholds)
            residual = magnitude.to(tl.float64) - q.to(tl.float64) * wide
            error += tl.where(ones, 1.0, h[i]).to(tl.float64) * (residual * residual)
    return error.to(tl.float32)


@triton.jit
def _element(blocks, importance, inside, ones, step, importance_step, i):
    """|w| and its importance: one at a time, for code that seldom runs and is quick to compile."""
    magnitude = magnitude_of(tl.load(blocks + i * step, mask=inside, other=0.0))
    weight = tl.load(importance + i * importance_step, mask=inside, other=0.0)
    return magnitude, tl.where(ones, 1.0, weight).to(tl.float64)


@triton.jit
def _error_and_excess(blocks, importance, inside, ones, step, importance_step, scale, thresholds, block_size,
                      T: tl.constexpr):  # fmt: skip
    wide = scale.to(tl.float64)
    error = tl.zeros([T], tl.float64)
    excess = error
    for i in range(block_size):
        magnitude, weight = _element(blocks, importance, inside, ones, step, importance_step, i)
        q = nearest_point(magnitude, thresholds)
        residual = magnitude.to(tl.float64) - q.to(tl.float64) * wide
        error += weight * (residual * residual)
        over = tl.maximum(magnitude.to(tl.float64) - 6.0 * wide, 0.0)
        excess += weight * (over * over)
    return error, excess


@triton.jit
def _objective(blocks, importance, inside, ones, step, importance_step, tables, code, block_size,
               T: tl.constexpr):  # fmt: skip
    """sum h p (p - 2 |w|), p = q s: the error less its constant part, as a pair (theorem 9)."""
    thresholds = point_thresholds(tables, code, T)
    wide = (0.0 - tl.load(tables + 2 * code)).to(tl.float64)
    high = tl.zeros([T], tl.float64)
    low = high
    for i in range(block_size):
        magnitude, weight = _element(blocks, importance, inside, ones, step, importance_step, i)
        point = nearest_point(magnitude, thresholds).to(tl.float64) * wide
        term, rest = two_product(weight * point, point - 2.0 * magnitude.to(tl.float64))
        high, low = add_pairs(high, low, term, rest)
    return high, low


@triton.jit
def settle(blocks, importance, undecided, ones, step, importance_step, tables, first, last, block_size,
           T: tl.constexpr):  # fmt: skip
    """The lowest code of first .. last with the least exact error, by a walk down."""
    best = last
    least = tl.full([T], float("inf"), tl.float64)
    code = last
    goes_on = undecided
    while any_of(goes_on):
        thresholds = point_thresholds(tables, code, T)
        scale = 0.0 - tl.load(tables + 2 * code)
        error, excess = _error_and_excess(blocks, importance, goes_on, ones, step, importance_step, scale,
                                          thresholds, block_size, T)  # fmt: skip
        wins = error < least * (1.0 - SETTLED)
        near = goes_on & ~wins & (error <= least * (1.0 + SETTLED))
        if any_of(near):
            high, low = _objective(blocks, importance, near, ones, step, importance_step, tables, code,
                                   block_size, T)  # fmt: skip
            best_high, best_low = _objective(blocks, importance, near, ones, step, importance_step, tables,
                                             best, block_size, T)  # fmt: skip
            wins = wins | (near & at_most(high, low, best_high, best_low))
        wins = wins & goes_on
        best = tl.where(wins, code, best)
        least = tl.where(wins, error, least)
        goes_on = goes_on & (code > first) & ~(excess > least * (1.0 + SETTLED))
        code = tl.where(goes_on, code - 1, code)
    return best


@triton.jit
def _sweep_tile(weight, importance, tables, amax, code, error, packed, tile, matrix, outer_stride,
                block_stride, step, inner_stride, importance_outer, importance_block, importance_step,
                importance_inner, length_blocks, inner, n_blocks, tiles_per_row, block_size, min_code,
                last_unhalved, lowest, relative_margin, absolute_margin,
                LANES: tl.constexpr, VECTOR: tl.constexpr, IVECTOR: tl.constexpr, INNER: tl.constexpr,
                BLOCK_SIZE: tl.constexpr, SCREEN: tl.constexpr, T: tl.constexpr,
                OVERLAP: tl.constexpr):  # fmt: skip
    outer, along, column = place(tile, tiles_per_row, length_blocks, inner, LANES, T)
    block = (outer * length_blocks + along) * inner + column
    inside = tile.to(tl.int64) * T + tl.arange(0, T) < n_blocks
    blocks = weight + outer * (outer_stride * VECTOR) + along * (block_stride * VECTOR)
    blocks += column * inner_stride
    weights = importance + outer * (importance_outer * IVECTOR) + along * (importance_block * IVECTOR)
    weights += column * importance_inner

    magnitude = ()
    importances = ()
    peak = tl.zeros([T], tl.float32)
    most = peak
    if SCREEN:
        for top in tl.static_range(0, BLOCK_SIZE, 16):
            w = load_16(blocks, inside, top, step, BLOCK_SIZE, VECTOR, T)
            h = load_16(weights, inside, top, importance_step, BLOCK_SIZE, IVECTOR, T)
            for i in tl.static_range(16):
                magnitude = magnitude + (magnitude_of(w[i]),)
                importances = importances + (h[i],)
        peak = largest_of(magnitude, 0, BLOCK_SIZE)
        most = largest_of(importances, 0, BLOCK_SIZE)
    else:
        for top in range(0, BLOCK_SIZE, 16):
            w = load_16(blocks, inside, top, step, BLOCK_SIZE, VECTOR, T)
            h = load_16(weights, inside, top, importance_step, BLOCK_SIZE, IVECTOR, T)
            for i in tl.static_range(16):
                peak = tl.maximum(peak, magnitude_of(w[i]))
                most = tl.maximum(most, h[i])
    ones = most == 0.0
    if OVERLAP:  # with tabulate, up to here
        cuda.gdc_wait()
    best = tl.full([T], MAX_CODE, tl.int32)
    undecided = inside
    if SCREEN:
        replaced = ()
        for i in tl.static_range(BLOCK_SIZE):
            replaced = replaced + (tl.where(ones, 1.0, importances[i]),)
        last = tl.minimum(normal_code_at_least(peak * tl.load(tables + SCREEN_UPPER)) - 1, MAX_CODE)
        best, certain = find_best(magnitude, replaced, peak, inside, tables, last, lowest, relative_margin,
                                  absolute_margin * tl.maximum(most, 1.0))  # fmt: skip
        undecided = inside & ~certain
    if any_of(undecided):
        _, last = code_window(peak, tables, min_code, last_unhalved)
        exact = settle(blocks, weights, undecided & (last > min_code), ones, step, importance_step, tables,
                       min_code, last, block_size, T)  # fmt: skip
        best = tl.where(undecided, tl.where(last > min_code, exact, min_code), best)

    out = matrix * n_blocks + block
    if amax is not None:
        tl.store(amax + out, tl.load(tables + AMAX + best), mask=inside)
    if code is not None:
        tl.store(code + out, best.to(tl.uint8), mask=inside)
    if error is not None or packed is not None:
        scale = 0.0 - tl.load(tables + 2 * best)
        thresholds = point_thresholds(tables, best, T)
        if error is not None:
            found = _error(blocks, weights, inside, ones, step, importance_step, scale, thresholds,
                           BLOCK_SIZE, VECTOR, IVECTOR, T)  # fmt: skip
            tl.store(error + out, found, mask=inside)
        if packed is not None:
            base = (outer * length_blocks + along) * (inner * (BLOCK_SIZE // 2)) + column
            base += matrix * n_blocks * (BLOCK_SIZE // 2)
            store_packed(packed, base, inner, blocks, inside, step, thresholds, VECTOR, INNER, BLOCK_SIZE,
                         T)  # fmt: skip


@triton.jit(do_not_specialize=["matrix_stride", "outer_stride", "block_stride", "step", "inner_stride",
                               "importance_matrix", "importance_outer", "importance_block",
                               "importance_step", "importance_inner", "length_blocks", "inner", "n_blocks",
                               "matrices", "tiles_per_row", "block_size", "min_code", "last_unhalved",
                               "lowest"])  # fmt: skip
def sweep_importance(weight, importance, tables, amax, code, error, packed, matrix_stride: tl.int64,
                     outer_stride: tl.int64, block_stride: tl.int64, step: tl.int64, inner_stride: tl.int64,
                     importance_matrix: tl.int64, importance_outer: tl.int64, importance_block: tl.int64,
                     importance_step: tl.int64, importance_inner: tl.int64,
                     length_blocks: tl.int64, inner: tl.int64, n_blocks: tl.int64, matrices: tl.int32,
                     tiles_per_row: tl.int32, block_size: tl.int32, min_code: tl.int32,
                     last_unhalved: tl.int32, lowest: tl.int32, relative_margin, absolute_margin,
                     LANES: tl.constexpr, VECTOR: tl.constexpr, IVECTOR: tl.constexpr, INNER: tl.constexpr,
                     BLOCK_SIZE: tl.constexpr, SCREEN: tl.constexpr, T: tl.constexpr,
                     OVERLAP: tl.constexpr):  # fmt: skip
    """As triton_kernels.sweep, with strides for the importance too: 0 where it repeats.

    VECTOR, IVECTOR: elements a load of a weight and of importances, to whose multiples the strides of outer
    and blocks are given. SCREEN: blocks fit in registers, else all codes are compared in float64.
    """
    for i in range(tl.program_id(1), matrices, tl.num_programs(1)):
        matrix = tl.full([], 0, tl.int64) + i
        _sweep_tile(weight + matrix * (matrix_stride * VECTOR),
                    importance + matrix * (importance_matrix * IVECTOR), tables + matrix * TABLE, amax, code,
                    error, packed, tl.program_id(0), matrix, outer_stride, block_stride, step, inner_stride,
                    importance_outer, importance_block, importance_step, importance_inner, length_blocks,
                    inner, n_blocks, tiles_per_row, block_size, min_code, last_unhalved, lowest,
                    relative_margin, absolute_margin, LANES, VECTOR, IVECTOR, INNER, BLOCK_SIZE, SCREEN, T,
                    OVERLAP)  # fmt: skip
