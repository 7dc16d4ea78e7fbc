"""The CPU engine's kernel for squared errors with importances, in Numba: one block in each vector lane.

Codes are walked from theorem 1's bound downwards, each lane at its own code, with float32 errors. A lane
stops when theorem 6 rules out all lower codes. What the margin of theorem 8 cannot separate is compared
in float64, and what that cannot separate as integers (window.py has the theorems).

Elements of importance 0 count as zeros. The others are divided by a power of two, so that they suit
float32; comparisons in float64 and reported errors use them as they are.
"""

import numpy as np
from numba import types

from nvfp4sweep import formats
from nvfp4sweep.cpu_exact import DIGITS, settle_squares, weighted_error
from nvfp4sweep.cpu_tiles import (
    LANES,
    LEAST_PEAK,
    ROUNDER_CEILING,
    SCALED_ROUNDER_BASE,
    SCALED_ROUNDER_SLOPE,
    UNROLL,
    code_at_least,
    lane_maxima,
    load_magnitudes,
)
from nvfp4sweep.lanes import at, fma, jit, larger, put, select, smaller
from nvfp4sweep.window import GREATEST_WEIGHTED_PEAK

# Lanes that stop together: a lane that has stopped waits for the others of its group.
_GROUP = 64
# Codes that are walked before the first test of theorem 6, which few lanes pass earlier.
_UNTESTED_CODES = 9

#: What importances are at most once they are divided by a power of two.
LARGEST_WEIGHT = 4.0

_MAX_CODE = np.int32(formats.MAX_CODE)
_ONE = np.int32(1)
_NONE = np.int32(0)
_ZERO = np.float32(0)
_INFINITY = np.float32(np.inf)
_GREATEST_PEAK = np.float32(GREATEST_WEIGHTED_PEAK)
# The rows of a tile's scratch. LIMIT is what no error may exceed to be the least. From LAST on the rows are
# int32. One array holds them: for a loop that writes one of many arrays the compiler gives up proving that
# the others are not changed.
PEAK, BEST, LIMIT, TINY, NEGATIVE_SCALE, NEGATIVE_INVERSE, SLOPE, COST, LAST, ACTIVE, NEAR = range(11)


@jit(inline="always")
def get(scratch, row, lane):
    return at(scratch, row * LANES + lane)


@jit(inline="always")
def set_to(scratch, row, lane, value):
    put(scratch, row * LANES + lane, value)


# --- float32: one code for every lane of a group --------------------------------------------------


@jit(inline="always")
def _accumulate_errors(tile, squares, weights, group, scratch, clips):
    """COST = the weighted squared error at the lane's scale, which may clip (6 s < M) only if `clips`."""
    for lane in range(group, group + _GROUP):
        set_to(scratch, COST, lane, _ZERO)
    for first in range(0, tile.size, UNROLL * LANES):
        for lane in range(group, group + _GROUP):
            error = get(scratch, COST, lane)
            for i in range(UNROLL):
                place = first + i * LANES + lane
                w = at(tile, place)
                rounder = fma(at(squares, place), get(scratch, SLOPE, lane), SCALED_ROUNDER_BASE)
                if clips:
                    rounder = smaller(rounder, ROUNDER_CEILING)
                q = rounder - fma(w, get(scratch, NEGATIVE_INVERSE, lane), rounder)
                if clips:
                    q = smaller(q, np.float32(6))
                residual = fma(q, get(scratch, NEGATIVE_SCALE, lane), w)
                error = fma(residual * residual, at(weights, place), error)
            set_to(scratch, COST, lane, error)


@jit(inline="always")
def _accumulate_clipping(tile, weights, group, scratch):
    """COST = what clipping alone costs at the lane's scale, and at any below (theorem 6)."""
    for lane in range(group, group + _GROUP):
        set_to(scratch, COST, lane, _ZERO)
    for first in range(0, tile.size, UNROLL * LANES):
        for lane in range(group, group + _GROUP):
            error = get(scratch, COST, lane)
            for i in range(UNROLL):
                place = first + i * LANES + lane
                scale = get(scratch, NEGATIVE_SCALE, lane)
                excess = larger(fma(np.float32(6), scale, at(tile, place)), _ZERO)
                error = fma(excess * excess, at(weights, place), error)
            set_to(scratch, COST, lane, error)


