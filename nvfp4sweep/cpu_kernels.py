"""The CPU engine's kernels for plain squared error, in Numba: one block in each vector lane.

The window (window.py) is walked code by code, each lane at its own code, with float32 errors; what
their proven margin cannot separate is compared exactly.
"""

import numpy as np
from numba import types

from nvfp4sweep import formats
from nvfp4sweep.cpu_exact import GRID, MIDPOINTS, two_product, two_sum
from nvfp4sweep.cpu_tiles import (
    GREATEST_PEAK,
    LANES,
    LEAST_PEAK,
    LEAST_SCALE,
    ROUNDER_CEILING,
    SCALED_ROUNDER_BASE,
    SCALED_ROUNDER_SLOPE,
    UNROLL,
    code_at_least,
    lane_maxima,
    load_magnitudes,
)
from nvfp4sweep.lanes import at, fma, jit, larger, put, select, smaller
from nvfp4sweep.window import FIRST_UNDOUBLED_CODE

# --- float32: one candidate for every lane --------------------------------------------------------


@jit(inline="always")
def _accumulate_errors(tile, squares, slope, negative_inverse, negative_scale, errors):
    """errors[lane] += squared error at the lane's scale, which clips nothing (6 s >= M)."""
    for base in range(0, tile.size, UNROLL * LANES):
        for lane in range(LANES):
            error = errors[lane]
            for i in range(UNROLL):
                w = at(tile, base + i * LANES + lane)
                square = at(squares, base + i * LANES + lane)
                rounder = fma(square, slope[lane], SCALED_ROUNDER_BASE)
                q = rounder - fma(w, negative_inverse[lane], rounder)
                residual = fma(q, negative_scale[lane], w)
                error = fma(residual, residual, error)
            errors[lane] = error


@jit(inline="always")
def _accumulate_clipped_errors(tile, squares, slope, negative_inverse, negative_scale, errors):
    """The same for scales that may clip."""
    for base in range(0, tile.size, UNROLL * LANES):
        for lane in range(LANES):
            error = errors[lane]
            for i in range(UNROLL):
                w = at(tile, base + i * LANES + lane)
                square = at(squares, base + i * LANES + lane)
                rounder = smaller(fma(square, slope[lane], SCALED_ROUNDER_BASE), ROUNDER_CEILING)
                q = smaller(rounder - fma(w, negative_inverse[lane], rounder), np.float32(6))
                residual = fma(q, negative_scale[lane], w)
                error = fma(residual, residual, error)
            errors[lane] = error


# --- exact comparison (window.py, theorem 5) ------------------------------------------------------


@jit()
def _exact_objective(tile, lane, block_size, scale):
    """s^2 B - 2 s A as a float64 pair: the error less its constant part."""
    a, b = 0.0, 0.0
    for i in range(block_size):
        w = np.float64(tile[i, lane])
        q = 0.0
        for step in range(7):
            if w > MIDPOINTS[step] * scale:
                q = GRID[step + 1]
        a += w * q
        b += q * q
    f_high, f_low = two_product(scale * scale, b)  # scale has 24 bits: its square is exact
    g_high, g_low = two_product(-2.0 * scale, a)
    high, carry = two_sum(f_high, g_high)
    return two_sum(high, (f_low + g_low) + carry)


@jit()
def _settle(tile, lane, block_size, scales, first, last, errors, limit):
    """The lowest code of first .. last with the least exact error, among those within the limit."""
    best = np.int32(first)
    best_high, best_low = np.inf, np.inf
    for code in range(first, last + 1):
        if errors[code - first, lane] > limit:
            continue
        high, low = _exact_objective(tile, lane, block_size, np.float64(scales[code]))
        if high < best_high or (high == best_high and low < best_low):
            best, best_high, best_low = np.int32(code), high, low
    return best


# --- one tile -------------------------------------------------------------------------------------


