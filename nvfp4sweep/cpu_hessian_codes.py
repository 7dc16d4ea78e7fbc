"""The errors of a tile's blocks at one code each, with a Hessian, and which codes cannot win.

The lanes of a tile share a Hessian. Residuals are those of the nearest point: where rounding by one
fused operation might miss it, all of a tile's are computed again by exact comparisons.
"""

import numpy as np

from nvfp4sweep import formats
from nvfp4sweep.cpu_forms import VECTOR, quadratic_forms
from nvfp4sweep.cpu_tiles import ROUNDER_CEILING, SCALED_ROUNDER_BASE, SCALED_ROUNDER_SLOPE, UNROLL
from nvfp4sweep.lanes import at, bits_of, fma, jit, larger, put, select, smaller
from nvfp4sweep.window import HESSIAN_MARGIN_FLOAT32

# All arrays of a tile stay in the first-level cache.
LANES = 64
SIZE = formats.BLOCK_SIZE

MARGIN = np.float32(HESSIAN_MARGIN_FLOAT32)
# More than what float32 adds to P and to what is made of it.
LESS = np.float32(1 - 2.0**-18)
MORE = np.float32(1 + 2.0**-18)
# 1/s lies strictly between float32(1/s) times these.
_BELOW = np.float32(1 - 2.0**-22)
_ABOVE = np.float32(1 + 2.0**-22)

_GRID = tuple(np.float32(q) for q in formats.E2M1_VALUES[1:])
_MIDPOINTS = tuple(np.float32(q) for q in formats.E2M1_MIDPOINTS)

_MAX_CODE = np.int32(formats.MAX_CODE)
_ONE = np.int32(1)
_NONE = np.int32(0)
_ZERO = np.float32(0)
_INFINITY = np.float32(np.inf)

# The parts of a tile, each [SIZE, LANES]; SIGNS has bits. All in one array, and so is the scratch: for a
# loop that writes one of many arrays the compiler gives up proving that the others are not changed.
MAGNITUDES, SQUARES, SIGNS, RESIDUALS = range(4)
PART = SIZE * LANES
# The rows of a tile's scratch. SIZE_P holds P of theorem 10, SIZE_0 that of the block itself; LIMIT is
# what no error may exceed to be the least. From CENTER on the rows are int32, and MISSED is uint32.
(
    PEAK, LIMIT, TINY, FORM, SIZE_P, SIZE_0, NEGATIVE_SCALE, BELOW, ABOVE, SLOPE, X, Y,
    CENTER, FIRST, TOP, ACTIVE, WALKS, STARTS, NEAR, MISSED,
) = range(20)  # fmt: skip


@jit(inline="always")
def get(scratch, row, lane):
    return at(scratch, row * LANES + lane)


@jit(inline="always")
def set_to(scratch, row, lane, value):
    put(scratch, row * LANES + lane, value)


# --- float32: the residuals of every lane at one code ---------------------------------------------


@jit(inline="always")
def _round(tile, sums, scratch, clips):
    """Residuals of the nearest points, and P, but for lanes of which something is left in MISSED."""
    tile_bits, scratch_bits = tile.view(np.uint32), scratch.view(np.uint32)
    for first in range(0, SIZE, UNROLL):
        for lane in range(LANES):
            size = get(scratch, SIZE_P, lane)
            missed = get(scratch_bits, MISSED, lane)
            for i in range(UNROLL):
                place = (first + i) * LANES + lane
                w = at(tile, MAGNITUDES * PART + place)
                square = at(tile, SQUARES * PART + place)
                rounder = fma(square, get(scratch, SLOPE, lane), SCALED_ROUNDER_BASE)
                if clips:
                    rounder = smaller(rounder, ROUNDER_CEILING)
                rounded = fma(w, get(scratch, BELOW, lane), rounder)
                missed |= bits_of(rounded) ^ bits_of(fma(w, get(scratch, ABOVE, lane), rounder))
                q = rounder - rounded
                if clips:
                    q = smaller(q, np.float32(6))
                residual = fma(q, get(scratch, NEGATIVE_SCALE, lane), w)
                sign = at(tile_bits, SIGNS * PART + place)
                put(tile_bits, RESIDUALS * PART + place, bits_of(residual) ^ sign)
                size = fma(residual * residual, at(sums, first + i), size)
            set_to(scratch, SIZE_P, lane, size)
            set_to(scratch_bits, MISSED, lane, missed)


