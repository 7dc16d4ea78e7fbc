"""CUDA: the sweep with block Hessians (theorems 10 and 11 in window.py).

The blocks of a tile lie at the same place along the axis, so that they share a Hessian. A block in each
thread. Codes are tried from the one that absmax would take: upwards, three at a time, then downwards, each
way until a certificate.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from nvfp4sweep import window as proofs
from nvfp4sweep.triton_arithmetic import fma
from nvfp4sweep.triton_blocks import (
    any_of,
    largest_of,
    load_16,
    load_shared,
    point_thresholds,
    store_amax_and_code,
    store_packed,
)
from nvfp4sweep.triton_hessian_exact import form_and_size, settle
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
# The scale of absmax's code, and 4M, in terms of M / 3.5.
ABSMAX = tl.constexpr(3.5 / 6 * (1 + 2.0**-20))
ALL_ZERO = tl.constexpr(3.5 * 4 * (1 + 2.0**-20))


@triton.jit
def _residuals(w, rounder, scale):
    """w - q s at one (-scale, -1 / scale), for |w| up to 7 scales; q may be beside the nearest point."""
    residuals = ()
    for i in tl.static_range(16):
        q = rounder[i] - fma(w[i], scale[1], rounder[i])
        residuals = residuals + (fma(q, scale[0], w[i]),)
    return residuals


@triton.jit
def _cut_residuals(w, rounder, scale):
    """As _residuals for any |w|: of 6 beyond 6. And those residuals, 0 there."""
    residuals = ()
    within = ()
    for i in tl.static_range(16):
        q = rounder[i] - fma(w[i], scale[1], rounder[i])
        cut = tl.minimum(tl.maximum(q, -6.0), 6.0)
        residual = fma(cut, scale[0], w[i])
        residuals = residuals + (residual,)
        within = within + (tl.where(cut == q, residual, 0.0),)
    return residuals, within


@triton.jit
def _is_doubtful(residuals, rounder, negative_scale):
    """Whether an element's point may not be the nearest one, or a tie: its residual reaches half a step."""
    worst = tl.zeros_like(negative_scale)
    for i in tl.static_range(16):
        # From 2^22 a rounder's step is a half, and so the inverse of half a step is 4; and so on by octaves.
        octaves = (149 << 23) - (rounder[i].to(tl.int32, bitcast=True) & 0x7F800000)
        inverse_half_step = ((129 << 23) + octaves).to(tl.float32, bitcast=True)
        worst = tl.maximum(worst, tl.abs(residuals[i]) * inverse_half_step)
    return worst >= 0.0 - negative_scale


@triton.jit
def _exact_residuals(w, rounder, scale):
    """As _residuals, always of the nearest point, in a tie that of the even code; of 6 beyond 6."""
    residuals = ()
    for i in tl.static_range(16):
        q = rounder[i] - fma(w[i], scale[1], rounder[i])
        residual = fma(q, scale[0], w[i])  # exact, where it is close to half a step
        exponent = rounder[i].to(tl.int32, bitcast=True) & 0x7F800000
        half_step = (exponent - (24 << 23)).to(tl.float32, bitcast=True)
        distance = tl.abs(residual) + half_step * scale[0]
        odd = ((q.to(tl.int32, bitcast=True) & 0x400000) != 0) | (tl.abs(q) == 0.5)
        step = tl.where(residual < 0.0, -2.0, 2.0) * half_step
        q = tl.where((distance > 0.0) | ((distance == 0.0) & odd), q + step, q)
        q = tl.minimum(tl.maximum(q, -6.0), 6.0)
        residuals = residuals + (fma(q, scale[0], w[i]),)
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
def _forms(residuals, pairs, T: tl.constexpr):
    """r^T H r of several residuals, which share what is loaded: the diagonal and twice the rest of H."""
    h = load_shared(pairs, 136)
    results = ()
    for n in tl.static_range(len(residuals)):
        results = results + (tl.zeros([T], tl.float32),)
    for i in tl.static_range(16):
        rows = ()
        for n in tl.static_range(len(residuals)):
            rows = rows + (h[pair_index(i, i)] * residuals[n][i],)
        for j in tl.static_range(i + 1, 16):
            further = ()
            for n in tl.static_range(len(residuals)):
                further = further + (fma(h[pair_index(i, j)], residuals[n][j], rows[n]),)
            rows = further
        further = ()
        for n in tl.static_range(len(residuals)):
            further = further + (fma(rows[n], residuals[n][i], results[n]),)
        results = further
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
def _try_codes(w, magnitude, peak, first_code, last_code, tables, hessian, row_sums, fraction, floor, best,
               second, T: tl.constexpr):  # fmt: skip
    """Try three codes, normal ones, from first_code, but none beyond last_code."""
    first = tl.minimum(tl.maximum(first_code, 1), MAX_CODE - 2)
    scales = tables + 2 * first
    rounder = shared_rounder(magnitude, tl.load(scales + 3))
    bound = (best[0] + best[1]) * CERTIFIED
    all_residuals = ()
    sizes = ()
    wanted = ()
    any_wanted = first < 0
    for n in tl.static_range(3):
        scale = load_pair(scales + 2 * n)
        residuals = _residuals(w, rounder, scale)
        allowed = (first + n >= first_code) & (first + n <= last_code)
        if any_of(allowed & (peak > 0.0 - CLIPPING_RATIO * scale[0])):
            residuals, within = _cut_residuals(w, rounder, scale)
            doubtful = _is_doubtful(within, rounder, scale[0])
        else:
            doubtful = _is_doubtful(residuals, rounder, scale[0])
        if any_of(allowed & doubtful):
            residuals = _exact_residuals(w, rounder, scale)
        size = _squares(residuals, row_sums)
        want = allowed & ~(fraction * size > bound)
        any_wanted = any_wanted | want
        all_residuals = all_residuals + (residuals,)
        sizes = sizes + (size,)
        wanted = wanted + (want,)
    if any_of(any_wanted):
        errors = _forms(all_residuals, hessian + PAIRS, T)
        for n in tl.static_range(3):
            error = tl.where(wanted[n], errors[n], float("inf"))
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
    form = _forms((w,), hessian + PAIRS, T)[0]
    return tl.sqrt(tl.maximum(form - (size * MARGIN + floor), 0.0)), size