@jit()
def _search(
    tile, squares, block_size, tables, factors, min_code, last_unhalved, exact_only, scratch, errors, codes
):
    """codes[lane] = the answer for each lane's block.

    scratch is float32 [9, LANES]; scratch[0] holds the largest magnitude of each block.
    """
    scales, negative_scales = tables[0], tables[1]
    lower, upper, relative_margin, absolute_margin = factors
    peak, x, y = scratch[0], scratch[1], scratch[2]
    slope, negative_inverse, negative_scale = scratch[3], scratch[4], scratch[5]
    x_bits, y_bits = x.view(np.uint32), y.view(np.uint32)
    first, last = scratch[6].view(np.int32), scratch[7].view(np.int32)
    # Theorem 3; and at a global amax of 0 all codes are the same.
    least_scale = scales[min_code] if tables[2, formats.MAX_CODE] > 0 else np.float32(np.inf)
    if exact_only:
        errors[: formats.MAX_CODE] = np.float32(0)
        for lane in range(LANES):
            trivial = np.float32(4) * peak[lane] <= least_scale
            most = min_code if trivial else np.int32(formats.MAX_CODE)
            codes[lane] = _settle(tile, lane, block_size, scales, min_code, most, errors, np.float32(0))
        return

    for i in range(tile.size):
        w = at(tile, i)
        put(squares, i, w * w)
    for lane in range(LANES):
        x[lane] = peak[lane] * lower
        y[lane] = peak[lane] * upper
    count = np.int32(1)
    for lane in range(LANES):
        low = smaller(code_at_least(x[lane], x_bits[lane]), np.int32(FIRST_UNDOUBLED_CODE))
        high = larger(np.int32(code_at_least(y[lane], y_bits[lane]) - np.int32(1)), last_unhalved)
        trivial = np.float32(4) * peak[lane] <= least_scale
        first[lane] = select(trivial, min_code, larger(low, min_code))
        last[lane] = select(trivial, min_code, smaller(high, np.int32(formats.MAX_CODE)))
        count = larger(np.int32(last[lane] - first[lane] + np.int32(1)), count)

    for j in range(count):
        row = errors[j]
        clipping = np.int32(0)
        for lane in range(LANES):
            # Beyond a lane's last code the tables repeat code 126: what is found there is ignored.
            negative_scale[lane] = at(negative_scales, np.intp(first[lane] + np.int32(j)))
        for lane in range(LANES):
            inverse = np.float32(1) / negative_scale[lane]
            negative_inverse[lane] = inverse
            slope[lane] = inverse * inverse * SCALED_ROUNDER_SLOPE
            clips = peak[lane] + np.float32(6) * negative_scale[lane] > np.float32(0)
            clipping += select(clips, np.int32(1), np.int32(0))
            row[lane] = np.float32(0)
        if clipping > 0:
            _accumulate_clipped_errors(tile, squares, slope, negative_inverse, negative_scale, row)
        else:
            _accumulate_errors(tile, squares, slope, negative_inverse, negative_scale, row)

    least, limit = scratch[3], scratch[4]
    near = scratch[8].view(np.int32)
    for lane in range(LANES):
        least[lane] = errors[0, lane]
        codes[lane] = first[lane]
        near[lane] = np.int32(0)
    for j in range(1, count):
        row = errors[j]
        for lane in range(LANES):
            code = np.int32(first[lane] + np.int32(j))
            better = (row[lane] < least[lane]) & (code <= last[lane])
            least[lane] = select(better, row[lane], least[lane])
            codes[lane] = select(better, code, codes[lane])
    for lane in range(LANES):
        in_range = (
            (peak[lane] >= LEAST_PEAK)
            & (peak[lane] <= GREATEST_PEAK)
            & (at(scales, np.intp(first[lane])) >= LEAST_SCALE)
        )
        bound = least[lane] * (np.float32(1) + relative_margin) + absolute_margin
        limit[lane] = select(in_range, bound, np.float32(np.inf))
    for j in range(count):
        row = errors[j]
        for lane in range(LANES):
            # Written so that a NaN, from overflow in float32, counts as near.
            apart = (row[lane] > limit[lane]) | (np.int32(first[lane] + np.int32(j)) > last[lane])
            near[lane] += select(apart, np.int32(0), np.int32(1))
    for lane in range(LANES):
        if near[lane] > 1:
            codes[lane] = _settle(
                tile, lane, block_size, scales, first[lane], last[lane], errors, limit[lane]
            )


@jit(inline="always")
def _error(tile, lane, block_size, scale):
    """The squared error, summed in float64 element by element, as the oracle does."""
    total = 0.0
    for i in range(block_size):
        w = np.float64(tile[i, lane])
        least = w * w
        for step in range(1, 8):
            residual = w - GRID[step] * scale
            least = min(least, residual * residual)
        total += least
    return np.float32(total)


# --- a range of blocks ----------------------------------------------------------------------------


