"""CUDA: the sweep with importances (theorems 6 to 9 in window.py). A block in each thread.

find_best       the best code by a walk down in float32 that ends with a certificate
settle          ... among codes that float32 cannot tell apart, or all of them
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from nvfp4sweep import window as proofs
from nvfp4sweep.triton_arithmetic import (
    FIRST_UNIT,
    TERMS,
    add_term,
    any_of,
    fma,
    is_open,
    is_unknown,
    two_sum,
    unit_below,
)
from nvfp4sweep.triton_blocks import (
    largest_of,
    load_16,
    magnitude_of,
    nearest_point,
    next_thread,
    pick,
    point_thresholds,
    row_and_column,
    store_amax_and_code,
    store_packed,
)
from nvfp4sweep.triton_search import (
    code_window,
    excess_over_6,
    load_pair,
    normal_code_at_least,
    shared_rounder,
)
from nvfp4sweep.triton_tables import MAX_CODE, SCREEN_UPPER, TABLE

CLIPPING_RATIO = tl.constexpr(proofs.CLIPPING_RATIO)
# A walk asks for a certificate after so many turns of three codes: a warp seldom needs fewer, or more.
FIRST_TURNS = tl.constexpr(4)
# More than float64 may be off by in a sum of 2^18 squares.
SETTLED = tl.constexpr(2.0**-32)


@triton.jit
def _weighted(magnitude, cut, importance, rounder, scale):
    """The error at one (-scale, -1 / scale), in two chains for the sake of latency (theorem 8).

    cut: the magnitudes, none beyond 7 scales; what is beyond may be anything from 5 up.
    """
    even = tl.zeros_like(scale[0])
    odd = even
    for i in tl.static_range(len(magnitude)):
        q = rounder[i] - fma(cut[i], scale[1], rounder[i])
        residual = fma(q, scale[0], magnitude[i])
        if i % 2 == 0:
            even = fma(residual * residual, importance[i], even)
        else:
            odd = fma(residual * residual, importance[i], odd)
    return even + odd


@triton.jit
def _cut(magnitude, negative_scale):
    """The magnitudes, cut where the next three scales give 6, and none of them more."""
    most = (0.0 - CLIPPING_RATIO) * negative_scale
    cut = ()
    for i in tl.static_range(len(magnitude)):
        cut = cut + (tl.minimum(magnitude[i], most),)
    return cut


@triton.jit
def _keep_best(error, code, best, least, second):
    second = tl.minimum(second, tl.maximum(error, least))
    best = tl.where(error < least, code, best)
    return best, tl.minimum(error, least), second


@triton.jit
def find_best(magnitude, importance, peak, inside, tables, last, lowest, relative_margin,
              absolute_margin):  # fmt: skip
    """(best code, whether that is certain) for the codes `last` and below, but none below `lowest`."""
    best = tl.full(last.shape, MAX_CODE, tl.int32)
    least = tl.full(last.shape, float("inf"), tl.float32)
    second = least  # the least error but one
    limit = least
    excess = least * 0.0
    base = last + 1
    # Down from there, three codes at a time, until a certificate.
    turn = tl.full([], 0, tl.int32)
    goes_on = inside & (base >= lowest + 3)
    while any_of(goes_on):
        base = tl.where(goes_on, base - 3, base)
        scales = tables + 2 * tl.maximum(base, 1)
        low, middle, high = load_pair(scales), load_pair(scales + 2), load_pair(scales + 4)
        cut = _cut(magnitude, low[0])
        rounder = shared_rounder(cut, middle[1])
        errors = (
            _weighted(magnitude, cut, importance, rounder, low),
            _weighted(magnitude, cut, importance, rounder, middle),
            _weighted(magnitude, cut, importance, rounder, high),
        )
        for j in tl.static_range(3):
            error = tl.where(goes_on, errors[j], float("inf"))
            best, least, second = _keep_best(error, base + j, best, least, second)
        turn += 1
        goes_on = goes_on & (base >= lowest + 3)
        if (turn >= FIRST_TURNS) | ~any_of(goes_on):
            limit = least * (1.0 + 2.0 * relative_margin) + absolute_margin
            excess = excess_over_6(magnitude, importance, tl.load(tables + 2 * tl.maximum(base - 1, 1)))
            goes_on = goes_on & ~(excess > limit)
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
def _factors(blocks, importance, inside, ones, step, importance_step, i, scale, thresholds, other_scale,
             other_thresholds):  # fmt: skip
    """h, u, and v with its rest, of element i (theorem 9)."""
    magnitude, weight = _element(blocks, importance, inside, ones, step, importance_step, i)
    point = nearest_point(magnitude, thresholds).to(tl.float64) * scale
    other_point = nearest_point(magnitude, other_thresholds).to(tl.float64) * other_scale
    v, v_rest = two_sum(2.0 * magnitude.to(tl.float64), 0.0 - (point + other_point))
    return weight, other_point - point, v, v_rest


@triton.jit
def _difference(block, importance, ones, step, importance_step, tables, code, other, lane, block_size,
                T: tl.constexpr):  # fmt: skip
    """Of the sign that a block's error at `code` less that at `other` has. An element in each thread."""
    codes, others = lane * 0 + code, lane * 0 + other
    thresholds, other_thresholds = point_thresholds(tables, codes, T), point_thresholds(tables, others, T)
    scale = (0.0 - tl.load(tables + 2 * code)).to(tl.float64)
    other_scale = (0.0 - tl.load(tables + 2 * other)).to(tl.float64)
    sums = tl.zeros([T], tl.float64)
    sizes = sums
    for first in range(0, block_size, T):
        i = first + lane
        h, u, v, _ = _factors(block, importance, i < block_size, ones, step, importance_step, i, scale,
                              thresholds, other_scale, other_thresholds)  # fmt: skip
        sums += h * u * v
        sizes += tl.abs(h * u * v)
    # In all threads alike, or the loop below would count as divergent.
    none = tl.zeros([T], tl.float64)
    total, size = none + tl.sum(sums, axis=0), none + tl.sum(sizes, axis=0)
    unknown = is_unknown(total, size)
    total = tl.where(unknown, 0.0, total)
    unit_before = none + FIRST_UNIT
    unit = unit_below(size)
    while any_of(unknown):
        part, rest = none, none
        for first in range(0, block_size, T):
            i = first + lane
            for term in range(TERMS):
                h, u, v, v_rest = _factors(block, importance, i < block_size, ones, step, importance_step, i,
                                           scale, thresholds, other_scale, other_thresholds)  # fmt: skip
                part, rest = add_term(part, rest, term, h, u, v, v_rest, unit, unit_before)
        total += tl.sum(part, axis=0)
        left = none + tl.max(rest, axis=0)
        unknown = is_open(total, left)
        unit_before = unit
        unit = unit_below(left)
    return total