@jit(inline="always")
def _walk(tile, squares, weights, group, negative_scales, relative_margin, floor, scratch, errors):
    """Walk the codes of a group; errors[j, lane] is that of code LAST - j, infinite where not needed.

    Returns the number of rows. Lanes that are still active have reached `floor`.
    """
    ints = scratch.view(np.int32)
    j = 0
    while True:
        for lane in range(group, group + _GROUP):
            code = larger(np.int32(get(ints, LAST, lane) - np.int32(j)), floor)
            set_to(scratch, NEGATIVE_SCALE, lane, at(negative_scales, np.intp(code)))
        moving, clipping = _NONE, _NONE
        for lane in range(group, group + _GROUP):
            walks = _walks(ints, lane, j, floor)
            moving += select(walks, _ONE, _NONE)
            reach = np.float32(6) * get(scratch, NEGATIVE_SCALE, lane)
            clips = get(scratch, PEAK, lane) + reach > _ZERO
            clipping += select(walks & clips, _ONE, _NONE)
        if j >= _UNTESTED_CODES and clipping > 0 and clipping == moving:
            _accumulate_clipping(tile, weights, group, scratch)
            moving = _NONE
            for lane in range(group, group + _GROUP):
                out = get(scratch, COST, lane) > get(scratch, LIMIT, lane)
                set_to(ints, ACTIVE, lane, select(out, _NONE, get(ints, ACTIVE, lane)))
                moving += select(_walks(ints, lane, j, floor), _ONE, _NONE)
        if moving == 0:
            return j
        for lane in range(group, group + _GROUP):
            inverse = np.float32(1) / get(scratch, NEGATIVE_SCALE, lane)
            set_to(scratch, NEGATIVE_INVERSE, lane, inverse)
            set_to(scratch, SLOPE, lane, np.float32(inverse * inverse * SCALED_ROUNDER_SLOPE))
        if clipping > 0:
            _accumulate_errors(tile, squares, weights, group, scratch, True)
        else:
            _accumulate_errors(tile, squares, weights, group, scratch, False)
        row = errors[j]
        for lane in range(group, group + _GROUP):
            error = select(_walks(ints, lane, j, floor), get(scratch, COST, lane), _INFINITY)
            put(row, lane, error)
            best = smaller(error, get(scratch, BEST, lane))
            set_to(scratch, BEST, lane, best)
            limit = fma(best, np.float32(1) + relative_margin, get(scratch, TINY, lane))
            set_to(scratch, LIMIT, lane, limit)
        j += 1


@jit(inline="always")
def _walks(ints, lane, j, floor):
    return (get(ints, ACTIVE, lane) != _NONE) & (np.int32(get(ints, LAST, lane) - np.int32(j)) >= floor)


# --- one tile -------------------------------------------------------------------------------------