def _range_signature(bits: types.Type) -> types.Type:
    floats = types.float32
    return types.uint32(
        types.Array(bits, 1, "C", readonly=True),
        types.boolean,  # is_float16
        types.intp,  # block_size
        types.intp,  # inner
        types.intp,  # start
        types.intp,  # stop
        types.Array(floats, 2, "C"),  # tables
        types.UniTuple(floats, 4),  # factors
        types.int32,  # min_code
        types.int32,  # last_unhalved
        types.boolean,  # exact_only
        types.Array(floats, 1, "C"),  # amax
        types.Array(types.uint8, 1, "C"),  # code
        types.Array(floats, 1, "C"),  # error
    )


@jit([_range_signature(types.uint32), _range_signature(types.uint16)])
def sweep_range(
    bits,
    is_float16,
    block_size,
    inner,
    start,
    stop,
    tables,
    factors,
    min_code,
    last_unhalved,
    exact_only,
    amax,
    code,
    error,
):
    """Search the blocks start .. stop and write the outputs that are not empty arrays.

    Returns the largest bit pattern of any |w|: at least that of infinity if one was not finite.
    """
    padded = (block_size + UNROLL - 1) // UNROLL * UNROLL  # zeros add nothing to any error
    tile = np.zeros((padded, LANES), np.float32)
    tile_bits = tile.view(np.uint32)
    squares = np.empty_like(tile)
    scratch = np.empty((9, LANES), np.float32)
    peak_bits = scratch[0].view(np.uint32)
    errors = np.empty((formats.MAX_CODE, LANES), np.float32)
    codes = np.empty(LANES, np.int32)
    largest = np.uint32(0)
    for first_block in range(start, stop, LANES):
        lanes = min(LANES, stop - first_block)
        load_magnitudes(bits, is_float16, block_size, inner, first_block, lanes, tile, tile_bits)
        lane_maxima(tile_bits, peak_bits)
        for lane in range(LANES):
            largest = larger(peak_bits[lane], largest)
        _search(
            tile, squares, block_size, tables, factors, min_code, last_unhalved, exact_only,
            scratch, errors, codes,
        )  # fmt: skip
        if amax.size > 0:
            for lane in range(lanes):
                amax[first_block + lane] = tables[2, codes[lane]]
        if code.size > 0:
            for lane in range(lanes):
                code[first_block + lane] = np.uint8(codes[lane])
        if error.size > 0:
            for lane in range(lanes):
                error[first_block + lane] = _error(tile, lane, block_size, np.float64(tables[0, codes[lane]]))
    return largest


@jit(
    [
        types.void(
            types.Array(bits, 1, "C", readonly=True),
            types.boolean,
            types.intp,
            types.intp,
            types.intp,
            types.intp,
            types.Array(types.float32, 1, "C"),
            types.Array(types.uint8, 1, "C"),
            types.Array(types.uint8, 1, "C"),
        )
        for bits in (types.uint32, types.uint16)
    ]
)
def pack_range(bits, is_float16, block_size, inner, start, stop, scales, code, packed):
    """Write the E2M1 codes of the blocks start .. stop, two a byte, as packing.encode defines them."""
    sign_shift = np.uint32(8 * bits.itemsize - 1)
    tile = np.zeros((block_size, LANES), np.float32)
    tile_bits = tile.view(np.uint32)
    nibbles = np.empty((block_size, LANES), np.uint8)
    for first_block in range(start, stop, LANES):
        lanes = min(LANES, stop - first_block)
        load_magnitudes(bits, is_float16, block_size, inner, first_block, lanes, tile, tile_bits)
        for lane in range(lanes):
            scale = np.float64(scales[code[first_block + lane]])
            for i in range(block_size):
                w = np.float64(tile[i, lane])
                nibble = 0
                for step in range(7):
                    edge = MIDPOINTS[step] * scale
                    nibble += w >= edge if step & 1 else w > edge
                nibbles[i, lane] = nibble if scale > 0 else 0
        for lane in range(lanes):
            block = first_block + lane
            group, column = block // inner * block_size, block % inner
            for i in range(0, block_size, 2):
                low = np.uint32(bits[(group + i) * inner + column]) >> sign_shift
                high = np.uint32(bits[(group + i + 1) * inner + column]) >> sign_shift
                packed[(group + i) // 2 * inner + column] = (
                    nibbles[i, lane] | low << 3 | nibbles[i + 1, lane] << 4 | high << 7
                )


@jit(
    [
        types.uint32(types.Array(bits, 1, "C", readonly=True), types.uint32)
        for bits in (types.uint32, types.uint16)
    ]
)
def largest_bits(bits, mask):
    largest = np.uint32(0)
    for i in range(bits.size):
        largest = max(largest, np.uint32(bits[i]) & mask)
    return largest