@triton.jit
def _opaque(hessian, turn):
    """The same pointer, which the compiler cannot know: or it would load a whole Hessian before a loop, into
    more registers than there are. `turn` counts from 0."""
    return hessian + 4 * tl.minimum(turn, 0)


@triton.jit
def find_best(w, magnitude, peak, inside, tables, hessian, min_code, T: tl.constexpr):
    """The best, the others, the first and last code tried, and whether the first is the lowest that can win.

    The best as (error, margin, code), the others as (least possible error, code, that of a third code).
    """
    fraction = tl.maximum(tl.load(hessian + FRACTION), 0.0)
    screens = peak * tl.load(tables + SCREEN_UPPER)
    # From the first normal code up neighbouring codes may share a rounder.
    lowest = tl.maximum(min_code, FIRST_NORMAL_CODE)
    start = tl.maximum(tl.minimum(code_at_least(screens * ABSMAX), MAX_CODE + 1) - 3, lowest)
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

    # Three codes a turn: up from `start` to a certificate, then down from there.
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
        first_code = tl.where(falling == 0, edge, tl.maximum(edge - 3, lowest))
        last_code = tl.where(falling == 0, top, edge - 1)
        last_code = tl.where(goes_on, last_code, 0)
        best, second = _try_codes(w, magnitude, peak, first_code, last_code, tables, here, row_sums, fraction,
                                  floor, best, second, T)  # fmt: skip
        bound = (best[0] + best[1]) * CERTIFIED
        edge = tl.where(goes_on, tl.where(falling == 0, edge + 3, first_code), edge)
        if falling == 0:
            next_scale = tl.load(tables + 2 * tl.minimum(tl.maximum(edge, 1), MAX_CODE))
            flat = _flat(magnitude, row_sums, next_scale)
            goes_on = goes_on & (edge <= top) & ~(fraction * flat > bound)
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
    if any_of(undecided):
        # What is compared exactly is one code and a range of them. All of them:
        _, last_of_all = code_window(peak, tables, min_code, MAX_CODE)  # by theorem 3, or all without bounds
        single, lower, upper = min_code, min_code + 1, tl.where(screened, last, last_of_all)
        # Those that were tried:
        tried = screened & complete
        single = tl.where(tried, first, single)
        lower = tl.where(tried, first + 1, lower)
        # Two of those:
        two = tried & ~crowded
        single = tl.where(two, tl.minimum(found, second[1]), single)
        lower = tl.where(two, tl.maximum(found, second[1]), lower)
        upper = tl.where(two, lower, upper)
        # The best and those that were not tried, below the normal ones:
        rest = screened & ~complete & ~near
        single = tl.where(rest, found, single)
        lower = tl.where(rest, min_code, lower)
        upper = tl.where(rest, first - 1, upper)
        exact = settle(w, peak, blocks, undecided, step, tables, single, lower, upper, hessian, T)
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