@jit(inline="always")
def _round_exactly(tile, sums, scratch):
    """The same by comparisons with the midpoints: the sign of a fused operation is exact."""
    tile_bits = tile.view(np.uint32)
    for lane in range(LANES):
        set_to(scratch, SIZE_P, lane, _ZERO)
    for i in range(SIZE):
        for lane in range(LANES):
            place = i * LANES + lane
            w, scale = at(tile, MAGNITUDES * PART + place), get(scratch, NEGATIVE_SCALE, lane)
            q = _ZERO
            for step in range(7):
                beyond = fma(_MIDPOINTS[step], scale, w)
                up = beyond >= _ZERO if step & 1 else beyond > _ZERO  # ties go to the even code
                q = select(up, _GRID[step], q)
            residual = fma(q, scale, w)
            sign = at(tile_bits, SIGNS * PART + place)
            put(tile_bits, RESIDUALS * PART + place, bits_of(residual) ^ sign)
            size = fma(residual * residual, at(sums, i), get(scratch, SIZE_P, lane))
            set_to(scratch, SIZE_P, lane, size)


@jit(inline="always")
def forms(tile, coefficients, scratch):
    """FORM = r^T H r of the residuals, where one of VECTOR lanes needs it."""
    ints = scratch.view(np.int32)
    for lane in range(0, LANES, VECTOR):
        needed = _NONE
        for i in range(lane, lane + VECTOR):
            needed |= get(ints, WALKS, i)
        if needed != _NONE:
            quadratic_forms(tile, coefficients, LANES, RESIDUALS * PART + lane, scratch, FORM * LANES + lane)


@jit()
def evaluate(step, tile, coefficients, sums, mu, negative_scales, floor, scratch, row):
    """row[lane] = the least that the error at code CENTER + step may be; infinite where not needed.

    Returns how many lanes still walk.
    """
    ints, scratch_bits = scratch.view(np.int32), scratch.view(np.uint32)
    walking, clipping = _NONE, _NONE
    for lane in range(LANES):
        code = np.int32(get(ints, CENTER, lane) + step)
        walks = (get(ints, ACTIVE, lane) != _NONE) & (code >= floor)
        walks &= (code >= get(ints, FIRST, lane)) & (code <= get(ints, TOP, lane))
        set_to(ints, WALKS, lane, select(walks, _ONE, _NONE))
        walking += select(walks, _ONE, _NONE)
    for lane in range(LANES):
        code = smaller(larger(np.int32(get(ints, CENTER, lane) + step), floor), _MAX_CODE)
        set_to(scratch, NEGATIVE_SCALE, lane, at(negative_scales, np.intp(code)))
    for lane in range(LANES):
        walks = get(ints, WALKS, lane) != _NONE
        scale = get(scratch, NEGATIVE_SCALE, lane)
        clips = get(scratch, PEAK, lane) + np.float32(6) * scale > _ZERO
        clipping += select(walks & clips, _ONE, _NONE)
    if walking == 0:
        return walking
    for lane in range(LANES):
        inverse = np.float32(1) / get(scratch, NEGATIVE_SCALE, lane)
        set_to(scratch, BELOW, lane, np.float32(inverse * _BELOW))
        set_to(scratch, ABOVE, lane, np.float32(inverse * _ABOVE))
        set_to(scratch, SLOPE, lane, np.float32(inverse * inverse * SCALED_ROUNDER_SLOPE))
        set_to(scratch, SIZE_P, lane, _ZERO)
        set_to(scratch_bits, MISSED, lane, np.uint32(0))
    if clipping > 0:
        _round(tile, sums, scratch, True)
    else:
        _round(tile, sums, scratch, False)
    misses = _NONE
    for lane in range(LANES):
        missed = (get(scratch_bits, MISSED, lane) != 0) & (get(ints, WALKS, lane) != _NONE)
        misses += select(missed, _ONE, _NONE)
    if misses > 0:
        _round_exactly(tile, sums, scratch)

    for lane in range(LANES):
        walks = (get(ints, WALKS, lane) != _NONE) & (not _is_out(mu, scratch, lane))
        set_to(ints, WALKS, lane, select(walks, _ONE, _NONE))
    forms(tile, coefficients, scratch)
    for lane in range(LANES):
        walks = get(ints, WALKS, lane) != _NONE
        form = get(scratch, FORM, lane)
        margin = fma(get(scratch, SIZE_P, lane), MARGIN, get(scratch, TINY, lane))
        most = select(walks, np.float32(form + margin), _INFINITY)
        set_to(scratch, LIMIT, lane, smaller(most, get(scratch, LIMIT, lane)))
        put(row, lane, select(walks, np.float32(form - margin), _INFINITY))
    return walking