@triton.jit
def _exact_best(block, importance, ones, step, importance_step, tables, first, last, lane, block_size,
                T: tl.constexpr):  # fmt: skip
    """The lowest code of first .. last with a block's least exact error.

    A code in each thread, from the last down, until a certificate.
    """
    inside = lane >= 0
    best = last
    least = tl.full([], float("inf"), tl.float64)
    top = last
    while top >= first:
        code = tl.maximum(top - lane, first)
        error, excess = _error_and_excess(block + lane * 0, importance + lane * 0, inside, ones, step,
                                          importance_step, 0.0 - tl.load(tables + 2 * code),
                                          point_thresholds(tables, code, T), block_size, T)  # fmt: skip
        comparable = error < float("inf")  # not where an element is not finite
        smallest = tl.minimum(least, tl.min(tl.where(comparable, error, float("inf")), axis=0))
        limit = smallest * (1.0 + SETTLED)
        near = comparable & (error <= limit)
        best = tl.where(least <= limit, best, tl.max(tl.where(near, code, 0), axis=0))
        near = near & (code != best)
        while any_of(near):
            other = tl.max(tl.where(near, code, 0), axis=0)
            near = near & (code != other)
            difference = _difference(block, importance, ones, step, importance_step, tables, other, best,
                                     lane, block_size, T)  # fmt: skip
            best = tl.where(any_of(difference <= 0.0), other, best)
        least = smallest
        top = tl.where(any_of(excess > limit), first - 1, top - T)
    return best


@triton.jit
def settle(blocks, importance, undecided, ones, step, importance_step, tables, first, last, block_size,
           T: tl.constexpr):  # fmt: skip
    """The lowest code of first .. last with the least exact error.

    One block after another. They are few, and the kernel may wait for one: so its codes go to all threads.
    """
    best = last
    while any_of(undecided):
        thread, lanes = next_thread(undecided, T)
        found = _exact_best(pick(blocks, thread), pick(importance, thread), pick(ones, thread), step,
                            importance_step, tables, first, pick(last, thread), lanes, block_size,
                            T)  # fmt: skip
        best = tl.where(thread, found, best)
        undecided = undecided & ~thread
    return best