@jit()
def _search(
    tile, squares, importances, weights, block_size, tables, factors, min_code, last_unhalved, floor,
    exact_only, scratch, errors, exact, digits, codes,
):  # fmt: skip
    """codes[lane] = the answer for each lane's block; PEAK holds the largest that counts."""
    scales, negative_scales = tables[0], tables[1]
    upper, relative_margin, absolute_margin = factors
    ints, scratch_bits = scratch.view(np.int32), scratch.view(np.uint32)
    # Theorem 3; and at a global amax of 0 all codes are the same.
    least_scale = scales[min_code] if tables[2, formats.MAX_CODE] > 0 else _INFINITY
    for i in range(tile.size):
        w = at(tile, i)
        put(squares, i, w * w)
    for lane in range(LANES):
        set_to(scratch, COST, lane, np.float32(get(scratch, PEAK, lane) * upper))
    for lane in range(LANES):
        peak = get(scratch, PEAK, lane)
        trivial = np.float32(4) * peak <= least_scale
        in_range = (peak >= LEAST_PEAK) & (peak <= _GREATEST_PEAK)
        starts = in_range & (not exact_only) & (not trivial)
        last = code_at_least(get(scratch, COST, lane), get(scratch_bits, COST, lane)) - _ONE
        last = larger(np.int32(last), last_unhalved)
        last = select(exact_only, _MAX_CODE, smaller(last, _MAX_CODE))
        set_to(ints, LAST, lane, select(trivial, min_code, last))
        set_to(ints, ACTIVE, lane, select(starts, _ONE, _NONE))
        set_to(ints, NEAR, lane, _NONE)
        set_to(scratch, BEST, lane, _INFINITY)
        set_to(scratch, LIMIT, lane, _INFINITY)
        tiny = absolute_margin * larger(np.float32(1), np.float32(peak * peak))
        set_to(scratch, TINY, lane, np.float32(tiny))
        put(codes, lane, min_code)

    for group in range(0, LANES, _GROUP):
        rows = _walk(tile, squares, weights, group, negative_scales, relative_margin, floor, scratch, errors)
        for j in range(rows):
            row = errors[j]
            for lane in range(group, group + _GROUP):
                error = at(row, lane)
                near = (error <= get(scratch, LIMIT, lane)) & (error < _INFINITY)
                set_to(ints, NEAR, lane, np.int32(get(ints, NEAR, lane) + select(near, _ONE, _NONE)))
                code = np.int32(get(ints, LAST, lane) - np.int32(j))
                put(codes, lane, select(near, code, at(codes, lane)))
    for lane in range(LANES):
        # Nothing is near where float32 does not serve. Codes below the floor are not walked: a lane that
        # got there may need them.
        near, last = get(ints, NEAR, lane), get(ints, LAST, lane)
        below = floor > min_code and get(ints, ACTIVE, lane) != 0
        all_codes = below or (near == 0 and last > min_code)
        if all_codes or near > 1:
            codes[lane] = settle_squares(
                tile, importances, lane, block_size, scales, min_code, last, all_codes,
                errors, get(scratch, LIMIT, lane), exact, digits,
            )  # fmt: skip


# --- importances ----------------------------------------------------------------------------------


@jit()
def _load_importances(importance, block_size, row, first, lanes, importances):
    """importances[i, lane] for the blocks first .. first + lanes of a row and, where it ends, of the next."""
    length, inner = importance.shape[1], importance.shape[2]
    column, top = first % inner, first // inner * block_size
    if column + lanes <= inner and importance.strides[2] == 0:
        for i in range(block_size):
            h = importance[row, top + i, column]
            for lane in range(LANES):
                put(importances, i * LANES + lane, h)
    elif column + lanes <= inner:
        for i in range(block_size):
            for lane in range(lanes):
                put(importances, i * LANES + lane, importance[row, top + i, column + lane])
    else:
        for lane in range(lanes):
            for i in range(block_size):
                put(importances, i * LANES + lane, importance[row, top + i, column])
            column += 1
            if column == inner:
                column = 0
                top += block_size
                if top == length:
                    top = 0
                    row += 1
    if lanes < LANES:
        importances[:block_size, lanes:] = _ZERO


@jit()
def _normalise(importances, weights, block_size, lanes, scratch):
    """weights = importances times a power of two a lane, so that the largest is in 2^-50 .. LARGEST_WEIGHT.

    What underflows is off by 2^-126 at most. Where all of a block are 0 they become ones.
    """
    scratch_bits = scratch.view(np.uint32)
    largest = scratch_bits[PEAK]
    lane_maxima(importances.view(np.uint32), largest)
    for lane in range(lanes):
        if largest[lane] == 0:
            importances[:block_size, lane] = np.float32(1)
            largest[lane] = np.uint32(127 << 23)
    for lane in range(LANES):
        exponent = np.int32(np.int32(253) - np.int32(get(scratch_bits, PEAK, lane) >> np.uint32(23)))
        exponent = smaller(larger(exponent, np.int32(1)), np.int32(227))
        set_to(scratch_bits, COST, lane, np.uint32(np.uint32(exponent) << np.uint32(23)))
    for i in range(block_size):
        for lane in range(LANES):
            put(weights, i * LANES + lane, at(importances, i * LANES + lane) * get(scratch, COST, lane))


# --- a range of blocks ----------------------------------------------------------------------------


