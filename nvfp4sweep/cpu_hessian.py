"""The CPU engine's kernel for quadratic forms of residuals, in Numba: one block in each vector lane.

The lanes of a tile share a Hessian: they are blocks at one position along the axis. Each lane walks its
codes from absmax's upwards, then downwards, until theorems 10 and 12 rule out the rest (window.py has
them). What the margin of theorem 11 cannot separate is compared in float64, and what that cannot
separate as integers.
"""

import numpy as np
from numba import types

from nvfp4sweep import formats
from nvfp4sweep.cpu_exact import DIGITS, form_in_order, settle_forms, signed_residuals
from nvfp4sweep.cpu_hessian_codes import (
    ACTIVE,
    CENTER,
    FIRST,
    FORM,
    LANES,
    LESS,
    LIMIT,
    MAGNITUDES,
    MARGIN,
    MORE,
    NEAR,
    PART,
    PEAK,
    RESIDUALS,
    SIGNS,
    SIZE,
    SIZE_0,
    SQUARES,
    STARTS,
    TINY,
    TOP,
    WALKS,
    X,
    Y,
    evaluate,
    forms,
    get,
    set_to,
    stop_downwards,
    stop_upwards,
)
from nvfp4sweep.cpu_tiles import LEAST_PEAK, code_at_least, exponent_shift, rebias_float16
from nvfp4sweep.lanes import at, fma, jit, larger, put, select, smaller
from nvfp4sweep.window import GREATEST_WEIGHTED_PEAK

# Steps from absmax's code before the first test of theorem 10, which few tiles pass earlier.
_UNTESTED_UP = 8
_UNTESTED_DOWN = 3

_STEPS = formats.MAX_CODE  # from absmax's code, at most, in either direction
_MAX_CODE = np.int32(formats.MAX_CODE)
_ONE = np.int32(1)
_NONE = np.int32(0)
_ZERO = np.float32(0)
_INFINITY = np.float32(np.inf)
_GREATEST_PEAK = np.float32(GREATEST_WEIGHTED_PEAK)
_SIGN = np.uint32(0x80000000)


# --- one tile -------------------------------------------------------------------------------------


@jit()
def _search(
    tile, hessian, coefficients, sums, exact_sums, mu, reach, tables, factors, min_code, floor, exact_only,
    scratch, rows, wanted, wide, digits, codes,
):  # fmt: skip
    """codes[lane] = the answer for each lane's block; PEAK holds the largest that counts."""
    scales, negative_scales = tables[0], tables[1]
    ints = scratch.view(np.int32)
    # Theorem 3; and at a global amax of 0 all codes are the same.
    least_scale = scales[min_code] if tables[2, formats.MAX_CODE] > 0 else _INFINITY
    walking = _begin(scratch, least_scale, factors, min_code, floor, exact_only)
    up, down = 0, 0
    if walking > 0:
        for i in range(SIZE):
            for lane in range(LANES):
                w = at(tile, MAGNITUDES * PART + i * LANES + lane)
                put(tile, SQUARES * PART + i * LANES + lane, w * w)
                set_to(scratch, SIZE_0, lane, fma(w * w, at(sums, i), get(scratch, SIZE_0, lane)))
        while up < _STEPS:
            if mu > 0 and up >= _UNTESTED_UP and up % 2 == 0:
                stop_upwards(np.int32(up), tile, sums, mu, negative_scales, scratch)
            row = rows[_STEPS + up]
            if evaluate(
                np.int32(up), tile, coefficients, sums, mu, negative_scales, floor, scratch, row
            ) == 0:  # fmt: skip
                break
            up += 1
        _turn(tile, coefficients, mu, reach, factors, min_code, scratch)
        down = -1
        while down > -_STEPS:
            if mu > 0 and down <= -_UNTESTED_DOWN:
                stop_downwards(np.int32(down), tile, sums, mu, negative_scales, floor, scratch)
            row = rows[_STEPS + down]
            if evaluate(
                np.int32(down), tile, coefficients, sums, mu, negative_scales, floor, scratch, row
            ) == 0:  # fmt: skip
                break
            down -= 1
        down += 1
    for lane in range(LANES):
        codes[lane] = min_code
    for step in range(down, up):
        row = rows[_STEPS + step]
        for lane in range(LANES):
            low = at(row, lane)
            near = (low <= get(scratch, LIMIT, lane)) & (low < _INFINITY)
            set_to(ints, NEAR, lane, np.int32(get(ints, NEAR, lane) + select(near, _ONE, _NONE)))
            code = np.int32(get(ints, CENTER, lane) + np.int32(step))
            put(codes, lane, select(near, code, at(codes, lane)))
    for lane in range(LANES):
        # Nothing is near where float32 does not serve. Codes below the floor are not walked: a lane that
        # got there may need them.
        near = get(ints, NEAR, lane)
        below = get(ints, ACTIVE, lane) != 0 and get(ints, FIRST, lane) < floor
        all_codes = below or (near == 0 and get(ints, TOP, lane) > min_code)
        if all_codes or near > 1:
            wanted[:] = 1 if all_codes else 0
            if not all_codes:
                for step in range(down, up):
                    low = rows[_STEPS + step, lane]
                    if low <= get(scratch, LIMIT, lane) and low < _INFINITY:
                        wanted[get(ints, CENTER, lane) + step] = 1
            codes[lane] = settle_forms(
                tile[MAGNITUDES], tile[SIGNS].view(np.uint32), lane, hessian, exact_sums, scales, min_code,
                get(ints, TOP, lane), wanted, wide, digits,
            )  # fmt: skip


