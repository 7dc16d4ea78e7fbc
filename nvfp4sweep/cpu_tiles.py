"""Tiles: LANES blocks of a weight, transposed to [element, lane], and what all searches of a tile share.

A weight arrives as flat bits (uint32 or uint16) of [groups, block_size, inner] in C order: block b is
element b % inner of group b // inner, and its elements lie `inner` apart. float16 and bfloat16 are
widened in the tile, so the weight is never copied.
"""

import numpy as np

from nvfp4sweep import formats
from nvfp4sweep.lanes import at, jit, larger, put, select, smaller
from nvfp4sweep.window import (
    GREATEST_FLOAT32_PEAK,
    LEAST_FLOAT32_PEAK,
    LEAST_FLOAT32_SCALE,
    ROUNDER_BASE,
    ROUNDER_SLOPE,
)

# Many vectors wide: what a loop over lanes costs before its first vector is spread over all of them.
LANES = 256
#: Elements that one pass over the lanes takes: the rows of a tile are a multiple.
UNROLL = 8

SCALED_ROUNDER_BASE = np.float32(2**22 * ROUNDER_BASE)
SCALED_ROUNDER_SLOPE = np.float32(2**22 * ROUNDER_SLOPE)
#: Where y may exceed 6 the rounder stops in the binade of step 4, so that no y rounds to 0.
ROUNDER_CEILING = np.float32(2**25 * 1.5)

LEAST_PEAK = np.float32(LEAST_FLOAT32_PEAK)
GREATEST_PEAK = np.float32(GREATEST_FLOAT32_PEAK)
LEAST_SCALE = np.float32(LEAST_FLOAT32_SCALE)

_INF_BITS = np.uint32(0x7F800000)
_FLOAT16_INF_BITS = np.uint32(0x7C00 << 13)  # once shifted to a float32's place
# A float16 widened by shifting its bits alone is too small by this factor.
_FLOAT16_REBIAS = np.float32(2.0**112)
_E4M3_TO_FLOAT32 = np.int32(formats.E4M3_TO_FLOAT32)
_SMALLEST_NORMAL_E4M3 = np.float32(2.0**-6)


@jit(inline="always")
def exponent_shift(bits, is_float16):
    """What moves the bits of an element to a float32's place for the exponent."""
    if bits.itemsize == 4:
        return np.uint32(0)
    return np.uint32(13) if is_float16 else np.uint32(16)


@jit()
def rebias_float16(tile, tile_bits):
    """A tile of float16 magnitudes at a float32's place becomes what they are."""
    for i in range(tile.size):
        widened = at(tile_bits, i)
        put(tile, i, np.float32(at(tile, i) * _FLOAT16_REBIAS))
        if widened >= _FLOAT16_INF_BITS:
            put(tile_bits, i, _INF_BITS)


@jit()
def load_magnitudes(bits, is_float16, block_size, inner, first_block, lanes, tile, tile_bits):
    """tile[i, lane] = |w|, and 0 in lanes without a block."""
    mask = np.uint32(0x7FFF) if bits.itemsize == 2 else np.uint32(0x7FFFFFFF)
    shift = exponent_shift(bits, is_float16)
    column = first_block % inner
    start = first_block // inner * block_size * inner + column
    if inner == 1:
        for lane in range(lanes):
            for i in range(block_size):
                w = np.uint32(at(bits, start + lane * block_size + i))
                put(tile_bits, i * LANES + lane, np.uint32((w & mask) << shift))
    elif column + lanes <= inner:
        for i in range(block_size):
            for lane in range(lanes):
                w = np.uint32(at(bits, start + i * inner + lane))
                put(tile_bits, i * LANES + lane, np.uint32((w & mask) << shift))
    else:
        for lane in range(lanes):
            block = first_block + lane
            start = block // inner * block_size * inner + block % inner
            for i in range(block_size):
                w = np.uint32(at(bits, start + i * inner))
                put(tile_bits, i * LANES + lane, np.uint32((w & mask) << shift))
    if lanes < LANES:
        tile_bits[:block_size, lanes:] = np.uint32(0)
    if is_float16:
        rebias_float16(tile, tile_bits)


@jit(inline="always")
def lane_maxima(tile_bits, maxima):
    """maxima[lane] = the largest bits of a lane: for floats >= 0, the bits of the largest."""
    maxima[:] = np.uint32(0)
    for base in range(0, tile_bits.size, UNROLL * LANES):
        for lane in range(LANES):
            bits = maxima[lane]
            for i in range(UNROLL):
                bits = larger(at(tile_bits, base + i * LANES + lane), bits)
            maxima[lane] = bits


@jit(inline="always")
def code_at_least(value, value_bits):
    """The lowest E4M3 code whose value is >= value; beyond 126 where there is none."""
    uniform = np.int32(np.ceil(smaller(value, _SMALLEST_NORMAL_E4M3) * np.float32(512)))
    normal = np.int32(np.int32((value_bits + np.uint32(0xFFFFF)) >> np.uint32(20)) - _E4M3_TO_FLOAT32)
    return select(value < _SMALLEST_NORMAL_E4M3, uniform, normal)