@triton.jit
def _load(pointer, inside, step, BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr, T: tl.constexpr):
    """All elements of blocks that fit in registers."""
    elements = ()
    for top in tl.static_range(0, BLOCK_SIZE, 16):
        elements = elements + load_16(pointer, inside, top, step, BLOCK_SIZE, VECTOR, T)
    return elements


@triton.jit
def _load_importances(weights, inside, step, BLOCK_SIZE: tl.constexpr, IVECTOR: tl.constexpr,
                      T: tl.constexpr):  # fmt: skip
    """(each, or 1 where all of a block are 0, and the largest)."""
    importances = _load(weights, inside, step, BLOCK_SIZE, IVECTOR, T)
    most = largest_of(importances, 0, BLOCK_SIZE)
    ones = most == 0.0
    if any_of(ones):
        replaced = ()
        for i in tl.static_range(BLOCK_SIZE):
            replaced = replaced + (tl.where(ones, 1.0, importances[i]),)
        importances = replaced
    return importances, most


@triton.jit
def _sweep_tile(blocks, weights, importances, most, tables, amax, code, error, packed, out, base, inside,
                step, importance_step, inner, block_size, min_code, last_unhalved, lowest, relative_margin,
                absolute_margin, SHARED: tl.constexpr, VECTOR: tl.constexpr, IVECTOR: tl.constexpr,
                INNER: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCREEN: tl.constexpr, T: tl.constexpr,
                OVERLAP: tl.constexpr):  # fmt: skip
    if SCREEN and not SHARED:
        importances, most = _load_importances(weights, inside, importance_step, BLOCK_SIZE, IVECTOR, T)
    magnitude = ()
    peak = tl.zeros([T], tl.float32)
    if SCREEN:
        w = _load(blocks, inside, step, BLOCK_SIZE, VECTOR, T)
        for i in tl.static_range(BLOCK_SIZE):
            magnitude = magnitude + (magnitude_of(w[i]),)
        peak = largest_of(magnitude, 0, BLOCK_SIZE)
    else:
        most = peak
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
        last = tl.minimum(normal_code_at_least(peak * tl.load(tables + SCREEN_UPPER)) - 1, MAX_CODE)
        best, certain = find_best(magnitude, importances, peak, inside, tables, last, lowest, relative_margin,
                                  absolute_margin * tl.maximum(most, 1.0))  # fmt: skip
        undecided = inside & ~certain
    if any_of(undecided):
        _, last = code_window(peak, tables, min_code, last_unhalved)
        exact = settle(blocks, weights, undecided & (last > min_code), ones, step, importance_step, tables,
                       min_code, last, block_size, T)  # fmt: skip
        best = tl.where(undecided, tl.where(last > min_code, exact, min_code), best)

    store_amax_and_code(amax, code, out, inside, tables, best)
    if error is not None or packed is not None:
        scale = 0.0 - tl.load(tables + 2 * best)
        thresholds = point_thresholds(tables, best, T)
        if error is not None:
            found = _error(blocks, weights, inside, ones, step, importance_step, scale, thresholds,
                           BLOCK_SIZE, VECTOR, IVECTOR, T)  # fmt: skip
            tl.store(error + out, found, mask=inside)
        if packed is not None:
            store_packed(packed, base, inner, blocks, inside, step, thresholds, VECTOR, INNER, BLOCK_SIZE,
                         T)  # fmt: skip


