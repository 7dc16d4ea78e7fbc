"""CUDA: the sweep with block Hessians (theorems 10 and 11 in window.py).

The blocks of a tile lie at the same place along the axis, so that they share a Hessian. A block in each
thread. Codes are tried two at a time from the one below that of absmax: upwards, then downwards, each way
until a certificate.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from nvfp4sweep import window as proofs
from nvfp4sweep.triton_arithmetic import any_of, fma
from nvfp4sweep.triton_blocks import (
    largest_of,
    load_16,
    load_shared,
    point_thresholds,
    store_amax_and_code,
    store_packed,
)
from nvfp4sweep.triton_hessian_exact import form_and_size, have_same_points, settle
from nvfp4sweep.triton_hessian_tables import (
    EXCESS,
    FLUSHED,
    FRACTION,
    HESSIAN_TABLE,
    PAIRS,
    ROW_SUMS,
    SUM,
    UNSCALE,
    pair_index,
)
from nvfp4sweep.triton_search import code_at_least, code_window, excess_over_6, load_pair, shared_rounder
from nvfp4sweep.triton_tables import MAX_CODE, SCREEN_UPPER, TABLE

MARGIN = tl.constexpr(proofs.HESSIAN_MARGIN_FLOAT32)
FIRST_NORMAL_CODE = tl.constexpr(proofs.FIRST_NORMAL_CODE)
CLIPPING_RATIO = tl.constexpr(proofs.CLIPPING_RATIO)
# Sums of squares times a scaled Hessian stay below float32's largest.
LARGEST_PEAK = tl.constexpr(proofs.GREATEST_WEIGHTED_PEAK)
# What all products that float32 flushes come to.
UNDERFLOW = tl.constexpr(2.0**-113)
# Covers the rounding of a certificate.
CERTIFIED = tl.constexpr(1.0 + 2.0**-16)
# Inverse scales on either side of the true one.
BELOW = tl.constexpr(1.0 - 2.0**-22)
ABOVE = tl.constexpr(1.0 + 2.0**-22)
# A walk up asks for a certificate after so many turns of two codes: a warp hardly ever needs fewer.
FIRST_TURNS = tl.constexpr(6)
# The scale of absmax's code, and 4M, in terms of M / 3.5.
ABSMAX = tl.constexpr(3.5 / 6 * (1 + 2.0**-20))
ALL_ZERO = tl.constexpr(3.5 * 4 * (1 + 2.0**-20))


@triton.jit
def _with_signs(rounder, w):
    """Of the sign of w: a sum of a rounder and |w| / s may enter a binade that the rounder is not in."""
    signed = ()
    for i in tl.static_range(16):
        sign = w[i].to(tl.int32, bitcast=True) & -(2**31)
        signed = signed + ((rounder[i].to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True),)
    return signed


@triton.jit
def _points(w, rounder, scale):
    """q at one (-scale, -1 / scale), and bits that are 0 if all are nearest points and none ties.

    For |w| up to 7 scales; beyond them q may be anything from 5 up.
    """
    below, above = scale[1] * BELOW, scale[1] * ABOVE
    points = ()
    doubt = tl.zeros(scale[0].shape, tl.int32)
    for i in tl.static_range(16):
        # Rounding is monotone, and the two lie on either side of w / scale.
        rounded = fma(w[i], below, rounder[i])
        again = fma(w[i], above, rounder[i])
        doubt = doubt | (rounded.to(tl.int32, bitcast=True) ^ again.to(tl.int32, bitcast=True))
        points = points + (rounder[i] - rounded,)
    # The mask removes nothing. Without it LLVM makes sixteen comparisons of it.
    return points, doubt & 0x7FFFFFFF


@triton.jit
def _exact_points(w, rounder, scale):
    """Always the nearest point, in a tie that of the even code; 6 beyond 6."""
    below, above = scale[1] * BELOW, scale[1] * ABOVE
    points = ()
    for i in tl.static_range(16):
        low = rounder[i] - fma(w[i], below, rounder[i])
        high = rounder[i] - fma(w[i], above, rounder[i])
        both = low + high
        beyond = fma(both, 0.5 * scale[0], w[i])  # their midpoint: of the sign of w, exactly
        beyond = tl.where(w[i] < 0.0, 0.0 - beyond, beyond)
        # Of the midpoints .25, .75, 1.25, 1.75, 2.5, 3.5 and 5 these have the even code above.
        even_above = (both.to(tl.int32, bitcast=True) & 0x400000) != 0
        q = tl.where((beyond > 0.0) | ((beyond == 0.0) & even_above), high, low)
        points = points + (tl.minimum(tl.maximum(q, -6.0), 6.0),)
    return points


@triton.jit
def _residuals(w, points, scale):
    residuals = ()
    for i in tl.static_range(16):
        residuals = residuals + (fma(points[i], scale[0], w[i]),)
    return residuals


@triton.jit
def _squares(residuals, row_sums):
    """P of theorem 10."""
    even = tl.zeros_like(residuals[0])
    odd = even
    for i in tl.static_range(0, 16, 2):
        even = fma(residuals[i] * residuals[i], row_sums[i], even)
        odd = fma(residuals[i + 1] * residuals[i + 1], row_sums[i + 1], odd)
    return even + odd


@triton.jit
def _forms(residuals, hessian, T: tl.constexpr):
    """r^T H r of each: the diagonal and twice the rest of H."""
    h = load_shared(hessian + PAIRS, 136)
    results = ()
    for n in tl.static_range(len(residuals)):
        results = results + (tl.zeros([T], tl.float32),)
    for i in tl.static_range(16):
        sums = ()
        for n in tl.static_range(len(residuals)):
            row = h[pair_index(i, i)] * residuals[n][i]
            for j in tl.static_range(i + 1, 16):
                row = fma(h[pair_index(i, j)], residuals[n][j], row)
            sums = sums + (fma(row, residuals[n][i], results[n]),)
        results = sums
    return results


@triton.jit
def _keep_best(error, margin, code, best, second):
    """The best (error, margin, code), and the second (least possible error, code, that of any third)."""
    better = error < best[0]
    beaten = tl.where(better, best[0] - best[1], error - margin)
    beaten_code = tl.where(better, best[2], code)
    second = (
        tl.minimum(beaten, second[0]),
        tl.where(beaten < second[0], beaten_code, second[1]),
        tl.minimum(second[2], tl.maximum(beaten, second[0])),
    )
    best = (
        tl.minimum(error, best[0]),
        tl.where(better, margin, best[1]),
        tl.where(better, code, best[2]),
    )
    return best, second


@triton.jit
def _opaque(hessian, turn):
    """The same pointer, which the compiler cannot know: or it would load a whole Hessian before a loop, into
    more registers than there are. `turn` counts from 0."""
    return hessian + 4 * tl.minimum(turn, 0)


@triton.jit
def _residuals_at(w, rounder, peak, scale, allowed):
    points, doubt = _points(w, rounder, scale)
    # One branch for both takes less time than one for each.
    if any_of(allowed & ((doubt != 0) | (peak > 0.0 - CLIPPING_RATIO * scale[0]))):
        points = _exact_points(w, rounder, scale)
    return _residuals(w, points, scale)


@triton.jit
def _try_codes(w, magnitude, peak, first_code, last_code, tables, hessian, row_sums, fraction, floor, best,
               second, T: tl.constexpr):  # fmt: skip
    """Try two codes, normal ones, from first_code, but none beyond last_code.

    They share a rounder and what is loaded of the Hessian.
    """
    first = tl.minimum(tl.maximum(first_code, 1), MAX_CODE - 1)
    scales = (load_pair(tables + 2 * first), load_pair(tables + 2 * first + 2))
    rounder = _with_signs(shared_rounder(magnitude, scales[1][1]), w)
    residuals = ()
    sizes = ()
    wanted = ()
    bound = (best[0] + best[1]) * CERTIFIED
    for n in tl.static_range(2):
        allowed = (first + n >= first_code) & (first + n <= last_code)
        residuals = residuals + (_residuals_at(w, rounder, peak, scales[n], allowed),)
        sizes = sizes + (_squares(residuals[n], row_sums),)
        wanted = wanted + (allowed & ~(fraction * sizes[n] > bound),)
    if any_of(wanted[0] | wanted[1]):
        forms = _forms(residuals, hessian, T)
        for n in tl.static_range(2):
            error = tl.where(wanted[n], forms[n], float("inf"))
            best, second = _keep_best(error, sizes[n] * MARGIN + floor, first + n, best, second)
    return best, second


@triton.jit
def _flat(magnitude, row_sums, negative_scale):
    """P of no scale up from here is less: elements keep their distance from 0 and from half a scale."""
    flat = tl.zeros_like(negative_scale)
    half = -0.5 * negative_scale
    for i in tl.static_range(16):
        kept = tl.minimum(magnitude[i], tl.maximum(half - magnitude[i], 0.0))
        flat = fma(kept * kept, row_sums[i], flat)
    return flat


@triton.jit
def _norm(w, hessian, floor, T: tl.constexpr):
    """(N, P0) of theorem 12."""
    size = _squares(w, load_shared(hessian + ROW_SUMS, 16))
    form = _forms((w,), hessian, T)[0]
    return tl.sqrt(tl.maximum(form - (size * MARGIN + floor), 0.0)), size


@triton.jit
def find_best(w, magnitude, peak, inside, tables, hessian, min_code, T: tl.constexpr):
    """The best, the others, the first and last code tried, and whether the first is the lowest that can win.

    The best as (error, margin, code), the others as (least possible error, code, that of a third code).
    """
    fraction = tl.maximum(tl.load(hessian + FRACTION), 0.0)
    screens = peak * tl.load(tables + SCREEN_UPPER)
    # From the first normal code up neighbouring codes may share a rounder.
    lowest = tl.maximum(min_code, FIRST_NORMAL_CODE)
    start = tl.maximum(tl.minimum(code_at_least(screens * ABSMAX), MAX_CODE + 1) - 1, lowest)
    top = tl.minimum(tl.maximum(code_at_least(screens * ALL_ZERO), min_code), MAX_CODE)
    floor = peak * peak * FLUSHED + UNDERFLOW
    infinite = tl.full(peak.shape, float("inf"), tl.float32)
    none = tl.full(peak.shape, MAX_CODE, tl.int32)
    best = (infinite, tl.zeros_like(peak), none)
    second = (infinite, none, infinite)
    norm = tl.zeros_like(peak)
    total = norm
    nu = tl.load(hessian + EXCESS)
    # One over S of theorem 12, rounded down.
    per_scale = 1.0 / (CERTIFIED * 6.0 * tl.sqrt((1.0 + nu) * tl.load(hessian + SUM)))
    if fraction == 0.0:
        norm, total = _norm(w, hessian, floor, T)

    # Two codes a turn: up from `start` to a certificate, then down from there.
    falling = tl.full([], 0, tl.int32)
    turn = falling
    edge = start  # the first code beyond those tried, in the first half; then the last one tried
    last = top
    certified = start < 0
    goes_on = inside & (start <= top)
    while any_of(goes_on):
        here = _opaque(hessian, turn)
        turn += 1
        row_sums = load_shared(here + ROW_SUMS, 16)
        first_code = tl.where(falling == 0, edge, tl.maximum(edge - 2, lowest))
        last_code = tl.where(falling == 0, top, edge - 1)
        last_code = tl.where(goes_on, last_code, 0)
        best, second = _try_codes(w, magnitude, peak, first_code, last_code, tables, here, row_sums, fraction,
                                  floor, best, second, T)  # fmt: skip
        bound = (best[0] + best[1]) * CERTIFIED
        edge = tl.where(goes_on, tl.where(falling == 0, edge + 2, first_code), edge)
        if falling == 0:
            goes_on = goes_on & (edge <= top)
            if turn >= FIRST_TURNS:
                next_scale = tl.load(tables + 2 * tl.minimum(tl.maximum(edge, 1), MAX_CODE))
                goes_on = goes_on & ~(fraction * _flat(magnitude, row_sums, next_scale) > bound)
            if ~any_of(goes_on):
                falling += 1
                last = tl.minimum(edge - 1, top)
                edge = start
                goes_on = inside
        if falling == 1:
            next_scale = tl.load(tables + 2 * tl.maximum(edge - 1, 1))
            excess = excess_over_6(magnitude, row_sums, next_scale)
            certified = fraction * excess > bound
            if fraction == 0.0:
                certified = (norm - tl.sqrt(bound + nu * total) * CERTIFIED) * per_scale > 0.0 - next_scale
            goes_on = goes_on & (edge > lowest) & ~certified
    return best, second, edge, last, certified | (edge <= min_code)


@triton.jit
def _sweep_tile(weight, hessian, tables, amax, code, error, packed, tile, along, matrix, outer_stride, step,
                inner_stride, length_blocks, inner, n_rows, min_code,
                VECTOR: tl.constexpr, INNER: tl.constexpr, T: tl.constexpr,
                OVERLAP: tl.constexpr):  # fmt: skip
    row = tile.to(tl.int64) * T + tl.arange(0, T)
    inside = row < n_rows
    outer, column = row, row * 0
    blocks = weight + row * (outer_stride * VECTOR)
    if INNER:
        outer, column = row // inner, row % inner
        blocks = weight + outer * (outer_stride * VECTOR) + column * inner_stride

    loaded = load_16(blocks, inside, 0, step, 16, VECTOR, T)
    w = ()
    magnitude = ()
    for i in tl.static_range(16):
        w = w + (loaded[i].to(tl.float32),)
        magnitude = magnitude + (tl.abs(w[i]),)
    peak = largest_of(magnitude, 0, 16)
    if OVERLAP:  # with tabulate, up to here
        cuda.gdc_wait()
    screened = inside & (peak < LARGEST_PEAK) & (tl.zeros_like(peak) + tl.load(tables + SCREEN_UPPER) > 0.0)
    best, second, first, last, complete = find_best(
        w, magnitude, peak, screened, tables, hessian, min_code, T
    )
    found = best[2]
    possible = best[0] + best[1]
    screened = screened & (best[0] < float("inf"))
    near = second[0] <= possible
    crowded = second[2] <= possible
    undecided = inside & (near | ~complete | ~screened)
    two = screened & complete & near & ~crowded
    if any_of(two):  # as a rule a scale and its double, with the same points
        tie = have_same_points(blocks, two, step, tables, found, second[1], T)
        found = tl.where(tie, tl.minimum(found, second[1]), found)
        undecided = undecided & ~tie
    if any_of(undecided):
        # What is compared exactly is one code and a range of them. All of them:
        _, last_of_all = code_window(peak, tables, min_code, MAX_CODE)  # by theorem 3, or all without bounds
        single, lower, upper = min_code, min_code + 1, tl.where(screened, last, last_of_all)
        # Those that were tried:
        tried = screened & complete
        single = tl.where(tried, first, single)
        lower = tl.where(tried, first + 1, lower)
        # Two of those:
        single = tl.where(two, tl.minimum(found, second[1]), single)
        lower = tl.where(two, tl.maximum(found, second[1]), lower)
        upper = tl.where(two, lower, upper)
        # The best and those that were not tried, below the normal ones:
        rest = screened & ~complete & ~near
        single = tl.where(rest, found, single)
        lower = tl.where(rest, min_code, lower)
        upper = tl.where(rest, first - 1, upper)
        exact = settle(peak, blocks, undecided, step, tables, single, lower, upper, hessian, T)
        found = tl.where(undecided, exact, found)

    block = (outer * length_blocks + along) * inner + column
    out = matrix * n_rows * length_blocks + block
    store_amax_and_code(amax, code, out, inside, tables, found)
    if error is not None or packed is not None:
        scale = 0.0 - tl.load(tables + 2 * found)
        thresholds = point_thresholds(tables, found, T)
        if error is not None:
            total, _ = form_and_size(w, blocks, inside, step, scale, thresholds, hessian, T)
            unscale = tl.load(hessian.to(tl.pointer_type(tl.float64), bitcast=True) + UNSCALE // 2)
            tl.store(error + out, (total * unscale).to(tl.float32), mask=inside)
        if packed is not None:
            base = ((outer * length_blocks + along) * inner + matrix * n_rows * length_blocks) * 8 + column
            store_packed(packed, base, inner, blocks, inside, step, thresholds, VECTOR, INNER, 16,
                         T)  # fmt: skip


@triton.jit(do_not_specialize=["matrix_stride", "outer_stride", "block_stride", "step", "inner_stride",
                               "hessian_stride", "length_blocks", "inner", "n_rows", "matrices",
                               "min_code"])  # fmt: skip
def sweep_hessian(weight, hessian_tables, tables, amax, code, error, packed, matrix_stride: tl.int64,
                  outer_stride: tl.int64, block_stride: tl.int64, step: tl.int64, inner_stride: tl.int64,
                  hessian_stride: tl.int64, length_blocks: tl.int64, inner: tl.int64, n_rows: tl.int64,
                  matrices: tl.int32, min_code: tl.int32,
                  VECTOR: tl.constexpr, INNER: tl.constexpr, T: tl.constexpr,
                  OVERLAP: tl.constexpr):  # fmt: skip
    """As triton_kernels.sweep. n_rows: blocks of a matrix that share a Hessian.

    VECTOR: elements a load, to whose multiples the strides of matrices, outer and blocks are given.
    """
    program = tl.program_id(0).to(tl.uint32)
    width = length_blocks.to(tl.uint32)
    tile = program // width
    along = (program % width).to(tl.int64)
    for i in range(tl.program_id(1), matrices, tl.num_programs(1)):
        matrix = tl.full([], 0, tl.int64) + i
        _sweep_tile(weight + matrix * (matrix_stride * VECTOR) + along * (block_stride * VECTOR),
                    hessian_tables + (matrix * hessian_stride + along) * HESSIAN_TABLE,
                    tables + matrix * TABLE, amax, code, error, packed, tile, along, matrix, outer_stride,
                    step, inner_stride, length_blocks, inner, n_rows, min_code, VECTOR, INNER, T,
                    OVERLAP)  # fmt: skip