@jit(inline="always")
def _begin(scratch, least_scale, factors, min_code, floor, exact_only):
    """The codes that a lane may walk. Returns how many lanes walk."""
    ints, scratch_bits = scratch.view(np.int32), scratch.view(np.uint32)
    center_factor, top_factor, _ = factors
    walking = _NONE
    for lane in range(LANES):
        peak = get(scratch, PEAK, lane)
        in_range = (peak >= LEAST_PEAK) & (peak <= _GREATEST_PEAK)
        starts = in_range & (not exact_only) & (np.float32(4) * peak > least_scale)
        set_to(ints, STARTS, lane, select(starts, _ONE, _NONE))
        set_to(ints, ACTIVE, lane, select(starts, _ONE, _NONE))
        walking += select(starts, _ONE, _NONE)
        set_to(scratch, X, lane, np.float32(peak * center_factor))
        set_to(scratch, Y, lane, np.float32(peak * top_factor))
        set_to(scratch, LIMIT, lane, _INFINITY)
        set_to(scratch, TINY, lane, np.float32(fma(peak, peak, np.float32(1)) * np.float32(2.0**-112)))
        set_to(scratch, SIZE_0, lane, _ZERO)
        set_to(ints, FIRST, lane, min_code)
        set_to(ints, NEAR, lane, _NONE)
    for lane in range(LANES):
        top = code_at_least(get(scratch, Y, lane), get(scratch_bits, Y, lane))
        top = larger(smaller(select(exact_only, _MAX_CODE, top), _MAX_CODE), min_code)
        top = select(np.float32(4) * get(scratch, PEAK, lane) > least_scale, top, min_code)
        set_to(ints, TOP, lane, top)
        center = smaller(code_at_least(get(scratch, X, lane), get(scratch_bits, X, lane)), top)
        set_to(ints, CENTER, lane, larger(larger(center, min_code), smaller(floor, _MAX_CODE)))
    return walking


@jit(inline="always")
def _turn(tile, coefficients, mu, reach, factors, min_code, scratch):
    """The lowest code that theorem 10 leaves without mu, for the walk downwards."""
    tile_bits, ints, scratch_bits = tile.view(np.uint32), scratch.view(np.int32), scratch.view(np.uint32)
    unit_inverse = factors[2]
    for i in range(PART):
        w, sign = at(tile_bits, MAGNITUDES * PART + i), at(tile_bits, SIGNS * PART + i)
        put(tile_bits, RESIDUALS * PART + i, w ^ sign)
    for lane in range(LANES):
        set_to(ints, WALKS, lane, _ONE)
    forms(tile, coefficients, scratch)
    for lane in range(LANES):
        size = get(scratch, SIZE_0, lane)
        whole = larger(get(scratch, FORM, lane) - fma(size, MARGIN, get(scratch, TINY, lane)), _ZERO)
        lost = larger(get(scratch, LIMIT, lane) + larger(-mu, _ZERO) * size * MORE, _ZERO)
        scale = (np.sqrt(whole) * LESS - np.sqrt(lost) * MORE) * reach
        set_to(scratch, X, lane, np.float32(scale * unit_inverse))
        set_to(ints, ACTIVE, lane, get(ints, STARTS, lane))
    for lane in range(LANES):
        first = smaller(code_at_least(get(scratch, X, lane), get(scratch_bits, X, lane)), _MAX_CODE)
        set_to(ints, FIRST, lane, larger(first, min_code))


# --- a range of blocks ----------------------------------------------------------------------------


@jit()
def _load(bits, is_float16, top, row, column, lanes, tile):
    """The magnitudes and signs of a tile; 0 in lanes without a block."""
    mask = np.uint32(0x7FFF) if bits.itemsize == 2 else np.uint32(0x7FFFFFFF)
    sign_shift = np.uint32(32 - 8 * bits.itemsize)
    shift = exponent_shift(bits, is_float16)
    tile_bits = tile.view(np.uint32)
    for lane in range(lanes):
        for i in range(SIZE):
            w = np.uint32(bits[row, top + i, column])
            put(tile_bits, MAGNITUDES * PART + i * LANES + lane, np.uint32((w & mask) << shift))
            put(tile_bits, SIGNS * PART + i * LANES + lane, np.uint32((w << sign_shift) & _SIGN))
        column += 1
        if column == bits.shape[2]:
            column = 0
            row += 1
    if lanes < LANES:
        tile_bits[MAGNITUDES, :, lanes:] = np.uint32(0)
    if is_float16:
        rebias_float16(tile[MAGNITUDES], tile_bits[MAGNITUDES])