@triton.jit
def _sweep_matrix(weight, importance, tables, amax, code, error, packed, matrix, outer_stride, block_stride,
                  step, inner_stride, importance_outer, importance_block, importance_step, importance_inner,
                  length_blocks, inner, n_blocks, groups_per_row, group, limit, block_size, min_code,
                  last_unhalved, lowest, relative_margin, absolute_margin,
                  LANES: tl.constexpr, SHARED: tl.constexpr, VECTOR: tl.constexpr, IVECTOR: tl.constexpr,
                  INNER: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCREEN: tl.constexpr, T: tl.constexpr,
                  OVERLAP: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    lane = tl.arange(0, T)
    first = tl.full([], 0, tl.int64)
    inside = tl.full([T], True, tl.int1)
    if LANES == 0:
        block = program.to(tl.int64) * T + lane
        inside = block < n_blocks
        row = block // inner
        outer, along, column = row // length_blocks, row % length_blocks, block % inner
        blocks = weight + outer * outer_stride + along * block_stride + column * inner_stride
        weights = importance + outer * importance_outer + along * importance_block + column * importance_inner
        turn, importance_turn, blocks_turn, column_turn = first, first, first, first
    else:
        row, column = row_and_column(program, groups_per_row)
        if LANES == 1:
            first = row * group
            block = first * length_blocks + column * T + lane
            blocks = weight + first * outer_stride + column * T * block_stride + lane * block_stride
            weights = importance + first * importance_outer + column * T * importance_block
            weights += lane * importance_block
            turn, importance_turn, blocks_turn, column_turn = outer_stride, importance_outer, length_blocks, 0
            column = first * 0 + lane * 0
        else:
            first = column * group
            outer, along = row // length_blocks, row % length_blocks
            column = first * T + lane
            block = row * inner + column
            blocks = weight + outer * outer_stride + along * block_stride + column * inner_stride
            weights = importance + outer * importance_outer + along * importance_block
            weights += column * importance_inner
            turn, importance_turn, blocks_turn, column_turn = T * inner_stride, T * importance_inner, T, T
    out = matrix * n_blocks + block
    importances = ()
    most = tl.zeros([T], tl.float32)
    if SCREEN and SHARED:
        importances, most = _load_importances(weights, inside, importance_step, BLOCK_SIZE, IVECTOR, T)
    for _ in range(tl.minimum(limit - first, group)):
        # Of packed codes; a block's bytes lie `inner` apart.
        base = (out - column) * (BLOCK_SIZE // 2) + column
        _sweep_tile(blocks, weights, importances, most, tables, amax, code, error, packed, out, base, inside,
                    step, importance_step, inner, block_size, min_code, last_unhalved, lowest,
                    relative_margin, absolute_margin, SHARED, VECTOR, IVECTOR, INNER, BLOCK_SIZE, SCREEN, T,
                    OVERLAP)  # fmt: skip
        blocks += turn
        weights += importance_turn
        out += blocks_turn
        column += column_turn


@triton.jit(do_not_specialize=["matrix_stride", "outer_stride", "block_stride", "step", "inner_stride",
                               "importance_matrix", "importance_outer", "importance_block",
                               "importance_step", "importance_inner", "length_blocks", "inner", "n_blocks",
                               "matrices", "groups_per_row", "group", "limit", "block_size", "min_code",
                               "last_unhalved", "lowest"])  # fmt: skip
def sweep_importance(weight, importance, tables, amax, code, error, packed, matrix_stride: tl.int64,
                     outer_stride: tl.int64, block_stride: tl.int64, step: tl.int64, inner_stride: tl.int64,
                     importance_matrix: tl.int64, importance_outer: tl.int64, importance_block: tl.int64,
                     importance_step: tl.int64, importance_inner: tl.int64,
                     length_blocks: tl.int64, inner: tl.int64, n_blocks: tl.int64, matrices: tl.int32,
                     groups_per_row: tl.int32, group: tl.int32, limit: tl.int64, block_size: tl.int32,
                     min_code: tl.int32, last_unhalved: tl.int32, lowest: tl.int32, relative_margin,
                     absolute_margin,
                     LANES: tl.constexpr, SHARED: tl.constexpr, VECTOR: tl.constexpr, IVECTOR: tl.constexpr,
                     INNER: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCREEN: tl.constexpr, T: tl.constexpr,
                     OVERLAP: tl.constexpr):  # fmt: skip
    """As triton_kernels.sweep, with strides for the importance too: 0 where it repeats.

    A program handles a group of tiles. LANES 1: a tile's blocks follow each other along the axis, the tiles
    of a group along `outer`; 2: both along `inner`. `limit`: how many tiles there are along it. 0: a tile
    follows the order [outer, length_blocks, inner], a group is one. SHARED: the tiles of a group have the
    same importances.
    VECTOR, IVECTOR: elements a load of a weight and of importances, to whose multiples the strides of outer
    and blocks are given. SCREEN: blocks fit in registers, else all codes are compared in float64.
    """
    for i in range(tl.program_id(1), matrices, tl.num_programs(1)):
        matrix = tl.full([], 0, tl.int64) + i
        _sweep_matrix(weight + matrix * (matrix_stride * VECTOR),
                      importance + matrix * (importance_matrix * IVECTOR), tables + matrix * TABLE, amax,
                      code, error, packed, matrix, outer_stride * VECTOR, block_stride * VECTOR, step,
                      inner_stride, importance_outer * IVECTOR, importance_block * IVECTOR, importance_step,
                      importance_inner, length_blocks, inner, n_blocks, groups_per_row, group, limit,
                      block_size, min_code, last_unhalved, lowest, relative_margin, absolute_margin,
                      LANES, SHARED, VECTOR, IVECTOR, INNER, BLOCK_SIZE, SCREEN, T, OVERLAP)  # fmt: skip