@jit(
    types.uint32(
        types.Array(types.uint32, 1, "C", readonly=True),  # bits32
        types.Array(types.uint16, 1, "C", readonly=True),  # bits16
        types.boolean,  # is_float16
        types.Array(types.float32, 3, "A", readonly=True),  # importance
        types.intp,  # block_size
        types.intp,  # first_row
        types.intp,  # last_row
        types.intp,  # first_block
        types.intp,  # last_block
        types.Array(types.float32, 2, "C"),  # tables
        types.UniTuple(types.float32, 3),  # factors
        types.int32,  # min_code
        types.int32,  # last_unhalved
        types.int32,  # floor
        types.boolean,  # exact_only
        types.Array(types.float32, 1, "C"),  # amax
        types.Array(types.uint8, 1, "C"),  # code
        types.Array(types.float32, 1, "C"),  # error
    )
)
def sweep_range(
    bits32,
    bits16,
    is_float16,
    importance,
    block_size,
    first_row,
    last_row,
    first_block,
    last_block,
    tables,
    factors,
    min_code,
    last_unhalved,
    floor,
    exact_only,
    amax,
    code,
    error,
):
    """Search blocks first_block .. last_block of the rows of [outer, length, inner]; write outputs not empty.

    The weight is in bits32 or in bits16, whichever is not empty. importance has its shape and any strides.
    Returns the largest bit pattern of any |w|: at least that of infinity if one was not finite.
    """
    inner = importance.shape[2]
    row_blocks = importance.shape[1] // block_size * inner
    padded = (block_size + UNROLL - 1) // UNROLL * UNROLL  # zeros add nothing to any error
    tile = np.zeros((padded, LANES), np.float32)
    tile_bits = tile.view(np.uint32)
    squares = np.empty_like(tile)
    importances = np.zeros_like(tile)
    importance_bits = importances.view(np.uint32)
    weights = np.zeros_like(tile)
    scratch = np.empty((11, LANES), np.float32)
    peak_bits = scratch[PEAK].view(np.uint32)
    errors = np.empty((formats.MAX_CODE, LANES), np.float32)
    exact = np.empty(formats.MAX_CODE + 1)
    digits = np.zeros(DIGITS, np.int64)
    codes = np.empty(LANES, np.int32)
    largest = np.uint32(0)
    # A tile takes whole rows, or the same part of each row: so its importances may last for all rows.
    whole = first_block == 0 and last_block == row_blocks
    tile_rows = max(1, LANES // row_blocks) if whole else 1
    tile_blocks = last_block - first_block
    tile_blocks = (tile_blocks + (tile_blocks - 1) // LANES) // ((tile_blocks - 1) // LANES + 1)
    same_importances = importance.strides[0] == 0
    for start in range(first_block, last_block, tile_blocks):
        width = min(tile_blocks, last_block - start)
        loaded = 0
        for row in range(first_row, last_row, tile_rows):
            lanes = width * min(tile_rows, last_row - row)
            block = row * row_blocks + start
            if bits32.size > 0:
                load_magnitudes(bits32, is_float16, block_size, inner, block, lanes, tile, tile_bits)
            else:
                load_magnitudes(bits16, is_float16, block_size, inner, block, lanes, tile, tile_bits)
            if loaded != lanes or not same_importances:
                _load_importances(importance, block_size, row, start, lanes, importances)
                _normalise(importances, weights, block_size, lanes, scratch)
                loaded = lanes
            all_bits = np.uint32(0)
            for i in range(block_size * LANES):
                all_bits = larger(at(tile_bits, i), all_bits)
                counts = at(importance_bits, i) != np.uint32(0)
                put(tile_bits, i, select(counts, at(tile_bits, i), np.uint32(0)))
            largest = larger(all_bits, largest)
            lane_maxima(tile_bits, peak_bits)
            _search(
                tile, squares, importances, weights, block_size, tables, factors, min_code, last_unhalved,
                floor, exact_only, scratch, errors, exact, digits, codes,
            )  # fmt: skip
            if amax.size > 0:
                for lane in range(lanes):
                    amax[block + lane] = tables[2, codes[lane]]
            if code.size > 0:
                for lane in range(lanes):
                    code[block + lane] = np.uint8(codes[lane])
            if error.size > 0:
                for lane in range(lanes):
                    scale = np.float64(tables[0, codes[lane]])
                    least = weighted_error(tile, importances, lane, block_size, scale)
                    error[block + lane] = np.float32(least)
    return largest