@jit(
    types.uint32(
        types.Array(types.uint32, 3, "A", readonly=True),  # bits32
        types.Array(types.uint16, 3, "A", readonly=True),  # bits16
        types.boolean,  # is_float16
        types.intp,  # first_lane
        types.intp,  # last_lane
        types.Array(types.float32, 3, "C", readonly=True),  # hessians
        types.Array(types.float32, 2, "C", readonly=True),  # coefficients
        types.Array(types.float32, 2, "C", readonly=True),  # sums
        types.Array(types.float32, 1, "C", readonly=True),  # mu
        types.Array(types.float32, 1, "C", readonly=True),  # reach
        types.Array(types.float64, 2, "C", readonly=True),  # exact_sums
        types.Array(types.float32, 2, "C"),  # tables
        types.UniTuple(types.float32, 3),  # factors
        types.int32,  # min_code
        types.int32,  # floor
        types.boolean,  # exact_only
        types.intp,  # first_output
        types.intp,  # row_outputs
        types.Array(types.float32, 1, "C"),  # amax
        types.Array(types.uint8, 1, "C"),  # code
        types.Array(types.float32, 1, "C"),  # error
    )
)
def sweep_range(
    bits32,
    bits16,
    is_float16,
    first_lane,
    last_lane,
    hessians,
    coefficients,
    sums,
    mu,
    reach,
    exact_sums,
    tables,
    factors,
    min_code,
    floor,
    exact_only,
    first_output,
    row_outputs,
    amax,
    code,
    error,
):
    """Search the blocks of [outer, length, inner] in the lanes first_lane .. last_lane of outer x inner.

    The weight is in bits32 or in bits16, whichever is not empty; `length` has a Hessian every 16 elements.
    Writes the outputs that are not empty: that of position p of row o, column c is
    first_output + o row_outputs + p inner + c.
    Returns the largest bit pattern of any |w|: at least that of infinity if one was not finite.
    """
    narrow = bits16.size > 0
    inner = bits16.shape[2] if narrow else bits32.shape[2]
    tile = np.zeros((4, SIZE, LANES), np.float32)
    magnitude_bits, signs = tile[MAGNITUDES].view(np.uint32), tile[SIGNS].view(np.uint32)
    scratch = np.zeros((20, LANES), np.float32)
    peak_bits = scratch[PEAK].view(np.uint32)
    rows = np.empty((2 * _STEPS, LANES), np.float32)
    wanted = np.zeros(formats.MAX_CODE + 1, np.uint8)
    wide = np.empty((12, SIZE))
    digits = np.zeros(DIGITS, np.int64)
    codes = np.empty(LANES, np.int32)
    largest = np.uint32(0)
    for lane in range(first_lane, last_lane, LANES):
        lanes = min(LANES, last_lane - lane)
        row, column = lane // inner, lane % inner
        for position in range(len(hessians)):
            if narrow:
                _load(bits16, is_float16, position * SIZE, row, column, lanes, tile)
            else:
                _load(bits32, is_float16, position * SIZE, row, column, lanes, tile)
            peak_bits[:] = np.uint32(0)
            for i in range(SIZE):
                for k in range(LANES):
                    largest = larger(at(magnitude_bits, i * LANES + k), largest)
                if exact_sums[position, i] == 0:  # the element does not count
                    magnitude_bits[i] = np.uint32(0)
                for k in range(LANES):
                    peak_bits[k] = larger(at(magnitude_bits, i * LANES + k), peak_bits[k])
            _search(
                tile, hessians[position], coefficients[position], sums[position], exact_sums[position],
                mu[position], reach[position], tables, factors, min_code, floor, exact_only, scratch, rows,
                wanted, wide, digits, codes,
            )  # fmt: skip
            o, c = row, column
            for k in range(lanes):
                output = first_output + o * row_outputs + position * inner + c
                if amax.size > 0:
                    amax[output] = tables[2, codes[k]]
                if code.size > 0:
                    code[output] = np.uint8(codes[k])
                if error.size > 0:
                    scale = np.float64(tables[0, codes[k]])
                    signed_residuals(tile[MAGNITUDES], signs, k, scale, wide[0], wide[1])
                    error[output] = np.float32(form_in_order(hessians[position], wide[0], wide[2]))
                c += 1
                if c == inner:
                    c = 0
                    o += 1
    return largest