@jit(inline="always")
def _is_out(mu, scratch, lane):
    """Whether mu P exceeds what no error may exceed to be the least."""
    limit = get(scratch, LIMIT, lane) + get(scratch, TINY, lane)
    return (mu > _ZERO) & (mu * get(scratch, SIZE_P, lane) * LESS > limit)


@jit(inline="always")
def _stop(mu, scratch):
    ints = scratch.view(np.int32)
    for lane in range(LANES):
        active = get(ints, ACTIVE, lane)
        set_to(ints, ACTIVE, lane, select(_is_out(mu, scratch, lane), _NONE, active))


@jit(inline="always")
def stop_upwards(step, tile, sums, mu, negative_scales, scratch):
    """Lanes stop where theorem 10 rules out the codes from CENTER + step up."""
    ints = scratch.view(np.int32)
    for lane in range(LANES):
        code = smaller(np.int32(get(ints, CENTER, lane) + step), _MAX_CODE)
        scale = at(negative_scales, np.intp(code))
        set_to(scratch, X, lane, np.float32(scale * scale * np.float32(LESS / 16)))
        set_to(scratch, SIZE_P, lane, _ZERO)
    for first in range(0, SIZE, UNROLL):
        for lane in range(LANES):
            size = get(scratch, SIZE_P, lane)
            for i in range(UNROLL):
                square = at(tile, SQUARES * PART + (first + i) * LANES + lane)
                stays = select(square <= get(scratch, X, lane), square, _ZERO)
                size = fma(stays, at(sums, first + i), size)
            set_to(scratch, SIZE_P, lane, size)
    _stop(mu, scratch)


@jit(inline="always")
def stop_downwards(step, tile, sums, mu, negative_scales, floor, scratch):
    """Lanes stop where theorem 10 rules out the codes from CENTER + step down."""
    ints = scratch.view(np.int32)
    for lane in range(LANES):
        code = smaller(larger(np.int32(get(ints, CENTER, lane) + step), floor), _MAX_CODE)
        set_to(scratch, X, lane, at(negative_scales, np.intp(code)))
        set_to(scratch, SIZE_P, lane, _ZERO)
    for first in range(0, SIZE, UNROLL):
        for lane in range(LANES):
            size = get(scratch, SIZE_P, lane)
            for i in range(UNROLL):
                w = at(tile, MAGNITUDES * PART + (first + i) * LANES + lane)
                excess = larger(fma(np.float32(6), get(scratch, X, lane), w), _ZERO)
                size = fma(excess * excess, at(sums, first + i), size)
            set_to(scratch, SIZE_P, lane, size)
    _stop(mu, scratch)
